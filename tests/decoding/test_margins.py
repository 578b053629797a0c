"""Tokens that rounding may have chosen: counted where bits cannot be equal, and not otherwise."""

from __future__ import annotations

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from conftest import SHAPES, Oracle, engine_of, hidden_states, prompt_of, run

from mlx_redrafter.cli import remarks
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats


@pytest.mark.parametrize(
    ("dtype", "apart", "temp", "near"),
    [
        (mx.float32, 1e-3, 0, False), (mx.float32, 1e-6, 0, True), (mx.float16, 1e-3, 0, True),
        (mx.float16, 0.5, 0, False), (mx.bfloat16, 0.25, 0, True), (mx.bfloat16, 2, 0, False),
        (mx.float16, 0.0, 0.01, True),
    ],
)  # fmt: skip
def test_what_is_near_depends_on_the_type(
    dtype: mx.Dtype, apart: float, temp: float, near: bool
) -> None:
    logits = mx.array([[16.0, 16 - apart, -3], [16.0, -16, -16]]).astype(dtype)
    arrays = SamplingParams(temp=temp).arrays(3) if temp else {}
    scores = logits / temp if temp else logits
    assert sampling.near_ties(logits, scores, arrays).tolist() == [near, False]


@pytest.mark.bits
@pytest.mark.parametrize("temp", [0.0, 0.9])
def test_they_are_counted_along_what_was_accepted(
    temp: float, target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where nodes count that were not accepted. With a margin in which many are."""
    monkeypatch.setattr(sampling, "ROUNDINGS", 2**19)
    prompt, params = prompt_of(20), SamplingParams(temp=temp, top_k=20, seed=2)
    stats, one = DraftStats(), engine_of(target, None, compiled=False)
    assert stats.near_ties is None
    plain = run(one, prompt, params, None, 24, stats=stats, margins=True)
    count = stats.near_ties
    assert count is not None and 2 < count < 24
    if temp == 0:
        hidden = mx.array(hidden_states(target, [*prompt, *plain[:-1]])[len(prompt) - 1 :])
        logits = target.logits(hidden)
        assert count == mx.sum(sampling.near_ties(logits, logits, {})).item()
    drafter, drafted = Oracle(target, [[*prompt, *plain]], (0, 1, 0, 9)), DraftStats()
    one = engine_of(target, drafter, compiled=False)
    assert run(one, prompt, params, SHAPES["beam-3x4-8"], 24, None, drafted, margins=True) == plain
    assert drafted.steps < 20 and drafted.near_ties is not None
    assert count <= drafted.near_ties <= count + 4, "the last step may have gone further"
    assert "near ties" in remarks.details(drafted) and drafted.as_dict()["near_ties"] > 0


def test_nobody_counts_unasked(target: Decoder) -> None:
    stats = DraftStats()
    run(engine_of(target, None, compiled=False), prompt_of(9), None, None, 4, stats=stats)
    assert stats.near_ties is None and "near_ties" not in stats.as_dict()
    stats.add(DraftStats(near_ties=3))
    stats.add(DraftStats())
    stats.add(DraftStats(near_ties=1))
    assert stats.near_ties == 4
