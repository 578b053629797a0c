"""The one rule: drafting decides how many tokens come out of a pass, never which."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import Constant, Oracle, V, prompt_of, random_drafter, run, write_target
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding import step as step_module
from mlx_redrafter.decoding.engine import Engine, Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.decoding.tree import DraftTree, TreeShape
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, DecoderConfig, cache, load_model
from mlx_redrafter.stats import DraftStats

SHAPES = {
    "chain": TreeShape.chain(4),
    "beam-3x4-8": TreeShape(3, 4, 8),
    "beam-4x5-16": TreeShape(4, 5, 16),
    "beams-3x4-8": TreeShape(3, 4, 8, "beams"),
    "beams-all": TreeShape(3, 3, 10, "beams"),
}
# The right token is first, second or third choice, or none: long runs, side branches, rejections.
RANKS = (0, 1, 0, 0, 2, 0, 0, 0, 1, 9, 0)
VARIANTS: dict[str, dict[str, Any]] = {
    "apple-sum": {"cell": "sum"},
    "apple-elman-projected": {"cell": "elman", "exit_dim": 24, "num_draft_layers": 2},
    "gru-target-head": {"cell": "gru", "head": "target"},
    "context-layers": {"cell": "gru", "context_layers": (0, 2), "num_draft_layers": 0},
    "reduced-own-head": {"draft_vocab_size": 40},
    "reduced-target-head": {"head": "target", "draft_vocab_size": 40, "exit_dim": 16},
}
PENALTIES = SamplingParams(
    repetition_penalty=1.4, repetition_context_size=7, presence_penalty=0.8,
    presence_context_size=30, frequency_penalty=0.6, frequency_context_size=12,
    logit_bias={3: 2.5, 40: -3.0},
)  # fmt: skip
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


def plainly(
    target: Decoder, prompt: list[int], n: int = 24, params: SamplingParams | None = None
) -> list[int]:
    """The answer without a drafter; uncompiled, which for a few tokens is quicker."""
    return run(Engine(target, None, compiled=False), prompt, params, None, n)


@pytest.fixture(scope="module")
def texts(target: Decoder) -> list[tuple[list[int], list[int]]]:
    """A few prompts and their plain greedy answers."""
    prompts = [prompt_of(n, seed=n) for n in (2, 3, 9, 20, 33)]
    return [(prompt, plainly(target, prompt, 40)) for prompt in prompts]


@pytest.fixture(scope="module")
def oracle(target: Decoder, texts: list[tuple[list[int], list[int]]]) -> Oracle:
    return Oracle(target, [p + a for p, a in texts], RANKS)


# --- greedy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_with_a_random_drafter_and_an_oracle(
    target: Decoder, texts: list[Any], oracle: Oracle, shape: TreeShape
) -> None:
    for drafter in (random_drafter(target), oracle):
        engine, stats = Engine(target, drafter), DraftStats()
        for prompt, answer in texts:
            assert run(engine, prompt, None, shape, 40, stats=stats) == answer
        assert stats.tokens == 40 * len(texts) == stats.accepted + stats.steps
    assert stats.tokens_per_step > 1.7 and max(stats.histogram) >= 3


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_drafter(target: Decoder, texts: list[Any], config: dict[str, Any]) -> None:
    sampled = SamplingParams(temp=0.8, top_k=10, seed=3)
    drafter = random_drafter(target, **config)
    for compiled, params in ((True, SamplingParams()), (False, sampled)):
        engine = Engine(target, drafter, compiled)
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
    plain = run(Engine(target, None), prompt, sampled, None, 10)
    for drafter in (worst, never, *(Constant(target, row) for row in rows)):
        engine = Engine(target, drafter, compiled=False)
        for name in ("chain", "beam-3x4-8", "beams-3x4-8"):
            assert run(engine, prompt, None, SHAPES[name], 10) == answer[:10]
            assert run(engine, prompt, sampled, SHAPES[name], 10) == plain


def test_fewer_draft_tokens_than_beams(target: Decoder, texts: list[Any]) -> None:
    """A beam wider than the drafter's vocabulary drafts what there is, or is refused in a line."""
    prompt, answer = texts[2]
    engine = Engine(target, random_drafter(target, draft_vocab_size=3), compiled=False)
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
        assert run(Engine(target, None), prompt, params, None, 30) == expected
        engine = Engine(target, Oracle(target, [prompt + expected], RANKS), compiled=False)
        for name in ("chain", "beam-4x5-16", "beams-3x4-8"):
            assert run(engine, prompt, params, SHAPES[name], 30) == expected


