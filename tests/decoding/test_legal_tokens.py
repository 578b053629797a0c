"""Answers that follow a grammar are the same drafted and plain, and what the rule says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from conftest import (
    PENALTIES,
    RANKS,
    Oracle,
    asked,
    assert_holds,
    engine_of,
    plainly,
    prompt_of,
    run,
)  # fmt: skip
from eagle_fitted import plain_head
from every_kind import target_of
from fake_grammar import END, Drawn
from fitted_drafters import heads
from tiny_eagle import loaded as load_eagle

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding import grammar as rule
from mlx_redrafter.decoding.answering import Answering
from mlx_redrafter.decoding.batch import Batch, Row
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters.loading import load_drafter
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.nodes import root_only
from mlx_redrafter.tree.shape import TreeShape

V = 97
SHAPES = (
    TreeShape.chain(3), TreeShape(3, 4, 8), TreeShape(1, 0, 6, lookup=5),
    TreeShape(3, 3, 9, lookup=6),
)  # fmt: skip
SAMPLING = (
    SamplingParams(), SamplingParams(temp=0.8, seed=3), SamplingParams(temp=1.2, top_k=4, seed=8),
    PENALTIES, SamplingParams(temp=0.7, top_p=0.5, repetition_penalty=1.3, seed=1),
)  # fmt: skip
PROMPTS = [prompt_of(5 + 7 * i, seed=80 + i) for i in range(4)]
CASES = [(i, j, Drawn(V, 10 * i + j, share=0.9)) for i in range(2) for j in range(len(SAMPLING))]


@pytest.fixture(scope="module")
def plain(target: Decoder) -> list[list[int]]:
    """What plain decoding says of every case."""
    engine = engine_of(target, None, compiled=False)
    return [run(engine, PROMPTS[i], SAMPLING[j], grammar=grammar) for i, j, grammar in CASES]


@pytest.fixture(scope="module")
def engine(target: Decoder, plain: list[list[int]]) -> Engine:
    texts = [PROMPTS[i] + answer for (i, _, _), answer in zip(CASES, plain, strict=True)]
    return engine_of(target, Oracle(target, texts, RANKS), compiled=False)


def wrong(engine: Engine, plain: list[list[int]], shape: TreeShape) -> int:
    """How many of the first answers, as many as are given, are others."""
    cases = CASES[: len(plain)]
    found = [run(engine, PROMPTS[i], SAMPLING[j], shape, grammar=g) for i, j, g in cases]
    return sum(a != b for a, b in zip(found, plain, strict=True))


def test_plain_answers_are_what_the_rule_says(target: Decoder, plain: list[list[int]]) -> None:
    """Token for token: what is chosen without a mask if it is legal, else the likeliest of all that
    are legal, with the noise of its place."""
    engine, seen = engine_of(target, None, compiled=False), [0, 0]
    for (i, j, grammar), answer in list(zip(CASES, plain, strict=True))[:4]:
        if SAMPLING[j].top_k:
            continue
        for k, token in enumerate(answer[:12]):
            legal, before = grammar.legal(answer[:k]), PROMPTS[i] + answer[:k]
            assert token in legal
            (free,) = run(engine, before, SAMPLING[j], max_tokens=1)
            if free not in legal:
                banned = {t: -math.inf for t in range(V) if t not in legal}
                (free,) = run(engine, before, replace(SAMPLING[j], logit_bias=banned), None, 1)
                seen[1] += 1
            seen[0] += 1
            assert token == free
    assert 0 < seen[1] < seen[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_drafted_is_plain(engine: Engine, plain: list[list[int]], shape: TreeShape) -> None:
    assert wrong(engine, plain, shape) == 0


def test_certain_tokens_and_drafts_save_steps(engine: Engine, plain: list[list[int]]) -> None:
    for name, case in (("certain", TreeShape.plain()), ("drafted", TreeShape(3, 4, 8))):
        stats = DraftStats()
        for i, j, grammar in CASES:
            run(engine, PROMPTS[i], SAMPLING[j], case, grammar=grammar, stats=stats)
        assert stats.tokens == sum(map(len, plain))
        assert stats.tokens_per_step > 1.2, name
        assert any("certain" in shape for shape in stats.shapes)


def test_a_session_goes_on(engine: Engine, plain: list[list[int]], target: Decoder) -> None:
    """What an answer leaves, wherever its last choice was made again, is what reading it leaves."""
    for length in (1, 5, 9, 24):
        session, grammar = Session(), CASES[0][2]
        found = run(engine, PROMPTS[0], None, SHAPES[1], length, session, grammar=grammar)
        assert found == plain[0][:length]
        kept = len(session.tokens)
        assert len(PROMPTS[0]) - 1 <= kept <= len(PROMPTS[0]) + len(found) - 1
        assert_holds(session, target, [*PROMPTS[0], *found][:kept])
        more = [*PROMPTS[0], *found, 5, 6]
        assert run(engine, more, None, SHAPES[1], 8, session) == plainly(target, more, 8)


def together(engine: Engine, plain: list[list[int]], free: list[list[int]]) -> int:
    """Answers with a grammar and without that run together: how many are not theirs alone."""
    batch, found = Batch(engine), dict[Row, list[int]]()
    for number, (i, j, grammar) in enumerate(CASES):
        found[batch.add(asked(PROMPTS[i], SAMPLING[j], SHAPES[number % 4], grammar=grammar))] = []
        if number < len(free):
            found[batch.add(asked(PROMPTS[number], SAMPLING[number], SHAPES[1], 40))] = []
    while batch.rows or batch.waiting:
        for row, emitted in batch.step():
            found[row] += emitted.tokens
    wanted = []
    for number, answer in enumerate(plain):
        wanted += [answer, free[number]] if number < len(free) else [answer]
    return sum(a != b for a, b in zip(found.values(), wanted, strict=True))


@pytest.fixture(scope="module")
def free(target: Decoder) -> list[list[int]]:
    return [plainly(target, PROMPTS[i], 40, SAMPLING[i]) for i in range(3)]


def test_in_company(engine: Engine, plain: list[list[int]], free: list[list[int]]) -> None:
    """Free neighbours end later, and are a step ahead again then."""
    assert together(engine, plain, free) == 0


def test_a_grammar_that_cannot_be_followed_ends_one_answer(
    engine: Engine, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, tokens = Batch(engine), list[int]()
    good = batch.add(asked(PROMPTS[0], None, SHAPES[1], grammar=CASES[0][2]))
    bad = batch.add(asked(PROMPTS[1], None, SHAPES[1], grammar=CASES[1][2]))
    bad.answer.place.take = refuse  # type: ignore[union-attr, method-assign]
    failures = 0
    while batch.rows or batch.waiting:
        try:
            for row, emitted in batch.step():
                assert row is good
                tokens += emitted.tokens
        except OptionError:
            failures += 1
            assert bad not in batch.rows
    assert failures == 1 and tokens == plain[0]


def refuse(tokens: Any) -> int:
    raise OptionError("too complex")


@pytest.mark.parametrize("kind", ["qwen3_5", "mamba2", "gpt_oss", "glm4_moe_lite"])
def test_every_kind_of_layer(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Recurrences, rings, experts, latents: what they keep is that of the accepted nodes."""
    mx.disable_compile()
    request.addfinalizer(mx.enable_compile)
    target = target_of(kind, tmp_path)
    prompt, grammar = prompt_of(9, vocab=97), Drawn(97, 4, share=0.8)
    for params in SAMPLING[:2]:
        answer = run(engine_of(target, compiled=False), prompt, params, grammar=grammar)
        oracle = Oracle(target, [prompt + answer], RANKS)
        engine, session = engine_of(target, oracle, compiled=False), Session()
        for shape in SHAPES[:2]:
            assert run(engine, prompt, params, shape, grammar=grammar) == answer
        batch, both = Batch(engine), dict[Row, list[int]]()
        both[batch.add(asked(prompt, params, SHAPES[1], grammar=grammar))] = []
        both[batch.add(asked(prompt, params, SHAPES[0], 12))] = []
        while batch.rows or batch.waiting:
            for row, emitted in batch.step():
                both[row] += emitted.tokens
        assert list(both.values()) == [answer, plainly(target, prompt, 12, params)]
        found = run(engine, prompt, params, SHAPES[1], 11, session, grammar=grammar)
        more = [*prompt, *found, 5, 6]
        assert run(engine, more, params, SHAPES[1], 6, session) == plainly(target, more, 6, params)


