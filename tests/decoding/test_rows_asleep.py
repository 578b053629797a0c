"""Drafters that keep rows are let go of where nobody asks them, and taken up again."""

from __future__ import annotations

from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import numpy as np  # isort: skip
import pytest
from conftest import engine_of, plainly, prompt_of, run

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding import answering as decoding
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.drafters.loading import load_drafter
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

CHAIN, PLAIN = TreeShape.chain(3), TreeShape.plain()
PROMPT = prompt_of(9)


@pytest.fixture(scope="module")
def engine(target: Decoder, target_folder: Path) -> Engine:
    """The target drafts for itself."""
    return engine_of(target, load_drafter(target_folder, target))


class Sometimes:
    """Drafts for a while, and then not any more."""

    shapes = (PLAIN, CHAIN)

    def __init__(self, steps: int) -> None:
        self.left = steps

    def choose(self, position: int) -> TreeShape:
        self.left -= 1
        return CHAIN if self.left >= 0 else PLAIN

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        pass


def covered(session: Session, target: Decoder, wanted: Session) -> bool:
    """Are a session's rows of the drafter those of another one, as far as they go?"""
    n, first = session.covered, target.config.num_layers
    pairs = zip(session.caches[first:], wanted.caches[first:], strict=True)
    return all(np.array_equal(np.array(a)[:, :, :n], np.array(b)[:, :, :n]) for a, b in pairs)


def whole(engine: Engine, text: list[int]) -> Session:
    session = Session()
    run(engine, [*text, 1, 1], None, CHAIN, 1, session=session)
    return session


def test_a_plain_answer_makes_no_rows(engine: Engine, target: Decoder) -> None:
    session = Session()
    assert run(engine, PROMPT, None, PLAIN, 20, session=session) == plainly(target, PROMPT, 20)
    assert session.covered == 0
    assert not np.array(session.caches[-1]).any()


@pytest.mark.bits
@pytest.mark.parametrize("steps", [0, 1, 3, 7])
def test_an_answer_goes_on_without_them(
    engine: Engine, target: Decoder, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(decoding, "_PATIENCE", 2)
    session, stats = Session(), DraftStats()
    policy = Sometimes(steps)
    tokens = run(engine, PROMPT, None, policy, 40, session=session, stats=stats)  # type: ignore[arg-type]
    assert tokens == plainly(target, PROMPT, 40)
    text = PROMPT + tokens
    assert len(PROMPT) - 1 <= session.covered < len(session.tokens)
    assert covered(session, target, whole(engine, text))
    # The next answer drafts again, and right: what was missing is read.
    stats = DraftStats()
    again = run(engine, text, None, CHAIN, 21, session=session, stats=stats)
    assert again == plainly(target, text, 21)
    assert stats.tokens_per_step > 3
    assert session.covered == len(session.tokens)
    assert covered(session, target, whole(engine, text + again))


def test_plain_and_drafted_answers_take_turns_in_a_session(engine: Engine, target: Decoder) -> None:
    session, text = Session(), list(PROMPT)
    for shape in (CHAIN, PLAIN, PLAIN, CHAIN, TreeShape(3, 3, 7), PLAIN, CHAIN):
        stats = DraftStats()
        tokens = run(engine, text, None, shape, 12, session=session, stats=stats)
        assert tokens == plainly(target, text, 12)
        assert stats.tokens_per_step > (2.3 if shape.drafts else 0)
        text += [*tokens, 5]


def test_rows_that_are_not_there_would_draft_badly(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``covered`` is for: without it, rows of an older text stand for the new one's."""
    session = Session()
    tokens = run(engine, PROMPT, None, PLAIN, 30, session=session)
    session.covered = len(session.tokens)
    stats = DraftStats()
    run(engine, PROMPT + tokens, None, CHAIN, 21, session=session, stats=stats)
    assert stats.tokens_per_step < 3
