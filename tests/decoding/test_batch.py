"""Answers that run together are each what they are alone, whoever joins, leaves or is cancelled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import pytest
from conftest import PENALTIES, RANKS, Oracle, asked, engine_of, plainly, prompt_of, run
from every_kind import target_of

from mlx_redrafter.cache import stack as stack_module
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.stack import Stacked
from mlx_redrafter.decoding import rows as rows_module
from mlx_redrafter.decoding import step as step_module
from mlx_redrafter.decoding.batch import Batch, Row
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.stacked import StackPass
from mlx_redrafter.tree.shape import TreeShape

SHAPES = (
    TreeShape.plain(), TreeShape.chain(2), TreeShape(2, 3, 4), TreeShape(3, 4, 8),
    TreeShape(1, 0, 6, lookup=5), TreeShape(3, 3, 9, lookup=6),
)  # fmt: skip
PROMPTS = [prompt_of(5 + 7 * i, seed=80 + i) for i in range(6)]
SAMPLING = (
    SamplingParams(), SamplingParams(temp=0.8, seed=3), SamplingParams(temp=1.2, top_k=9, seed=8),
    PENALTIES, SamplingParams(temp=0.7, top_p=0.9, repetition_penalty=1.3, seed=1),
)  # fmt: skip
LONGEST = 30


@pytest.fixture(scope="module")
def plain(target: Decoder) -> dict[tuple[int, int], list[int]]:
    """By prompt and sampling, what plain decoding says, alone."""
    return {
        (i, j): plainly(target, prompt, LONGEST, params)
        for i, prompt in enumerate(PROMPTS)
        for j, params in enumerate(SAMPLING)
    }


@pytest.fixture(scope="module")
def engine(target: Decoder, plain: dict[tuple[int, int], list[int]]) -> Engine:
    texts = [PROMPTS[i] + answer for (i, _), answer in plain.items()]
    return engine_of(target, Oracle(target, texts, RANKS), compiled=False)


def schedule(
    engine: Engine, plain: dict[tuple[int, int], list[int]], seed: int, shapes: Any = SHAPES
) -> int:
    """Requests that come and go at random: how many of their answers are not plain decoding's."""
    rng, batch = Random(seed), Batch(engine)
    coming = [
        (rng.randrange(len(PROMPTS)), rng.randrange(len(SAMPLING)), rng.choice(shapes),
         rng.randint(1, LONGEST), rng.randint(0, 12))
        for _ in range(rng.randint(2, 8))
    ]  # fmt: skip
    running: dict[Row, tuple[tuple[int, int], int, list[int]]] = {}
    wrong = now = 0
    while coming or batch.rows or batch.waiting:
        for one in [one for one in coming if one[4] <= now]:
            coming.remove(one)
            i, j, shape, length, _ = one
            request = asked(PROMPTS[i], SAMPLING[j], shape, length, step_size=8)
            running[batch.add(request)] = (i, j), length, []
        for row, emitted in batch.step():
            running[row][2].extend(emitted.tokens)
        for row, (key, length, tokens) in list(running.items()):
            cancelled = rng.random() < 0.01
            if cancelled:
                batch.remove(row)
            if row.answer.done or cancelled:
                wrong += tokens != plain[key][: len(tokens) if cancelled else length]
                kept = row.answer.request.session.tokens
                wrong += kept != [*PROMPTS[key[0]], *tokens][: len(kept)]
                del running[row]
        now += 1
    assert not running
    return wrong


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_its_own(engine: Engine, plain: Any, seed: int) -> None:
    assert schedule(engine, plain, seed) == 0


