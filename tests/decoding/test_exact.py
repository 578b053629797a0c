"""The one rule: drafting decides how many tokens come out of a pass, never which."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import (
    PENALTIES,
    RANKS,
    SHAPES,
    Constant,
    Oracle,
    V,
    assert_holds,
    engine_of,
    plainly,
    prompt_of,
    random_drafter,
    run,
    write_target,
)
from halves import half_slow
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from mlx_redrafter.cache import session as session_module
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

VARIANTS: dict[str, dict[str, Any]] = {
    "apple-sum": {"cell": "sum"},
    "apple-elman-projected": {"cell": "elman", "exit_dim": 24, "num_draft_layers": 2},
    "gru-target-head": {"cell": "gru", "head": "target"},
    "context-layers": {"cell": "gru", "context_layers": (0, 2), "num_draft_layers": 0},
    "reduced-own-head": {"draft_vocab_size": 40},
    "reduced-target-head": {"head": "target", "draft_vocab_size": 40, "exit_dim": 16},
}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top_k": {"top_k": 12},
    "top_p-min_p": {"top_p": 0.85, "min_p": 0.02},
    "all-filters": {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalties-bias": {
        "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4,
        "frequency_context_size": 9, "logit_bias": {5: 2.0, 9: -4.0},
    },
    "everything": {
        "top_p": 0.95, "top_k": 40, "min_p": 0.005, "repetition_penalty": 1.2,
        "repetition_context_size": 5, "presence_penalty": -0.3, "logit_bias": {11: 1.0},
    },
}  # fmt: skip


# --- greedy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_with_a_random_drafter_and_an_oracle(
    target: Decoder, texts: list[Any], oracle: Oracle, shape: TreeShape
) -> None:
    for drafter in (random_drafter(target), oracle):
        engine, stats = engine_of(target, drafter), DraftStats()
        for prompt, answer in texts:
            assert run(engine, prompt, None, shape, 40, stats=stats) == answer
        assert stats.tokens == 40 * len(texts) == stats.accepted + stats.steps
    if shape.depth:  # this text does not repeat itself
        assert stats.tokens_per_step > 1.7 and max(stats.histogram) >= 3


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_drafter(target: Decoder, texts: list[Any], config: dict[str, Any]) -> None:
    sampled = SamplingParams(temp=0.8, top_k=10, seed=3)
    drafter = random_drafter(target, **config)
    for compiled, params in ((True, SamplingParams()), (False, sampled)):
        engine = engine_of(target, drafter, compiled)
        for prompt, _ in texts[:3]:
            answer = plainly(target, prompt, 16, params)
            for name in ("chain", "beam-3x4-8", "beams-3x4-8"):
                assert run(engine, prompt, params, SHAPES[name], 16) == answer


def test_adversarial_drafters(target: Decoder, texts: list[Any]) -> None:
    """Wrong on purpose, no preference, two tokens only, infinities, NaN: never another token."""
    prompt, answer = texts[2]
    worst = Oracle(target, [prompt + answer], (Oracle.FAN - 1,))  # the right token comes last
    never = Oracle(target, [prompt + answer], (Oracle.FAN,))
    two = np.full(V, -np.inf)
    two[answer[:2]] = 0.0
    rows = [np.zeros(V), two, np.full(V, -np.inf), np.full(V, np.nan), np.full(V, np.inf)]
    sampled = SamplingParams(temp=1.0, seed=1)
    plain = plainly(target, prompt, 10, sampled)
    for drafter in (worst, never, *(Constant(target, row) for row in rows)):
        engine = engine_of(target, drafter, compiled=False)
        for name in ("chain", "beam-3x4-8", "beams-3x4-8"):
            assert run(engine, prompt, None, SHAPES[name], 10) == answer[:10]
            assert run(engine, prompt, sampled, SHAPES[name], 10) == plain


def test_fewer_draft_tokens_than_beams(target: Decoder, texts: list[Any]) -> None:
    """A beam wider than the drafter's vocabulary drafts what there is, or is refused in a line."""
    prompt, answer = texts[2]
    engine = engine_of(target, random_drafter(target, draft_vocab_size=3), compiled=False)
    with contextlib.suppress(OptionError):
        assert run(engine, prompt, None, TreeShape(4, 3, 8), 10) == answer[:10]


