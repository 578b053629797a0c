"""A session used again gives what a fresh one gives, however the last answer ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import pytest
from conftest import (
    PENALTIES,
    RANKS,
    SHAPES,
    Oracle,
    asked,
    assert_holds,
    engine_of,
    plainly,
    prompt_of,
    random_drafter,
    run,
)
from halves import half_slow

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import Decoder
from mlx_redrafter.tree.shape import TreeShape


@pytest.mark.parametrize(
    "shape", half_slow([TreeShape.plain(), *SHAPES.values()]), ids=["plain", *SHAPES]
)
def test_second_turn_equals_a_fresh_run(
    target: Decoder, texts: list[Any], oracle: Oracle, shape: TreeShape
) -> None:
    prompt, answer = texts[2]
    engine, session = engine_of(target, oracle, compiled=False), Session()
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


@pytest.mark.parametrize("shape", half_slow(SHAPES.values()), ids=SHAPES)
def test_session_after_leaving_early(target: Decoder, texts: list[Any], shape: TreeShape) -> None:
    """Closed between steps, or thrown at: only tokens that were yielded are in the session."""
    prompt, answer = texts[2]
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS))

    def close(steps: Iterator[Any]) -> None:
        steps.close()  # type: ignore[attr-defined]

    def interrupt(steps: Iterator[Any]) -> None:
        with pytest.raises(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt())  # type: ignore[attr-defined]

    leaves: list[Callable[[Iterator[Any]], None]] = [close, interrupt]
    for leave in leaves:
        for after in (1, 2, 5):
            session, tokens = Session(), []
            steps = engine.generate(asked(prompt, SamplingParams(), shape, 40, session=session))
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
    engine, session = engine_of(target, Oracle(target, [prompt + answer], RANKS)), Session()
    shape = SHAPES["beam-3x4-8"]
    tokens: list[int] = []
    steps = engine.generate(asked(prompt, SamplingParams(), shape, 40, session=session))
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

    engine = engine_of(target, random_drafter(target), compiled=False)
    with pytest.raises(KeyboardInterrupt):
        run(
            engine, prompt, None, SHAPES["chain"], 5, session,
            step_size=8, progress=progress,
        )  # fmt: skip
    assert session.tokens == prompt[:16]
    for turn in ([*prompt[:20], 3, 4], prompt):
        assert run(engine, turn, None, SHAPES["chain"], 9, session) == plainly(target, turn, 9)


def test_session_trimmed_inside_an_accepted_run(
    target: Decoder, texts: list[Any], oracle: Oracle
) -> None:
    prompt, answer = texts[2]
    engine, shape = engine_of(target, oracle), SHAPES["beam-4x5-16"]
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
    engines = [
        engine_of(target, oracle),
        engine_of(target, None),
        engine_of(target, random_drafter(target)),
    ]
    shapes = [*SHAPES.values(), TreeShape.plain()]
    params = [SamplingParams(), SamplingParams(temp=0.7, seed=2), PENALTIES]
    session, turn = Session(), list(texts[1][0])
    for i in range(14):
        chosen = params[i % 3]
        expected = plainly(target, turn, 20, chosen)
        assert run(engines[i % 3], turn, chosen, shapes[i % 6], 20, session) == expected, i
        turn += expected + prompt_of(2, seed=i)
    assert session.caches[0].shape[2] >= 384
