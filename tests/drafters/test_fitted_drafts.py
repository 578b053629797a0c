"""Medusa heads and speculators that are right on one text: what is accepted tells mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import pytest  # isort: skip
from conftest import engine_of, plainly, prompt_of, run
from fitted_drafters import heads, speculator
from tiny_heads import PARAMS, SHAPES
from tiny_medusa import K

from mlx_redrafter.cache.session import Session
from mlx_redrafter.drafters.levels import LevelDrafter
from mlx_redrafter.drafters.medusa import Medusa
from mlx_redrafter.drafters.speculator import Speculator
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

PROMPT = prompt_of(3)


def another_head(self: Medusa, i: int, *rest: Any) -> Any:
    return MEDUSA_LEVEL(self, (i + 1) % K, *rest)


def forgetful(self: Speculator, i: int, tokens: Any, state: Any) -> Any:
    """Every level forgets what the ones before consumed."""
    return SPECULATOR_LEVEL(self, i, tokens * 0, state)


MEDUSA_LEVEL, SPECULATOR_LEVEL = Medusa.level, Speculator.level


class Case(NamedTuple):
    """more: tokens beyond the answer that the text needs for its last levels. wrong_level: a
    mistake. wasted: steps that mistakes take at the least."""

    make: Callable[..., LevelDrafter]
    more: int
    wrong_level: Callable[..., Any]
    wasted: int


CASES = {
    "medusa": Case(heads, 0, another_head, 12),
    "mlp": Case(speculator("mlp"), 5, forgetful, 9),
    "lstm": Case(speculator("lstm"), 5, forgetful, 9),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("shape", [TreeShape.chain(3), TreeShape(3, 3, 8)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_right_ones_are_accepted_and_wrong_ones_are_not(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, shape: TreeShape,
    params: Any,
) -> None:  # fmt: skip
    """The text is the same in any case; the steps tell a shift, a stale state, a wrong level."""
    text = plainly(target, PROMPT, 25 + case.more, params)
    answer = plainly(target, PROMPT, 25, params)

    def steps(drafter: LevelDrafter) -> int:
        stats = DraftStats()
        engine = engine_of(target, drafter, compiled=False)
        assert run(engine, PROMPT, params, shape, 25, stats=stats) == answer
        return stats.steps

    right = case.make(target, tmp_path, PROMPT + text)
    assert steps(right) <= 8  # 25 tokens in steps of 4
    assert steps(case.make(target, tmp_path, PROMPT + text, shift=1)) > 12
    with monkeypatch.context() as patch:
        patch.setattr(type(right), "commit", lambda self, state, done: state)
        assert steps(right) > case.wasted
    with monkeypatch.context() as patch:
        patch.setattr(type(right), "level", case.wrong_level)
        assert steps(right) > case.wasted


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_session_goes_on(target: Decoder, tmp_path: Path, case: Case) -> None:
    answer = plainly(target, PROMPT, 20 + case.more)
    drafter = case.make(target, tmp_path, PROMPT + answer)
    engine, session = engine_of(target, drafter, compiled=False), Session()
    first = run(engine, PROMPT, None, SHAPES[1], 12, session=session)
    assert first == answer[:12]
    assert run(engine, PROMPT + first, None, SHAPES[1], 8, session=session) == answer[12:20]
    other = [*PROMPT, *first[:5], 1, 2]  # the session is cut
    assert run(engine, other, None, SHAPES[1], 8, session=session) == plainly(target, other, 8)
