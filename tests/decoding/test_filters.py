"""One sort keeps what 31 halvings keep: of ties, of extremes, and in company of other filters."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.decoding import filters, sampling
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.tree.nodes import root_only

V = 3000
OPTIONS: list[dict[str, Any]] = [
    {"top_p": 1e-6}, {"top_p": 0.05}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.999},
    {"top_k": 1}, {"top_k": 40}, {"top_k": 1000}, {"top_k": V}, {"top_k": 2**31 - 1},
    {"top_p": 0.9, "top_k": 30}, {"top_p": 0.3, "top_k": 500}, {"top_k": 7, "min_p": 0.02},
    {"top_p": 0.8, "min_p": 1.0}, {"top_p": 0.95, "min_p": 0.001, "top_k": 100},
]  # fmt: skip


def noisy(scale: float, rows: int = 8) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, V)) * scale + 3


def tied(step: float) -> np.ndarray:
    """A few values, each of them many tokens' own."""
    return np.round(noisy(2.0) / step) * step


def extreme() -> np.ndarray:
    """Banned tokens, one that is as good as certain, all alike, and what a float ends with."""
    logits = noisy(2.0, 6)
    logits[0, ::2] = -np.inf
    logits[1, 5] = 1e30
    logits[2] = 0
    logits[3], logits[3, 7] = -np.inf, -4
    logits[4, :4] = [3e38, 3e38, -3e38, -3e38]
    logits[5, :3] = [88, -110, -104]  # exp(-192) is 0, and so is the next one but for its sign
    return logits


CASES = {
    "flat": noisy(0.01), "usual": noisy(2), "peaked": noisy(12), "far": noisy(60),
    "ties": tied(0.5), "more ties": tied(4), "extreme": extreme(),
}  # fmt: skip


def kept(logits: np.ndarray, options: dict[str, Any], way: bool) -> np.ndarray:
    """Log-probabilities behind the filters; way: by the one of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "fused_kernels", lambda: way)
        arrays = SamplingParams(temp=1.0, **options).arrays(V)
        return np.array(filters.restrict(mx.array(logits.astype(np.float32)), arrays))


@pytest.mark.parametrize("logits", CASES.values(), ids=CASES)
def test_a_sort_keeps_what_halving_keeps(logits: np.ndarray) -> None:
    """Fails where a tie is cut, and with ``<=`` in the place of ``<`` in the count of a mass. Sums
    are rounded, each way's in its own order: where they part, a mass must be the
    budget's."""
    for options in OPTIONS:
        new, old = (kept(logits, options, way) for way in (True, False))
        assert (new > -np.inf).any(-1).all()
        for row in np.flatnonzero((new != old).any(-1)):
            sizes = [mass(logits[row], found[row] > -np.inf) for found in (new, old)]
            assert np.abs(np.array(sizes) - options["top_p"]).min() < 1e-6, (options, row, sizes)
            assert not options.keys() - {"top_p"} and (new[row] != old[row]).sum() <= 1


def mass(logits: np.ndarray, kept: np.ndarray) -> float:
    """Of the tokens that are kept, in float64."""
    p = np.exp(logits - logits.max())
    return float(p[kept].sum() / p.sum())


def test_a_mass_is_reached_exactly() -> None:
    """Probabilities of 2**-k: the sums are exact, and a budget that one of them meets is met."""
    logits = np.full((1, V), -np.inf)
    logits[0, :4] = 0  # exp(-log 4) is 0.25 here
    logits[0, 4:8] = -90
    for way in (True, False):
        assert (kept(logits, {"top_p": 0.25}, way) > -np.inf).sum() == 4  # all that are alike
    logits[0, :4] = np.log([0.5, 0.25, 0.125, 0.125])
    for top_p, count in ((0.5, 1), (0.501, 2), (0.75, 2), (0.76, 4)):
        for way in (True, False):
            assert (kept(logits, {"top_p": top_p}, way) > -np.inf).sum() == count, (top_p, way)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = noisy(2.0)
    for options in OPTIONS:
        together = kept(logits, options, True)
        alone = np.concatenate([kept(row[None], options, True) for row in logits])
        assert np.array_equal(together, alone), options


@pytest.mark.parametrize("scale", [0.01, 2.0, 12.0])
def test_both_ways_are_right_up_to_rounding(scale: float) -> None:
    """Against float64, where a boundary is nowhere near."""
    logits = noisy(scale, 4)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, -1)
    mass = np.cumsum(np.take_along_axis(p, order, -1), -1)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        counts = (mass < top_p).sum(-1) + 1
        for way in (True, False):
            found = (kept(logits, {"top_p": top_p}, way) > -np.inf).sum(-1)
            assert np.abs(found - counts).max() <= (1 if scale == 0.01 else 0), (top_p, way)


def draw(logits: mx.array, options: dict[str, Any], seed: int, way: bool) -> list[int]:
    """A token of every row, each of another position."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "fused_kernels", lambda: way)
        params = SamplingParams(seed=seed, **options)
        rows = [
            sampling.sample(row[None], ROOT, {}, params.arrays(V), mx.array([i], mx.int32))
            for i, row in enumerate(logits)
        ]
        return [int(row.item()) for row in rows]


ROOT = root_only(mx.array([0], mx.int32))


@pytest.mark.slow
def test_ten_thousand_draws() -> None:
    """Mixtures of options, drawn by both ways: the same tokens."""
    rng, drawn, other = np.random.default_rng(5), 0, 0
    for seed in range(1250):
        options = dict(OPTIONS[seed % len(OPTIONS)], temp=float(rng.choice([0.5, 0.8, 1.3])))
        logits = mx.array((rng.standard_normal((8, V)) * rng.choice([1, 3, 8])).astype(np.float32))
        new, old = (draw(logits, options, seed, way) for way in (True, False))
        drawn, other = drawn + len(new), other + sum(a != b for a, b in zip(new, old, strict=True))
    assert (drawn, other) == (10_000, 0)
