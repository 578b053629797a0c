"""Block drafters in the decode step: the text never changes, and rows are those of one reading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from block_calls import at_the_end, knowing, proposed, rows_in, rows_of
from conftest import V, asked, engine_of, plainly, prompt_of, run
from halves import half_slow
from tiny_block import DIALECTS, B, loaded
from tiny_heads import PARAMS, SHAPES, paths
from tiny_models import TOLERANCE

from mlx_redrafter.budget import costs
from mlx_redrafter.cache.session import Session
from mlx_redrafter.drafters import Verified
from mlx_redrafter.drafters.block import Block
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

PROMPT = prompt_of(13, seed=3)
LENGTH = 24


def same(a: np.ndarray, b: np.ndarray) -> bool:
    assert a.shape == b.shape and a.size and np.abs(a).max() > 0.1
    return bool(np.abs(a - b).max() <= TOLERANCE)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("name", half_slow(DIALECTS))
def test_no_dialect_changes_a_text(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, params: Any
) -> None:
    """Whether it guesses badly, as it does by itself, or well."""
    drafter, answer = loaded(tmp_path, DIALECTS[name], target), plainly(target, PROMPT, 18, params)
    engine = engine_of(target, drafter, compiled=False)
    assert run(engine, PROMPT, params, SHAPES[1], 18) == answer
    knowing(monkeypatch, PROMPT + answer)
    assert run(engine, PROMPT, params, SHAPES[1], 18) == answer


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize(
    "shape", [*SHAPES, TreeShape.chain(B + 3), TreeShape(2, B + 2, 14)], ids=str
)
def test_no_shape_changes_a_text(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: TreeShape, params: Any
) -> None:
    """Chains, trees, with the text itself, deeper than the block; compiled."""
    drafter, stats = loaded(tmp_path, DIALECTS["deepspec-rnn"], target), DraftStats()
    answer = plainly(target, PROMPT, LENGTH, params)
    knowing(monkeypatch, PROMPT + answer)
    assert run(engine_of(target, drafter), PROMPT, params, shape, LENGTH, stats=stats) == answer
    assert stats.steps <= 10  # four of five are known


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_a_session_goes_on(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, params: Any
) -> None:
    """With more of the same text, after an answer without drafts, and cut."""
    drafter, session = loaded(tmp_path, DIALECTS["speculators-dspark"], target), Session()
    engine = engine_of(target, drafter, compiled=False)
    answer = plainly(target, PROMPT, 20, params)
    knowing(monkeypatch, PROMPT + answer)
    assert run(engine, PROMPT, params, SHAPES[3], 12, session) == answer[:12]
    assert run(engine, PROMPT + answer[:12], params, None, 3, session) == answer[12:15]
    assert run(engine, PROMPT + answer[:15], params, SHAPES[0], 5, session) == answer[15:]
    other = [*PROMPT, *answer[:5], 1, 2]
    assert run(engine, other, params, SHAPES[1], 8, session) == plainly(target, other, 8, params)


@pytest.mark.measured
def test_what_it_costs_is_measured(target: Decoder, tmp_path: Path) -> None:
    drafter = loaded(tmp_path, DIALECTS["deepspec-dspark"], target)
    engine = engine_of(target, drafter, compiled=False)
    found = costs.measure(target, engine.drafters, engine.step_function, compiled=False)
    assert set(found.draft) == set(costs.WIDTHS)
    assert all(first > 0 for first, _ in found.draft.values())


@pytest.mark.parametrize("depth", [B - 1, B + 2])
def test_beyond_the_block_every_token_is_as_likely(
    target: Decoder, tmp_path: Path, depth: int
) -> None:
    drafter = loaded(tmp_path, DIALECTS["z-lab"], target)
    place = at_the_end(drafter, target, PROMPT)
    tree = paths(proposed(drafter, place, TreeShape(2, depth, 1 + 2 * depth)))
    costs = {tuple(path): cost for path, cost in tree}
    for path, cost in costs.items():
        if len(path) > 1:
            as_likely = abs(cost - costs[path[:-1]] - np.log(V)) < 1e-4
            assert as_likely == (len(path) > B - 1)


# Rows


def by_steps(target: Decoder, drafter: Block, shape: TreeShape, session: Session) -> None:
    run(engine_of(target, drafter, compiled=False), PROMPT, None, shape, LENGTH, session=session)


@pytest.mark.bits
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["deepspec-dspark", "speculators-dflash"])
def test_rows_are_those_of_one_reading(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: TreeShape, name: str
) -> None:
    """By steps whose trees are accepted in part, in chunks, or in a session that is cut."""
    drafter, session = loaded(tmp_path, DIALECTS[name], target), Session()
    answer = plainly(target, PROMPT, LENGTH)
    knowing(monkeypatch, PROMPT + answer)
    by_steps(target, drafter, shape, session)
    tokens = list(session.tokens)
    assert tokens == (PROMPT + answer)[: len(tokens)] and len(tokens) >= len(PROMPT) + LENGTH - 6
    expected = rows_of(drafter, target, tokens)
    assert same(rows_in(session, drafter), expected)
    assert same(rows_of(drafter, target, tokens, step=3), expected)
    other = [*PROMPT, *answer[:5], 1, 2]
    following = plainly(target, other, 9)
    knowing(monkeypatch, other + following)
    engine = engine_of(target, drafter, compiled=False)
    assert run(engine, other, None, shape, 9, session=session) == following
    assert same(rows_in(session, drafter), rows_of(drafter, target, session.tokens))


@pytest.mark.bits
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]], ids=str)
def test_an_answer_that_is_closed_early_leaves_whole_rows(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: TreeShape, steps: int
) -> None:
    drafter, session = loaded(tmp_path, DIALECTS["deepspec-dspark"], target), Session()
    knowing(monkeypatch, PROMPT + plainly(target, PROMPT, LENGTH))
    request = asked(PROMPT, None, shape, LENGTH, session=session)
    answer = engine_of(target, drafter, compiled=False).generate(request)
    for _ in zip(range(steps), answer, strict=False):
        pass
    answer.close()
    assert len(session.tokens) >= len(PROMPT) - 1
    assert same(rows_in(session, drafter), rows_of(drafter, target, session.tokens))


def stale(self: Block, state: tuple[()], done: Verified) -> tuple[()]:
    """What waits is of the positions before."""
    for i, rows in enumerate(self.rows(done.read, done.position + done.tree.depths - 1)):
        done.own.leave(i, rows)  # type: ignore[union-attr]
    return ()


def forgotten(self: Block, state: tuple[()], done: Verified) -> tuple[()]:
    """Nothing new: zeros."""
    for i, rows in enumerate(self.rows(done.read, done.position + done.tree.depths)):
        done.own.leave(i, 0 * rows)  # type: ignore[union-attr]
    return ()


def of_the_root(self: Block, state: tuple[()], done: Verified) -> tuple[()]:
    """Every node has the root's context."""
    for i, rows in enumerate(self.rows(done.read, done.position + done.tree.depths)):
        done.own.leave(i, mx.broadcast_to(rows[:, :, :1], rows.shape))  # type: ignore[union-attr]
    return ()


@pytest.mark.bits
@pytest.mark.parametrize("mistake", [stale, forgotten, of_the_root])
def test_wrong_rows_are_noticed_and_change_no_text(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[..., tuple[()]],
) -> None:  # fmt: skip
    drafter, session = loaded(tmp_path, DIALECTS["deepspec-dspark"], target), Session()
    answer = plainly(target, PROMPT, LENGTH)
    knowing(monkeypatch, PROMPT + answer)
    monkeypatch.setattr(Block, "commit", mistake)
    engine = engine_of(target, drafter, compiled=False)
    assert run(engine, PROMPT, None, SHAPES[1], LENGTH, session=session) == answer
    expected = rows_of(drafter, target, session.tokens)
    assert not same(rows_in(session, drafter), expected)
    assert same(
        rows_in(session, drafter)[:, :, : len(PROMPT) - 1], expected[:, :, : len(PROMPT) - 1]
    )
