"""Filters and penalties against mlx_lm's, the noise, and the errors of bad options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import vectorised
from mlx_redrafter.tree.nodes import DraftTree, root_only

V = 500
SCALES = {"flat": 0.01, "usual": 2.0, "peaked": 12.0, "extreme": 60.0}
FILTERS: dict[str, dict[str, Any]] = {
    "top_k-1": {"top_k": 1},
    "top_k-40": {"top_k": 40},
    "top_p-low": {"top_p": 0.05},
    "top_p": {"top_p": 0.9},
    "top_p-high": {"top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "min_p-1": {"min_p": 1.0},
    "min_p-tiny": {"min_p": 1e-6},
    "all": {"top_p": 0.9, "min_p": 0.02, "top_k": 30},
    "all-loose": {"top_p": 0.99, "min_p": 0.001, "top_k": 5},
}


def mlx_lm_filters(logp: mx.array, params: SamplingParams) -> mx.array:
    """In the order of mlx_lm's make_sampler."""
    if 0 < params.top_p < 1:
        logp = apply_top_p(logp, params.top_p)
    if params.min_p:
        logp = apply_min_p(logp, params.min_p)
    return apply_top_k(logp, params.top_k) if params.top_k else logp


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_kept_sets_equal_mlx_lm(options: dict[str, Any], scale: float) -> None:
    rng = np.random.default_rng(0)
    logits = mx.array((rng.standard_normal((16, V)) * scale + 3).astype(np.float32))
    params = SamplingParams(temp=1.0, **options)
    mine = np.array(sampling.restrict(logits, params.arrays(V)))
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    theirs = np.array(mlx_lm_filters(logp, params))
    kept = theirs > -np.inf
    assert np.array_equal(mine > -np.inf, kept), (kept.sum(-1), (mine > -np.inf).sum(-1))
    assert np.allclose(mine[kept], theirs[kept], atol=1e-4)
    assert kept.any(-1).all()


def test_top_k_keeps_what_equals_the_last() -> None:
    logits = mx.array([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]])
    kept = sampling.restrict(logits, SamplingParams(temp=1.0, top_k=2).arrays(6))[0] > -mx.inf
    assert kept.tolist() == [False, True, True, True, True, False]


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    logits = mx.array([[0.0, 2.0, 1.0]])
    arrays = SamplingParams(temp=1.0, top_k=50).arrays(3)
    assert mx.all(sampling.restrict(logits, arrays) > -mx.inf).item()


PENALTIES: list[dict[str, Any]] = [
    {"logit_bias": {3: 2.0, 7: -1.5}},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "repetition_context_size": 3},
    {"presence_penalty": 0.6, "presence_context_size": 8},
    {"presence_penalty": -0.6},
    {"frequency_penalty": 0.4, "frequency_context_size": 15},
    {
        "logit_bias": {0: -5.0}, "repetition_penalty": 1.5, "repetition_context_size": 11,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "frequency_context_size": 4,
    },
]  # fmt: skip


def settings(params: SamplingParams) -> dict[str, Any]:
    names = [n for n in SamplingParams.__dataclass_fields__ if "penalty" in n or "context" in n]
    return {name: getattr(params, name) for name in [*names, "logit_bias"]}


@pytest.mark.parametrize("options", PENALTIES)
def test_penalties_equal_mlx_lm(options: dict[str, Any]) -> None:
    """With more history than a window holds, exactly as much, less, and the least."""
    rng = np.random.default_rng(1)
    params, vocab = SamplingParams(**options), 12
    processors = make_logits_processors(**settings(params))
    for length in (1, 2, 4, 11, 20, 33):
        tokens = rng.integers(0, vocab, length).tolist()
        logits = mx.array(rng.standard_normal((1, vocab)).astype(np.float32) * 3)
        history = mx.array(tokens[:-1] + [0] * 10, mx.int32)
        tree, position = root_only(mx.array(tokens[-1:])), mx.array([length - 1], mx.int32)
        windows = {
            name: sampling.recent_tokens(tree, history, position, size)
            for name, size in params.windows
        }
        mine = sampling.penalise(logits, windows, params.arrays(vocab))
        theirs = mx.array(logits)
        for processor in processors:
            theirs = processor(mx.array(tokens), theirs)
        assert np.allclose(np.array(mine), np.array(theirs), atol=1e-5), length
        assert not np.allclose(np.array(mine), np.array(logits))