# --- sampled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMBINATIONS)
def test_sampled_with_and_without_drafting(target: Decoder, name: str) -> None:
    """6 combinations x 12 (prompt, temperature, seed) x 3 of 5 shapes: 216 drafted runs, and 72
    with a drafter that only guesses."""
    options, turn = COMBINATIONS[name], list(COMBINATIONS).index(name)
    shapes = [list(SHAPES.values())[(turn + i) % 5] for i in (0, 1, 3)]
    rng = np.random.default_rng(turn)
    plain, runs = Engine(target, None), []
    for i in range(12):
        params = SamplingParams(
            temp=float(rng.uniform(0.3, 1.2)), seed=int(rng.integers(2**32)), **options
        )
        prompt = prompt_of(int(rng.integers(1, 20)), seed=100 + i)
        runs.append((prompt, params, run(plain, prompt, params, None, 20)))
    assert len({tuple(answer) for *_, answer in runs}) == 12
    knowing = Engine(target, Oracle(target, [p + a for p, _, a in runs], RANKS))
    stats = DraftStats()
    for shape in shapes:
        for prompt, params, answer in runs:
            assert run(knowing, prompt, params, shape, 20, stats=stats) == answer, (shape, params)
    assert stats.tokens_per_step > 1.7
    guessing = Engine(target, random_drafter(target))
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
        answer = run(Engine(target, None), tokens, params, None, 12)
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
            key = mx.array([params.seed, len(tokens)], mx.uint32)
            noise = mx.random.gumbel((V,), key=key)
            assert token == mx.argmax(logp[0] / params.temp + noise).item()
            tokens.append(token)


def test_seed_and_position_matter(target: Decoder) -> None:
    engine = Engine(target, None)
    prompt = prompt_of(6)
    answers = [run(engine, prompt, SamplingParams(temp=1.0, seed=s), None, 12) for s in range(8)]
    assert len({tuple(a) for a in answers}) == 8
    assert run(engine, prompt, SamplingParams(temp=1.0, seed=3), None, 12) == answers[3]


def test_uncompiled_is_the_same(target: Decoder, texts: list[Any], oracle: Oracle) -> None:
    prompt, answer = texts[2]
    engine = Engine(target, oracle, compiled=False)
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 40) == answer


# --- limits and growth ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TreeShape.plain(), *SHAPES.values()], ids=["plain", *SHAPES])
@pytest.mark.parametrize("params", [SamplingParams(), PENALTIES], ids=["greedy", "penalties"])
def test_cache_grows_in_mid_answer(
    target: Decoder, monkeypatch: pytest.MonkeyPatch, shape: TreeShape, params: SamplingParams
) -> None:
    """The same answer whether the slabs grow (256 -> 384) during it or were large at first."""
    prompt = prompt_of(200)
    answer = run(Engine(target, None), prompt, params, None, 70)
    sizes, new_cache = [], cache.new_cache

    def recorded(config: DecoderConfig, capacity: int, dtype: mx.Dtype) -> list[mx.array]:
        sizes.append(capacity)
        return new_cache(config, capacity, dtype)

    engine = Engine(target, Oracle(target, [prompt + answer], RANKS))
    monkeypatch.setattr(cache, "new_cache", recorded)
    session = Session()
    assert run(engine, prompt, params, shape, 70, session) == answer
    assert sizes == [256] and session.kv[0].shape[2] == 384
    assert_holds(session, target, (prompt + answer)[:-1])


@pytest.mark.parametrize("shape", [TreeShape.plain(), *SHAPES.values()], ids=["plain", *SHAPES])
def test_max_tokens_cuts_anywhere(target: Decoder, texts: list[Any], shape: TreeShape) -> None:
    prompt, answer = texts[2]
    engine = Engine(target, Oracle(target, [prompt + answer]))
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
    engine = Engine(short, Oracle(short, [prompt + answer]))
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
        run(Engine(target, None), prompt, max_tokens=n)