def test_answers_move_between_stacks(
    engine: Engine, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As their texts grow they need more slots, and lie with others."""
    monkeypatch.setattr(stack_module, "_LEAST", 16)
    joined, join = defaultdict[int, list[int]](list), stack_module.Stack.join

    def noted(self: Any, who: Any, caches: Any) -> None:
        joined[id(who)].append(self.capacity)
        join(self, who, caches)

    monkeypatch.setattr(stack_module.Stack, "join", noted)
    assert sum(schedule(engine, plain, seed) for seed in (4, 5, 6)) == 0
    assert any(len(set(rooms)) > 1 for rooms in joined.values())


@pytest.mark.slow
def test_two_hundred_schedules(engine: Engine, plain: Any) -> None:
    assert sum(schedule(engine, plain, seed) for seed in range(1000, 1200)) == 0


@pytest.mark.parametrize(
    "kind", ["qwen3_5", "mamba2", "gpt_oss", "gemma4_text", "glm4_moe_lite", "ministral3"]
)
def test_every_kind_of_layer_is_its_own(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Recurrences, windows within and beyond a ring, shared keys, latents, growing queries."""
    mx.disable_compile()
    request.addfinalizer(mx.enable_compile)
    target = target_of(kind, tmp_path)
    prompts = [prompt_of(9 + 11 * i, seed=i, vocab=97) for i in range(3)]
    alone = [plainly(target, prompt, 16, SAMPLING[i]) for i, prompt in enumerate(prompts)]
    texts = [prompt + answer for prompt, answer in zip(prompts, alone, strict=True)]
    batch = Batch(engine_of(target, Oracle(target, texts, RANKS), compiled=False))
    found: dict[Row, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found[batch.add(asked(prompt, SAMPLING[i], SHAPES[3 - i % 2], 16))] = []
    while batch.rows or batch.waiting:
        for row, emitted in batch.step():
            found[row] += emitted.tokens
    assert list(found.values()) == alone


def test_a_session_goes_on_from_a_batch(engine: Engine, plain: Any) -> None:
    """What an answer left in a session within a batch serves the next turn, alone or not."""
    batch, sessions = Batch(engine), [Session(), Session()]
    for i, session in enumerate(sessions):
        batch.add(asked(PROMPTS[i], SAMPLING[0], SHAPES[3], 20, session=session))
    while batch.rows or batch.waiting:
        batch.step()
    for i, session in enumerate(sessions):
        assert len(session.tokens) > len(PROMPTS[i])
        prompt = [*PROMPTS[i], *plain[i, 0][:10], 5, 6]
        expected = plainly(engine.target, prompt, 9)
        assert run(engine, prompt, None, SHAPES[3], 9, session) == expected


def test_one_graph_and_no_trace_in_a_steady_batch(target: Decoder) -> None:
    engine = engine_of(target)
    batch = Batch(engine)
    for i in range(3):
        batch.add(asked(PROMPTS[i], None, TreeShape.plain(), 40))
    counts = []
    while batch.rows or batch.waiting:
        batch.step()
        counts.append(engine.traces)
    assert counts[15] == counts[35], "all three decode, and nothing changes"


def the_first_ones_noise(patch: pytest.MonkeyPatch) -> None:
    """Every answer draws with the first one's seed."""
    finish = rows_module.finish

    def first(target: Any, drafters: Any, spec: Any, begun: Any, *rest: Any) -> Any:
        *found, arrays = rest
        return finish(target, drafters, spec, begun, *found, {**arrays, **seed_of(arrays)})

    def seed_of(arrays: Any) -> Any:
        return {"seed": mx.array([0], mx.uint32)} if "seed" in arrays else {}

    patch.setattr(rows_module, "finish", first)


def the_neighbours_rows(patch: pytest.MonkeyPatch) -> None:
    """Every answer reads the rows of the one after it, where it has as many."""
    check = rows_module.check

    def turned(target: Any, begun: Any, *rest: Any) -> Any:
        found = check(target, begun, *rest)
        others = [*found[1:], found[0]]
        return [b if a[1].shape == b[1].shape else a for a, b in zip(found, others, strict=True)]

    patch.setattr(rows_module, "check", turned)


def the_neighbours_slabs(patch: pytest.MonkeyPatch) -> None:
    """Answers in a stack read and write what is another's."""
    place = stack_module.Stack.place
    patch.setattr(stack_module.Stack, "place", lambda self, who: (place(self, who) + 1) % len(self))


def nothing_put_into_place(patch: pytest.MonkeyPatch) -> None:
    """Accepted rows stay where the tree had them."""
    patch.setattr(StackPass, "settled", lambda self, slots: Stacked(list(self._after.values())))


def the_neighbours_masks(patch: pytest.MonkeyPatch) -> None:
    """What an answer in a stack sees is what another may."""
    mask = StackPass.mask

    def turned(self: Any, window: int) -> mx.array:
        return mx.roll(mask(self, window), self.nodes, axis=0)

    patch.setattr(StackPass, "mask", turned)


def the_neighbours_window(patch: pytest.MonkeyPatch) -> None:
    """Penalties look at the text of another answer."""
    last: list[Any] = []
    recent = step_module.sampling.recent_tokens

    def another(tree: Any, history: mx.array, position: mx.array, size: int) -> mx.array:
        last.append(history)
        return recent(tree, last[-2] if len(last) > 1 else history, position, size)

    patch.setattr(step_module.sampling, "recent_tokens", another)


MUTATIONS = [
    the_first_ones_noise, the_neighbours_rows, the_neighbours_slabs, nothing_put_into_place,
    the_neighbours_masks, the_neighbours_window,
]  # fmt: skip


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_mutations_are_caught(
    engine: Engine, plain: Any, mutate: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mutate(monkeypatch)
    assert sum(schedule(engine, plain, seed, SHAPES[3:4]) for seed in range(3)) > 0


def test_what_fails_leaves_the_others(engine: Engine, plain: Any) -> None:
    """A prompt whose reading stops with an error is gone, the others go on."""
    batch = Batch(engine)
    good = batch.add(asked(PROMPTS[0], None, SHAPES[2], 12))
    tokens: list[int] = []

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    while not batch.rows:
        batch.step()
    bad: Request = asked(PROMPTS[1], None, SHAPES[2], 12, progress=stop)
    batch.add(bad)
    stopped = 0
    while batch.rows or batch.waiting:
        try:
            for row, emitted in batch.step():
                assert row is good
                tokens += emitted.tokens
        except KeyboardInterrupt:
            stopped += 1
    assert stopped == 1 and tokens == plain[0, 0][:12]
    assert not bad.session.tokens
