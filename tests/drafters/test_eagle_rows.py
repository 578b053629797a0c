"""The rows that an EAGLE head keeps: to the bit the same, however a text came into its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import asked, engine_of, plainly, prompt_of, run
from eagle_calls import rows_in, rows_of
from eagle_fitted import DEPTH, fitted, plain_head
from halves import half_slow
from tiny_eagle import loaded

from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.decoding import answering, step
from mlx_redrafter.drafters.eagle import Eagle
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

TREE, CHAIN = TreeShape(3, DEPTH, 8), TreeShape.chain(DEPTH)
LOOKUP, BOTH = TreeShape(1, 0, 6, lookup=5), TreeShape(3, DEPTH, 12, lookup=5)
PLAIN = TreeShape.plain()
SHAPES = {"tree": TREE, "chain": CHAIN, "lookup": LOOKUP, "both": BOTH, "plain": PLAIN,
          "beams": TreeShape(3, DEPTH, 8, "beams")}  # fmt: skip
SHORT, LONG = 9, 113  # the long prompt's answer goes beyond the first 128 slots


class Dice:
    """Any shape at any step."""

    shapes = (TREE, CHAIN, PLAIN, LOOKUP, BOTH)

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def choose(self, position: int) -> TreeShape:
        return self.shapes[self._random.integers(len(self.shapes))]

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        pass


class World(NamedTuple):
    """A head that is right on a text, the prompt and the answer that the text is made of."""

    target: Decoder
    head: Eagle
    prompt: list[int]
    answer: list[int]

    def rows(self, text: list[int], step: int = 512) -> np.ndarray:
        return rows_of(self.head, self.target, text, step)


def world_of(target: Decoder, folder: Path, length: int) -> World:
    prompt = prompt_of(length, seed=length)
    answer = plainly(target, prompt, 40)
    return World(target, fitted(folder, target, prompt + answer, length), prompt, answer)


@pytest.fixture(scope="module", params=[SHORT, LONG], ids=["short", "long"])
def world(request: Any, target: Decoder, tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_of(target, tmp_path_factory.mktemp("head"), request.param)


@pytest.fixture(scope="module")
def short(target: Decoder, tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_of(target, tmp_path_factory.mktemp("head"), SHORT)


def assert_same_rows(world: World, session: Session, least: int) -> None:
    """Of all tokens that the session holds, which are the text's."""
    known = session.tokens
    assert session.covered == len(known) >= least
    found, meant = rows_in(session, world.head), world.rows(known)
    assert found.shape == meant.shape and found.shape[2] == len(known) - 1
    assert np.array_equal(found, meant)


def answered(
    world: World, shape: Any, n: int, session: Session, prompt: list[int] | None = None, **more: Any
) -> DraftStats:
    """An answer to a beginning of the text, which is the text."""
    stats, text = DraftStats(), world.prompt + world.answer
    prompt = prompt or world.prompt
    engine = engine_of(world.target, world.head, compiled=False)
    found = run(engine, prompt, None, shape, n, session, stats, **more)
    if text[: len(prompt)] == prompt:
        assert found == text[len(prompt) : len(prompt) + n]
    return stats


@pytest.mark.bits
def test_a_prompt_in_chunks_of_any_size(world: World) -> None:
    text = world.prompt + world.answer
    whole = world.rows(text)
    assert whole.shape[2] == len(text) - 1 and np.abs(whole).min() > 0
    for size in (1, 2, 7, 16, 33):
        assert np.array_equal(world.rows(text, size), whole)


@pytest.mark.bits
@pytest.mark.parametrize("shape", half_slow(SHAPES.values()), ids=SHAPES)
def test_steps_leave_the_rows_of_a_prompt(world: World, shape: TreeShape) -> None:
    """What is checked first: such a text is really drafted, and beyond a slab's first capacity."""
    session = Session()
    stats = answered(world, shape, 36, session)
    if not shape.depth:  # nobody asks the head; what it lacks is read before it is asked
        assert session.covered == 0
        answered(world, TREE, 1, session, world.prompt + world.answer[:36])
    assert_same_rows(world, session, len(world.prompt) + 30)
    if shape.depth:
        assert stats.tokens_per_step > (2.5 if shape.width > 1 else 1.5)
        assert max(stats.histogram) == DEPTH
    if len(world.prompt) == LONG:
        assert session.caches[-1].shape[2] > 128


@pytest.mark.bits
def test_compiled_steps_leave_them_too(short: World) -> None:
    session, engine = Session(), engine_of(short.target, short.head)
    assert run(engine, short.prompt, None, TREE, 36, session) == short.answer[:36]
    assert_same_rows(short, session, SHORT + 30)


@pytest.mark.bits
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("patience", [0, 32])
def test_shapes_that_change_from_step_to_step(
    world: World, monkeypatch: pytest.MonkeyPatch, seed: int, patience: int
) -> None:
    """The head may be let go of on the way, where it is not asked for some steps."""
    monkeypatch.setattr(answering, "_PATIENCE", patience)
    session = Session()
    assert len(answered(world, Dice(seed), 36, session).shapes) > 1
    assert patience or session.covered < len(session.tokens)
    given = len(session.tokens) + 1 - len(world.prompt)
    answered(world, TREE, 1, session, world.prompt + world.answer[:given])
    assert_same_rows(world, session, len(world.prompt) + 30)