def test_prompt_chunks_do_not_matter(target: Decoder, texts: list[Any], oracle: Oracle) -> None:
    prompt, answer = texts[4]
    engine = Engine(target, oracle)
    for size in (1, 7, 32, 33):
        seen: list[tuple[int, int]] = []
        tokens = run(
            engine, prompt, None, SHAPES["beam-3x4-8"], 12,
            prefill_step_size=size, progress=lambda *a, seen=seen: seen.append(a),
        )  # fmt: skip
        assert tokens == answer[:12]
        assert seen[0] == (0, len(prompt)) and seen[-1] == (len(prompt), len(prompt))


def test_sliding_window_target(tmp_path: Path) -> None:
    """A window of 3 tokens, shorter than a draft, in half of the layers."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    target = load_model(write_target(tmp_path, layer_types=types, sliding_window=3))
    prompt = prompt_of(12, seed=5)
    answer = plainly(target, prompt, 40)
    engine, stats = Engine(target, Oracle(target, [prompt + answer], RANKS)), DraftStats()
    for shape in SHAPES.values():
        assert run(engine, prompt, None, shape, 40, stats=stats) == answer
    assert stats.tokens_per_step > 1.7


# --- sessions ---------------------------------------------------------------------------------


def assert_holds(session: Session, target: Decoder, tokens: list[int]) -> None:
    """The session says it holds ``tokens``, and its slabs are those of reading them afresh."""
    assert session.tokens == tokens
    fresh = Session()
    run(Engine(target, None), [*tokens, 0], max_tokens=1, session=fresh)
    for mine, theirs in zip(session.kv, fresh.kv, strict=True):
        rows = np.array(mine)[:, :, : len(tokens)], np.array(theirs)[:, :, : len(tokens)]
        assert np.allclose(*rows, atol=1e-4)


@pytest.mark.parametrize("shape", [TreeShape.plain(), *SHAPES.values()], ids=["plain", *SHAPES])
def test_second_turn_equals_a_fresh_run(
    target: Decoder, texts: list[Any], oracle: Oracle, shape: TreeShape
) -> None:
    prompt, answer = texts[2]
    engine, session = Engine(target, oracle), Session()
    run(engine, prompt, None, shape, 17, session)
    assert_holds(session, target, prompt + answer[:16])
    turns = [
        prompt + answer[:17] + prompt_of(5, seed=1),  # goes on
        prompt + answer[:17] + prompt_of(5, seed=1),  # all of it is known
        prompt + answer[:8],  # shorter than what is known
        prompt[:4] + prompt_of(6, seed=2),  # another ending
        prompt_of(4, seed=3),  # nothing in common
        prompt[:1],
    ]
    for turn in turns:
        for params in (SamplingParams(), PENALTIES, SamplingParams(temp=0.9, seed=7)):
            read: list[int] = []
            expected = plainly(target, turn, 12, params)
            shared = min(len(turn) - 2, len(session.tokens))
            known = session.tokens[:shared] == turn[:shared]
            tokens = run(
                engine, turn, params, shape, 12, session,
                progress=lambda done, _, read=read: read.append(done),
            )  # fmt: skip
            assert tokens == expected
            if known and shared > 0:
                assert read[0] == shared  # what is known is not read again
            assert_holds(session, target, (turn + expected)[: len(turn) + 11])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_session_after_leaving_early(target: Decoder, texts: list[Any], shape: TreeShape) -> None:
    """Closed between steps, or thrown at: only tokens that were yielded are in the session."""
    prompt, answer = texts[2]
    engine = Engine(target, Oracle(target, [prompt + answer], RANKS))

    def close(steps: Iterator[Any]) -> None:
        steps.close()  # type: ignore[attr-defined]

    def interrupt(steps: Iterator[Any]) -> None:
        with pytest.raises(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt())  # type: ignore[attr-defined]

    leaves: list[Callable[[Iterator[Any]], None]] = [close, interrupt]
    for leave in leaves:
        for after in (1, 2, 5):
            session, tokens = Session(), []
            steps = engine.generate(prompt, SamplingParams(), shape, 40, session=session)
            for _ in range(after):
                tokens += next(steps).tokens
            leave(steps)
            assert tokens == answer[: len(tokens)]
            assert_holds(session, target, (prompt + tokens)[:-1])
            again = prompt + tokens + prompt_of(3, seed=4)
            assert run(engine, again, None, shape, 12, session) == plainly(target, again, 12)


def test_session_after_an_interrupt_while_waiting(
    target: Decoder, texts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C inside the engine, when a step has been launched and its tokens not yet read."""
    prompt, answer = texts[2]
    engine, session = Engine(target, Oracle(target, [prompt + answer], RANKS)), Session()
    shape = SHAPES["beam-3x4-8"]
    tokens: list[int] = []
    steps = engine.generate(prompt, SamplingParams(), shape, 40, session=session)
    tokens += next(steps).tokens
    real = mx.async_eval

    def interrupted(*arrays: Any) -> None:
        real(*arrays)
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "async_eval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    monkeypatch.undo()
    assert_holds(session, target, (prompt + tokens)[:-1])
    again = prompt + tokens + prompt_of(3, seed=4)
    assert run(engine, again, None, shape, 12, session) == plainly(target, again, 12)