def test_greedy_equals_mlx_lm(mlx_lm_model: nn.Module, texts: list[Any]) -> None:
    for prompt, answer in texts:
        steps = generate_step(mx.array(prompt), mlx_lm_model, max_tokens=40)
        assert [token for token, _ in steps] == answer


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.4, "repetition_context_size": 7},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.1, "presence_context_size": 5},
        {"frequency_penalty": 0.7, "frequency_context_size": 50},
        {"logit_bias": {t: -9.0 if t < 50 else 1.0 for t in range(V)}},
        {name: getattr(PENALTIES, name) for name in PENALTIES.__dataclass_fields__},
    ],
    ids=["repetition", "reward", "presence", "frequency", "bias", "all"],
)
def test_penalties_equal_mlx_lm(
    target: Decoder, mlx_lm_model: nn.Module, texts: list[Any], changes: dict[str, Any]
) -> None:
    params = SamplingParams(**changes)
    names = [n for n in SamplingParams.__dataclass_fields__ if "penalty" in n or "context" in n]
    processors = make_logits_processors(
        params.logit_bias, **{name: getattr(params, name) for name in names}
    )
    for prompt, unpenalised in texts[1:]:
        steps = generate_step(
            mx.array(prompt), mlx_lm_model, max_tokens=30, logits_processors=processors
        )
        expected = [token for token, _ in steps]
        assert expected != unpenalised[:30]
        assert plainly(target, prompt, 30, params) == expected
        engine = engine_of(target, Oracle(target, [prompt + expected], RANKS), compiled=False)
        for name in ("chain", "beam-4x5-16", "beams-3x4-8"):
            assert run(engine, prompt, params, SHAPES[name], 30) == expected


# --- sampled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", half_slow(COMBINATIONS))
def test_sampled_with_and_without_drafting(target: Decoder, name: str) -> None:
    """6 combinations x 12 (prompt, temperature, seed) x 3 of 5 shapes: 216 drafted runs, and 72
    with a drafter that only guesses. The first shape is compiled; each has its turn to be."""
    options, turn = COMBINATIONS[name], list(COMBINATIONS).index(name)
    shapes = [list(SHAPES.values())[(turn + i) % len(SHAPES)] for i in (0, 1, 3)]
    rng = np.random.default_rng(turn)
    plain, runs = engine_of(target, None), []
    for i in range(12):
        params = SamplingParams(
            temp=float(rng.uniform(0.3, 1.2)), seed=int(rng.integers(2**32)), **options
        )
        prompt = prompt_of(int(rng.integers(1, 20)), seed=100 + i)
        runs.append((prompt, params, run(plain, prompt, params, None, 20)))
    assert len({tuple(answer) for *_, answer in runs}) == 12
    knower = Oracle(target, [p + a for p, _, a in runs], RANKS)
    stats = DraftStats()
    for shape in shapes:
        knowing = engine_of(target, knower, compiled=shape == shapes[0])
        for prompt, params, answer in runs:
            found = DraftStats()
            assert run(knowing, prompt, params, shape, 20, stats=found) == answer, (shape, params)
            if shape.depth:  # these texts do not repeat themselves
                stats.add(found)
    assert stats.tokens_per_step > 1.7
    guessing = engine_of(target, random_drafter(target), compiled=False)
    for prompt, params, answer in runs:
        assert run(guessing, prompt, params, shapes[0], 20) == answer, params


def test_sampled_tokens_are_the_rule_on_mlx_lms_distribution(
    target: Decoder, mlx_lm_model: nn.Module
) -> None:
    """argmax(filters(log p) / temp + gumbel(seed, position)) with nothing of ours but the noise."""
    for i, options in enumerate(COMBINATIONS.values()):
        params = SamplingParams(temp=0.5 + 0.1 * i, seed=11 * i, **options)
        names = [n for n in SamplingParams.__dataclass_fields__ if "penalty" in n or "context" in n]
        processors = make_logits_processors(
            params.logit_bias, **{name: getattr(params, name) for name in names}
        )
        tokens = prompt_of(5, seed=i)
        answer = run(engine_of(target, None), tokens, params, None, 12)
        for token in answer:
            logits = mlx_lm_model(mx.array([tokens]))[:, -1]
            for processor in processors:
                logits = processor(mx.array(tokens), logits)
            logp = logits - mx.logsumexp(logits, keepdims=True)
            if params.top_p:
                logp = apply_top_p(logp, params.top_p)
            if params.min_p:
                logp = apply_min_p(logp, params.min_p)
            if params.top_k:
                logp = apply_top_k(logp, params.top_k)
            seed, at = mx.array([params.seed], mx.uint32), mx.array([len(tokens)], mx.int32)
            noise = sampling.gumbel(sampling.noise_keys(seed, at), mx.arange(V, dtype=mx.int32))[0]
            assert token == mx.argmax(logp[0] / params.temp + noise).item()
            tokens.append(token)