def test_recent_tokens_follow_every_nodes_own_path() -> None:
    """Root 50 at position 4; two children; a grandchild; a filler."""
    tree = DraftTree(
        mx.array([50, 51, 52, 53, -2], mx.int32),
        mx.array([0, 1, 1, 2, 1], mx.int32),
        mx.array(
            [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 0, 1]]
        ).astype(mx.bool_),
        mx.array(
            [[50, -1, -1, -1], [50, 51, -1, -1], [50, 52, -1, -1], [50, 52, 53, -1],
             [50, -2, -2, -2]], mx.int32,
        ),
    )  # fmt: skip
    history = mx.array([10, 11, 12, 13, 99, 99, 99, 99], mx.int32)
    position = mx.array([4], mx.int32)
    assert sampling.recent_tokens(tree, history, position, 3).tolist()[:4] == [
        [12, 13, 50], [13, 50, 51], [13, 50, 52], [50, 52, 53],
    ]  # fmt: skip
    assert sampling.recent_tokens(tree, history, position, 1).tolist() == [
        [50], [51], [52], [53], [-2],
    ]  # fmt: skip
    assert sampling.recent_tokens(tree, history, position, 8).tolist()[0] == [
        -1, -1, -1, 10, 11, 12, 13, 50,
    ]  # fmt: skip


def noise(seed: int, positions: Sequence[int], tokens: Sequence[int] = range(V)) -> np.ndarray:
    keys, at = mx.array([seed], mx.uint32), mx.array(list(positions), mx.int32)
    return np.array(drawn(keys, at, mx.array(list(tokens), mx.int32)))


def drawn(seed: mx.array, positions: mx.array, tokens: mx.array) -> mx.array:
    return sampling.gumbel(sampling.noise_keys(seed, positions), tokens)


@pytest.mark.bits
def test_compiled_noise_is_the_same() -> None:
    row, compiled = noise(7, [20])[0], mx.compile(drawn)
    for rows in ([20], [3, 20, 20, 9, 1]):
        args = mx.array([7], mx.uint32), mx.array(rows, mx.int32), mx.arange(V, dtype=mx.int32)
        assert np.array_equal(np.array(compiled(*args))[rows.index(20)], row)


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    row = noise(7, [20])[0]
    for start, count in [(20, 4), (18, 3), (15, 17), (4, 17)]:
        assert np.array_equal(noise(7, range(start, start + count))[20 - start], row)
    some = [5, V - 1, 0, 33]
    assert np.array_equal(noise(7, [20], some)[0], row[some])
    others = [noise(s, [p])[0] for s, p in [(7, 21), (8, 20), (20, 7), (2**32 - 1, 20), (0, 0)]]
    for other in others:
        assert abs(np.corrcoef(row, other)[0, 1]) < 0.2


def test_noise_is_gumbel() -> None:
    values = noise(3, range(8), range(50_000)).ravel()
    assert np.isfinite(values).all()
    for x in (-1.5, -0.5, 0.5, 2.0, 5.0):
        assert abs((values <= x).mean() - np.exp(-np.exp(-x))) < 0.004


def test_every_token_draws_its_own_noise() -> None:
    """The first tokens over many seeds and positions: uniform, and no two of them related."""
    seeds, at = mx.arange(20_000, dtype=mx.uint32), mx.arange(20_000, dtype=mx.int32) % 100
    values = np.array(drawn(seeds, at, mx.arange(8, dtype=mx.int32)))
    assert np.abs(np.corrcoef(values.T) - np.eye(8)).max() < 4.5 / 20_000**0.5
    for token in range(8):
        below = (values[:, token] <= 0.3665).mean()  # the median
        assert abs(below - 0.5) < 0.015, token


@pytest.mark.parametrize("vary", ["seed", "position", "token"])
def test_noise_is_independent_along_every_key(vary: str) -> None:
    """Uniform, and without memory, where one of the three keys counts up and the others stay."""
    n = 60_000
    if vary == "token":
        values = noise(12, [90], range(n))[0]
    elif vary == "position":
        values = noise(12, range(n), [17])[:, 0]
    else:
        seeds, at = mx.arange(n, dtype=mx.uint32), mx.full((n,), 90, mx.int32)
        values = np.array(drawn(seeds, at, mx.array([17], mx.int32)))[:, 0]
    uniform = np.exp(-np.exp(-values.astype(np.float64)))
    seen, _ = np.histogram(uniform, 100, (0, 1))
    assert ((seen - n / 100) ** 2 / (n / 100)).sum() < 149.4  # 1e-3 of chi-square with 99
    for lag in (1, 2, 3, 8, 64, 1024):
        pairs = np.corrcoef(uniform[:-lag], uniform[lag:])[0, 1]
        assert abs(pairs) < 4.5 / n**0.5, lag
    cells = (uniform[:-1] * 16).astype(int) * 16 + (uniform[1:] * 16).astype(int)
    seen = np.bincount(cells, minlength=256)
    assert ((seen - n / 256) ** 2 / (n / 256)).sum() < 330.5  # 1e-3 of chi-square with 255


def test_a_weak_hash_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_mixed", lambda x: x)
    with pytest.raises(AssertionError):
        test_noise_is_independent_along_every_key("token")