@pytest.mark.parametrize("kind", ["eagle", "model", "medusa", "redrafter"])
def test_every_kind_of_drafter(
    kind: str, target: Decoder, target_folder: Path, tmp_path: Path, drafter: Any,
    plain: list[list[int]],
) -> None:  # fmt: skip
    if kind == "eagle":
        drafter = load_eagle(tmp_path, plain_head(), target)
    elif kind == "model":  # the target itself: every draft is what is chosen without a mask
        drafter = load_drafter(target_folder, target)
    elif kind == "medusa":
        drafter = heads(target, tmp_path, PROMPTS[0] + plain[0])
    engine = engine_of(target, drafter, compiled=False)
    assert wrong(engine, plain[:4], SHAPES[1]) == 0
    assert wrong(engine, plain[:2], SHAPES[0]) == 0


def test_drafts_go_on_from_what_was_chosen_again(
    target: Decoder, target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target itself drafts what it would choose: a step is whole unless a choice was made again
    in it, also behind one that was, or behind certain tokens."""
    again, count = Answering._choose_again, [0]

    def counted(self: Answering, *rest: Any) -> int:
        count[0] += 1
        return again(self, *rest)

    monkeypatch.setattr(Answering, "_choose_again", counted)
    engine = engine_of(target, load_drafter(target_folder, target), compiled=False)
    for params in SAMPLING[:2]:
        stats, count[0] = DraftStats(), 0
        grammar = Drawn(V, 3, share=0.9, forced=0.1, longest=200)
        tokens = run(engine, PROMPTS[1], params, SHAPES[0], 60, stats=stats, grammar=grammar)
        drafted = stats.shapes[str(SHAPES[0])]
        whole = stats.histogram[3]
        assert count[0] > 4 and drafted < 0.6 * len(tokens)
        assert drafted - whole <= count[0] + 1


def test_compiled(target: Decoder, plain: list[list[int]], engine: Engine) -> None:
    compiled = engine_of(target, engine.drafters[1])
    assert wrong(compiled, plain[:1], SHAPES[1]) == 0


def test_where_the_filters_leave_nothing_legal() -> None:
    """All legal ones are drawn from; minus infinity, and what is not a number, count as least, and
    a legal token is found all the same."""
    logits = mx.array([[5.0, 4.0, 1.0, 0.5, -math.inf, math.nan]])
    legal = mx.array([0b111100], mx.uint32)
    node, position = root_only(mx.array([0])), mx.array([3])

    def chosen(params: SamplingParams, bits: mx.array = legal) -> int:
        return int(rule.choose(logits, node, {}, params.arrays(6), position, bits).item())

    assert chosen(SamplingParams()) == 2
    logits[:, 5] = -20.0
    few = {chosen(SamplingParams(temp=1.0, top_k=2, seed=seed)) for seed in range(40)}
    assert few == {2, 3}
    logits[:, 5] = 0.0
    assert {chosen(SamplingParams(temp=1.0, top_k=3, seed=seed)) for seed in range(40)} == {2}
    assert chosen(SamplingParams(), mx.array([0b110000], mx.uint32)) in (4, 5)


def an_illegal_one(patch: pytest.MonkeyPatch) -> None:
    """What was chosen without the mask is kept where a draft carried it."""
    from fake_grammar import Stand

    take = Stand.take

    def lenient(self: Stand, tokens: Any) -> int:
        count = take(self, tokens)
        if 0 < count < len(tokens) and END not in tokens and self.forced(1) != [END]:
            self.tokens.append(tokens[count])
            count += 1
        return count

    patch.setattr(Stand, "take", lenient)


def another_noise(patch: pytest.MonkeyPatch) -> None:
    """The second choice has the noise of the root's place."""
    choose = rule.choose

    def other(logits: Any, node: Any, *rest: Any) -> Any:
        return choose(logits, node._replace(depths=node.depths * 0), *rest)

    patch.setattr(rule, "choose", other)


def the_last_node(patch: pytest.MonkeyPatch) -> None:
    """The second choice is made of the deepest node's logits."""
    again = rule.again

    def deepest(*given: Any) -> Any:
        *rest, held, history, arrays, bits, depth = given
        one = mx.take(held.logits, held.last, axis=0)
        held = held._replace(logits=mx.broadcast_to(one, held.logits.shape))
        return again(*rest, held, history, arrays, bits, depth)

    patch.setattr("mlx_redrafter.decoding.engine.again", deepest)


def the_whole_path(patch: pytest.MonkeyPatch) -> None:
    """What lies behind the second choice stays in the caches."""
    again = rule.again

    def longer(*given: Any) -> Any:
        chosen = again(*given)
        return chosen._replace(produced=chosen.produced + 1)

    patch.setattr("mlx_redrafter.decoding.engine.again", longer)


@pytest.mark.parametrize("mutate", [an_illegal_one, another_noise, the_last_node, the_whole_path])
def test_mutations_are_caught(
    target: Decoder, engine: Engine, plain: list[list[int]],
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mutate(monkeypatch)
    fresh = engine_of(target, engine.drafters[1], compiled=False)
    assert wrong(fresh, plain, SHAPES[1]) > 0