@pytest.mark.bits
@pytest.mark.parametrize("shape", [TREE, CHAIN, PLAIN, BOTH], ids=str)
def test_an_answer_that_is_closed_early(short: World, shape: TreeShape) -> None:
    for steps in range(1, 7):
        session = Session()
        engine = engine_of(short.target, short.head, compiled=False)
        answer = engine.generate(asked(short.prompt, None, shape, 30, session=session))
        given = [token for _ in range(steps) for token in next(answer).tokens]
        answer.close()
        if shape.depth:
            assert_same_rows(short, session, SHORT + len(given) - DEPTH - 2)
        # It goes on where it was left, with what is kept.
        answered(short, TREE, 8, session, short.prompt + given)
        assert_same_rows(short, session, SHORT + len(given) + 4)


def cut(world: World, session: Session) -> list[int]:
    """A session that is cut and goes on otherwise, and the text that it then was asked."""
    answered(world, TREE, 20, session)
    other = [*world.prompt, *world.answer[:6], 1, 2, 3]
    answered(world, TREE, 12, session, other)
    return other


@pytest.mark.bits
def test_a_session_that_was_cut_and_went_on(world: World) -> None:
    session = Session()
    other = cut(world, session)
    assert session.tokens[: len(other)] == other
    assert_same_rows(world, session, len(other) + 8)
    answered(world, CHAIN, 12, session)  # and back
    assert_same_rows(world, session, len(world.prompt) + 8)
    answered(world, BOTH, 12, session, [*world.prompt, *world.answer[:9]])
    assert_same_rows(world, session, len(world.prompt) + 17)
    session.trim(len(session.tokens) - 3)  # as after a stop string
    assert_same_rows(world, session, len(world.prompt) + 14)
    answered(world, TREE, 12, session, [*session.tokens, 4])
    assert_same_rows(world, session, len(world.prompt) + 20)


def test_what_is_right_is_accepted_and_what_is_not_is_not(
    short: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is the same in any case (`answered`); the steps tell a shift or a stale state."""

    def steps(world: World) -> int:
        return answered(world, TREE, 30, Session()).steps

    assert steps(short) <= 11
    text = short.prompt + short.answer
    later = fitted(tmp_path, short.target, text, SHORT, shift=1)
    assert steps(short._replace(head=later)) > 20
    wild = loaded(tmp_path / "wild", plain_head(), short.target)
    assert steps(short._replace(head=wild)) > 20
    with monkeypatch.context() as patch:
        patch.setattr(Eagle, "commit", lambda self, state, done: leaving(self, state, done))
        assert steps(short) > 16


COMMIT = Eagle.commit


def leaving(self: Eagle, state: mx.array, done: Any) -> mx.array:
    """Rows are committed, and the next draft begins with the old f."""
    COMMIT(self, state, done)
    return state


# Mistakes that other rows, and nothing else, tell.


def depends_on_itself(patch: pytest.MonkeyPatch) -> None:
    """Cutting a session keeps the row of the last token that was shared."""
    init = Eagle.__init__

    def wrong(self: Eagle, config: Any) -> None:
        init(self, config)
        self._kind = replace(self._kind, ahead=0)

    patch.setattr(Eagle, "__init__", wrong)


def nothing_is_committed(patch: pytest.MonkeyPatch) -> None:
    commit = Slab.commit

    def wrong(self: Slab, kept: mx.array, *rest: Any) -> mx.array:
        return commit(self, kept, *rest) if self.in_place else kept

    patch.setattr(Slab, "commit", wrong)


def a_chain_waits_for_nothing(patch: pytest.MonkeyPatch) -> None:
    """As if a chain's rows were written in place, as the target's are."""
    patch.setattr(step, "waits", lambda kind, shape: not shape.one_path)


def changed(**parts: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def mistake(patch: pytest.MonkeyPatch) -> None:
        def wrong(self: Eagle, state: mx.array, done: Any) -> mx.array:
            return COMMIT(self, state, done._replace(**{k: f(done) for k, f in parts.items()}))

        patch.setattr(Eagle, "commit", wrong)

    return mistake


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "none": lambda patch: None,
    "ahead = 0": depends_on_itself,
    "rows not committed": nothing_is_committed,
    "chains not committed": a_chain_waits_for_nothing,
    "the node's own token": changed(choices=lambda done: done.tree.tokens),
    "a position on": changed(position=lambda done: done.position + 1),
    "depths of a chain": changed(
        tree=lambda done: done.tree._replace(depths=mx.arange(done.tree.depths.shape[0]))
    ),
}


@pytest.mark.bits
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_in_the_rows(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    """Of trees, of chains and of a session that is cut: with any mistake some are others."""
    right = world_of(target, tmp_path, SHORT)
    with monkeypatch.context() as patch:
        mistake(patch)
        wrong = world_of(target, tmp_path, SHORT)
        tree, chain, session = Session(), Session(), Session()
        answered(wrong, TREE, 30, tree)
        answered(wrong, CHAIN, 30, chain)
        cut(wrong, session)
    same = [
        np.array_equal(rows_in(each, right.head), right.rows(each.tokens))
        for each in (tree, chain, session)
    ]
    assert all(same) is (mistake is MISTAKES["none"])