def test_session_after_an_interrupt_in_the_prompt(target: Decoder) -> None:
    prompt, session = prompt_of(40), Session()

    def progress(done: int, _: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    engine = Engine(target, random_drafter(target))
    with pytest.raises(KeyboardInterrupt):
        run(
            engine, prompt, None, SHAPES["chain"], 5, session,
            prefill_step_size=8, progress=progress,
        )  # fmt: skip
    assert session.tokens == prompt[:16]
    for turn in ([*prompt[:20], 3, 4], prompt):
        assert run(engine, turn, None, SHAPES["chain"], 9, session) == plainly(target, turn, 9)


def test_session_trimmed_inside_an_accepted_run(
    target: Decoder, texts: list[Any], oracle: Oracle
) -> None:
    prompt, answer = texts[2]
    engine, shape = Engine(target, oracle), SHAPES["beam-4x5-16"]
    for kept in range(1, 9):
        session = Session()
        run(engine, prompt, None, shape, 12, session)
        session.trim(len(prompt) + kept)
        again = prompt + answer[:kept] + prompt_of(4, seed=kept)
        assert run(engine, again, None, shape, 9, session) == plainly(target, again, 9)


def test_session_with_drafting_switched_on_and_off(
    target: Decoder, texts: list[Any], oracle: Oracle
) -> None:
    """Turns drafted differently, by other drafters too, in one session that grows."""
    engines = [Engine(target, oracle), Engine(target, None), Engine(target, random_drafter(target))]
    shapes = [*SHAPES.values(), TreeShape.plain()]
    params = [SamplingParams(), SamplingParams(temp=0.7, seed=2), PENALTIES]
    session, turn = Session(), list(texts[1][0])
    for i in range(14):
        chosen = params[i % 3]
        expected = plainly(target, turn, 20, chosen)
        assert run(engines[i % 3], turn, chosen, shapes[i % 6], 20, session) == expected, i
        turn += expected + prompt_of(2, seed=i)
    assert session.kv[0].shape[2] >= 384


# --- the checks above can fail ----------------------------------------------------------------


def drafted_differently(target: Decoder, params: SamplingParams, shape: TreeShape) -> int:
    """How many of five answers change when they are drafted (0 is the rule)."""
    plain = Engine(target, None)
    prompts = [prompt_of(4 + i, seed=50 + i) for i in range(5)]
    runs = [(prompt, run(plain, prompt, params, None, 24)) for prompt in prompts]
    engine = Engine(target, Oracle(target, [p + a for p, a in runs], RANKS), compiled=False)
    return sum(run(engine, p, params, shape, 24) != a for p, a in runs)


def eager_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepts one node more than the target's choices match."""
    walk = step_module.walk

    def mutated(tree: DraftTree, choices: mx.array, depth: int) -> tuple[mx.array, mx.array]:
        path, count = walk(tree, choices, depth)
        last = mx.take(path, count - 1)
        n = tree.tokens.shape[0]
        child = (tree.parents == last) & (mx.arange(n) > 0) & (tree.tokens >= 0)
        more = mx.any(child).reshape(1)
        longer = mx.arange(depth + 1) == count
        path = mx.where(longer & more, mx.argmax(child).astype(mx.int32), path)
        return path, count + more.astype(mx.int32)

    monkeypatch.setattr(step_module, "walk", mutated)


def penalties_without_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recent tokens are those of the root for every node."""
    recent = sampling.recent_tokens

    def mutated(tree: DraftTree, *rest: Any) -> mx.array:
        first = mx.arange(tree.tokens.shape[0]) == 0
        return recent(tree._replace(tokens=mx.where(first, tree.tokens, -1)), *rest)

    monkeypatch.setattr(sampling, "recent_tokens", mutated)


def noise_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = sampling.choose

    def mutated(
        logits: mx.array, tree: DraftTree, windows: Any, arrays: Any, noise: mx.array
    ) -> mx.array:
        slots = mx.arange(tree.depths.shape[0], dtype=mx.int32)
        tree = tree._replace(depths=mx.minimum(slots, noise.shape[0] - 1))
        return choose(logits, tree, windows, arrays, noise)

    monkeypatch.setattr(sampling, "choose", mutated)


def verify_another_tree(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[DraftTree], DraftTree]
) -> None:
    verify = step_module.verify
    monkeypatch.setattr(
        step_module, "verify", lambda target, tree, *rest: verify(target, change(tree), *rest)
    )


def siblings_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tree: DraftTree) -> DraftTree:
        slots = mx.arange(tree.tokens.shape[0])
        return tree._replace(ancestors=slots[:, None] >= slots[None])

    verify_another_tree(monkeypatch, change)


def ancestors_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tree: DraftTree) -> DraftTree:
        return tree._replace(ancestors=mx.eye(tree.tokens.shape[0], dtype=mx.bool_))

    verify_another_tree(monkeypatch, change)


def depth_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_another_tree(monkeypatch, lambda tree: tree._replace(depths=mx.zeros_like(tree.depths)))


def slots_as_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tree: DraftTree) -> DraftTree:
        return tree._replace(depths=mx.arange(tree.tokens.shape[0], dtype=mx.int32))

    verify_another_tree(monkeypatch, change)


def rows_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class InTreeOrder(cache.Commit):
        def __init__(self, offset: mx.array, picks: mx.array, pending: list[mx.array]) -> None:
            unmoved = mx.arange(picks.shape[0])
            picks = mx.where(picks < pending[0].shape[2], unmoved, picks)
            super().__init__(offset, picks, pending)

    monkeypatch.setattr(cache, "Commit", InTreeOrder)


GREEDY, SAMPLED = SamplingParams(), SamplingParams(temp=1.0, seed=9)
MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], SamplingParams]] = {
    "walk-accepts-one-more": (eager_walk, GREEDY),
    "penalties-ignore-the-path": (penalties_without_path, PENALTIES),
    "noise-keyed-by-node": (noise_by_node, SAMPLED),
    "mask-shows-siblings": (siblings_visible, GREEDY),
    "mask-hides-ancestors": (ancestors_hidden, GREEDY),
    "positions-ignore-depth": (depth_ignored, GREEDY),
    "positions-are-slots": (slots_as_depths, GREEDY),
    "rows-are-not-moved": (rows_left_behind, GREEDY),
}


@pytest.mark.parametrize("shape", ["beam-3x4-8", "beam-4x5-16"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALTIES], ids=["greedy", "sampled", "all"])
def test_unchanged_nothing_is_caught(target: Decoder, params: SamplingParams, shape: str) -> None:
    assert drafted_differently(target, params, SHAPES[shape]) == 0


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("shape", ["beam-3x4-8", "beam-4x5-16"])
def test_mutations_are_caught(
    target: Decoder, monkeypatch: pytest.MonkeyPatch, name: str, shape: str
) -> None:
    mutate, params = MUTATIONS[name]
    mutate(monkeypatch)
    assert drafted_differently(target, params, SHAPES[shape]) > 0


def test_a_drafter_is_used_at_all(target: Decoder) -> None:
    """Guards the guards: the drafter's context follows the accepted path."""

    class Blind(Oracle):
        def context(self, hidden: mx.array, inner: tuple[mx.array, ...]) -> mx.array:
            return mx.zeros_like(hidden)

    prompt = prompt_of(9)
    answer = plainly(target, prompt, 30)
    steps = {}
    drafters: list[type[Drafter]] = [Oracle, Blind]
    for kind in drafters:
        stats = DraftStats()
        engine = Engine(target, kind(target, [prompt + answer]))  # type: ignore[call-arg]
        assert run(engine, prompt, None, TreeShape.chain(4), 30, stats=stats) == answer
        steps[kind] = stats.steps
    assert steps[Oracle] == 6 and steps[Blind] > 12