def test_the_logarithm_of_a_cpu() -> None:
    x = np.concatenate(
        [np.geomspace(2**-24, 20, 20_001), 1 - np.arange(1, 2000) * 2.0**-24]
    ).astype(np.float32)
    exact = np.log(x.astype(np.float64))
    assert np.allclose(np.array(vectorised.log(mx.array(x))), exact, rtol=3e-7, atol=0)


@pytest.mark.parametrize("temp", [0.001, 0.7, 1.0, 100.0])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_what_is_filtered_is_never_chosen(temp: float, scale: float) -> None:
    rng = np.random.default_rng(4)
    logits = mx.array((rng.standard_normal((64, V)) * scale).astype(np.float32))
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    positions = mx.arange(64, dtype=mx.int32)
    every = DraftTree(positions, positions, mx.eye(64, dtype=mx.bool_), positions[:, None])
    for options in FILTERS.values():
        params = SamplingParams(temp=temp, **options)
        chosen = sampling.sample(logits, every, {}, params.arrays(V), mx.array([9]))
        kept = mlx_lm_filters(logp, params) > -mx.inf
        assert mx.all(mx.take_along_axis(kept, chosen[:, None], -1)).item(), options


def test_options_that_are_off_cost_nothing() -> None:
    off = SamplingParams(
        temp=0.0, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=None, seed=9,
    )  # fmt: skip
    assert off.features == frozenset() and off.windows == () and off.arrays(V) == {}
    assert SamplingParams(temp=1.0, top_p=1.0).features == {"sample"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temp", -0.1), ("temp", float("nan")), ("temp", float("inf")), ("temp", 1e-9),
        ("top_p", 1.5), ("top_p", -0.5), ("top_p", float("nan")), ("top_k", -1), ("min_p", -0.1),
        ("min_p", 2.0), ("repetition_penalty", -1.0), ("repetition_penalty", float("inf")),
        ("presence_penalty", float("nan")), ("frequency_penalty", float("inf")),
        ("repetition_context_size", 0), ("presence_context_size", -5),
        ("frequency_context_size", 10**9), ("seed", -1), ("seed", 2**32),
        ("logit_bias", {3: float("nan")}), ("logit_bias", {3: float("inf")}),
    ],
)  # fmt: skip
def test_impossible_values(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=re.escape(name)) as caught:
        SamplingParams(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [-1, V])
def test_bias_beyond_the_vocabulary(token: int) -> None:
    with pytest.raises(OptionError, match=f"logit_bias token {token} is not possible: use 0 "):
        SamplingParams(logit_bias={token: 1.0}).arrays(V)


def test_values_of_other_types_become_plain_ones() -> None:
    given: Any = {
        "temp": np.float32(0.5), "top_k": 7.0, "seed": np.uint64(3), "min_p": mx.array(0.25),
        "repetition_context_size": np.int8(5),
        "logit_bias": {"3": np.float32(1.5), np.int64(4): float("-inf"), 5: mx.array(2)},
    }  # fmt: skip
    plain = SamplingParams(
        temp=0.5, top_k=7, seed=3, min_p=0.25, repetition_context_size=5,
        logit_bias={3: 1.5, 4: float("-inf"), 5: 2.0},
    )  # fmt: skip
    assert SamplingParams(**given) == plain
    values = [*vars(SamplingParams(**given)).values(), *plain.logit_bias.items()]  # type: ignore[union-attr]
    assert not any(isinstance(value, np.generic | mx.array) for value in values)


def test_every_range_has_one_style() -> None:
    """Every option refuses text and what is out of its range, and says what to use."""
    for name in SamplingParams.__dataclass_fields__:
        if name == "logit_bias":
            continue
        given: Any
        for given, said in (("x", "'x' is not a (whole )?number"), (1e12, "1e.?12|1000+")):
            with pytest.raises(OptionError, match=rf"^{name} ({said}).*: use -?[0-9]") as caught:
                SamplingParams(**{name: given})
            assert not str(caught.value).endswith(".")


def test_a_ban_holds_against_penalties_and_filters() -> None:
    logits = mx.array([[9.0, 1.0, 0.5, 8.0]])
    params = SamplingParams(
        temp=1.0, top_p=0.9, min_p=0.01, top_k=3, presence_penalty=-5.0, repetition_penalty=0.1,
        logit_bias={0: float("-inf"), 3: -1e300},
    )  # fmt: skip
    arrays, tree = params.arrays(4), root_only(mx.array([0]))
    windows = {name: mx.array([[0, 3, 0]]) for name, _ in params.windows}
    chosen = {
        sampling.sample(logits, tree, windows, arrays, mx.array([at])).item() for at in range(60)
    }
    assert chosen == {1, 2}