def test_seed_and_position_matter(target: Decoder) -> None:
    engine = engine_of(target, None)
    prompt = prompt_of(6)
    answers = [run(engine, prompt, SamplingParams(temp=1.0, seed=s), None, 12) for s in range(8)]
    assert len({tuple(a) for a in answers}) == 8
    assert run(engine, prompt, SamplingParams(temp=1.0, seed=3), None, 12) == answers[3]


def test_uncompiled_is_the_same(target: Decoder, texts: list[Any], oracle: Oracle) -> None:
    prompt, answer = texts[2]
    engine = engine_of(target, oracle, compiled=False)
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 40) == answer


# --- limits and growth ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TreeShape.plain(), *SHAPES.values()], ids=["plain", *SHAPES])
@pytest.mark.parametrize("params", [SamplingParams(), PENALTIES], ids=["greedy", "penalties"])
def test_cache_grows_in_mid_answer(
    target: Decoder, monkeypatch: pytest.MonkeyPatch, shape: TreeShape, params: SamplingParams
) -> None:
    """The same answer whether the slabs grow (256 -> 384) during it or were large at first."""
    prompt = prompt_of(200)
    answer = plainly(target, prompt, 70, params)
    sizes, new_caches = [], session_module.new_caches

    def recorded(kinds: Any, capacity: int, dtype: mx.Dtype) -> list[mx.array]:
        sizes.append(capacity)
        return new_caches(kinds, capacity, dtype)

    # Penalties compile many kernels of their own, so with them one shape is compiled.
    compiled = params != PENALTIES or shape == SHAPES["beam-4x5-16"]
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS), compiled)
    monkeypatch.setattr(session_module, "new_caches", recorded)
    session = Session()
    assert run(engine, prompt, params, shape, 70, session) == answer
    assert sizes == [256] and session.caches[0].shape[2] == 384
    assert_holds(session, target, (prompt + answer)[:-1])


@pytest.mark.parametrize("shape", [TreeShape.plain(), *SHAPES.values()], ids=["plain", *SHAPES])
def test_max_tokens_cuts_anywhere(target: Decoder, texts: list[Any], shape: TreeShape) -> None:
    prompt, answer = texts[2]
    engine = engine_of(target, Oracle(target, [prompt + answer]))
    for n in range(1, 14):
        stats, session = DraftStats(), Session()
        assert run(engine, prompt, None, shape, n, session, stats) == answer[:n]
        assert stats.tokens == n
        assert_holds(session, target, (prompt + answer[:n])[:-1])


@pytest.mark.parametrize("shape", [TreeShape.plain(), *SHAPES.values()], ids=["plain", *SHAPES])
def test_context_end(
    target: Decoder, target_folder: Path, tmp_path: Path, texts: list[Any], shape: TreeShape
) -> None:
    short = load_model(write_target(tmp_path, max_position_embeddings=40))
    prompt, answer = texts[3]
    engine = engine_of(short, Oracle(short, [prompt + answer]))
    assert run(engine, prompt, None, shape, 1000) == answer[:20]
    long = prompt + answer[:19]
    assert run(engine, long, None, shape, 1000) == answer[19:20]
    with pytest.raises(OptionError, match="40"):
        run(engine, prompt + answer[:20], None, shape, 5)


@pytest.mark.parametrize(
    ("prompt", "n", "said"),
    [([], 5, "empty"), ([1, V], 5, "vocabulary"), ([-1], 5, "vocabulary"), ([1], 0, "max_tokens")],
)
def test_impossible_requests(target: Decoder, prompt: list[int], n: int, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        plainly(target, prompt, n)


def test_prompt_chunks_do_not_matter(target: Decoder, texts: list[Any], oracle: Oracle) -> None:
    prompt, answer = texts[4]
    engine = engine_of(target, oracle)
    for size in (1, 7, 32, 33):
        seen: list[tuple[int, int]] = []
        tokens = run(
            engine, prompt, None, SHAPES["beam-3x4-8"], 12,
            step_size=size, progress=lambda *a, seen=seen: seen.append(a),
        )  # fmt: skip
        assert tokens == answer[:12]
        assert seen[0] == (0, len(prompt)) and seen[-1] == (len(prompt), len(prompt))


def test_sliding_window_target(tmp_path: Path) -> None:
    """A window of 3 tokens, shorter than a draft, in half of the layers."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    target = load_model(write_target(tmp_path, layer_types=types, sliding_window=3))
    prompt = prompt_of(12, seed=5)
    answer = plainly(target, prompt, 40)
    engine, stats = engine_of(target, Oracle(target, [prompt + answer], RANKS)), DraftStats()
    for shape in SHAPES.values():
        assert run(engine, prompt, None, shape, 40, stats=stats) == answer
    assert stats.tokens_per_step > 1.7
