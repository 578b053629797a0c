"""Answers of a model that thinks: both modes, thoughts that end, and what is behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import tiny_chat
from conftest import prompt_of, write_target
from tiny_chat import WORDS, begin, lines_of, refusal, write_tokenizer

from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.batched import BatchedTarget
from mlx_redrafter.models.sequences import Answer, Course, OneByOne, Request, Sequences, Thought
from mlx_redrafter.text.template import prompt_ids
from mlx_redrafter.training import agreement, imports, prompts, stages, thoughts
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.shards import read_conversations

OPEN, CLOSE, END, CLOSING = 90, 91, 92, (80, 91, 81)
THINKING = {"answer_tokens": 300, "max_tokens": 8, "thought_tokens": 12}
# The words in it stand for marks: what is a mark is found by the text.
OPENED, CLOSED = "<think>", "</think>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant <think> "
    "{% if enable_thinking is defined and not enable_thinking %}</think> {% endif %}{% endif %}"
)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks, with a switch in its template."""
    folder = tmp_path_factory.mktemp("thinker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_chat, "WORDS", [*WORDS, OPENED, CLOSED])
        write_target(folder, vocab_size=len(tiny_chat.WORDS), eos_token_id=tiny_chat.END)
        write_tokenizer(folder, TEMPLATE)
    return folder


def thought(begun: bool, most: int = 6) -> Thought:
    return Thought(begun, most, CLOSING, lambda t: t[-1] == OPEN, lambda t: t[-1] == CLOSE)


def taken(of: Thought | None, chosen: Sequence[int]) -> list[int]:
    """The answer if the target chooses these tokens; of at most 4 behind its thought."""
    course = Course(Request([1], 0.0, 0, thought=of), 4, {END})
    for token in chosen:
        course.take(token)
        if course.done:
            return course.tokens
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    ("begun", "chosen", "found"),
    [
        (True, [1, 2, CLOSE, 3, 4, 5, 6, 7], [1, 2, CLOSE, 3, 4, 5, 6]),
        (True, [1, 2, CLOSE, 3, END], [1, 2, CLOSE, 3, END]),
        (True, [*range(9), 3, 4, 5, 6, 7], [*range(6), *CLOSING, 3, 4, 5, 6]),
        (True, [*range(5), CLOSE, 3, 4, 5, 6, 7], [*range(5), CLOSE, 3, 4, 5, 6]),
        (True, [1, 2, END], [1, 2, END]),
        (False, [OPEN, *range(8), 3, 4, 5, 6, 7], [OPEN, *range(5), *CLOSING, 3, 4, 5, 6]),
        (False, [9, OPEN, 1, CLOSE, 3, 4, 5, 6, 7], [9, OPEN, 1, CLOSE, 3, 4, 5, 6]),
        (False, [1, 2, 3, 4, OPEN, 5], [1, 2, 3, 4]),
        (False, [CLOSE, 2, 3, 4, 5], [CLOSE, 2, 3, 4]),
    ],
)
def test_a_thought_ends_by_itself_or_is_closed_and_the_answer_follows(
    begun: bool, chosen: list[int], found: list[int]
) -> None:
    assert taken(thought(begun), chosen) == found
    assert taken(None, [1, 2, 3, 4, 5]) == [1, 2, 3, 4]


def requests(temp: float) -> list[Request]:
    thoughts = [thought(True), None, thought(False), thought(True, 3), thought(True, 9), None]
    return [Request(prompt_of(3 + 2 * i, seed=i), temp, i, 1.0, t) for i, t in enumerate(thoughts)]


@pytest.mark.parametrize("temp", [0.0, 0.9])
def test_what_a_thought_was_given_is_read_like_its_own(target: Decoder, temp: float) -> None:
    def write(of: type[Sequences]) -> list[Answer]:
        return of(target, (0, 2)).write(requests(temp), 8, {END})

    written, alone = write(BatchedTarget), write(OneByOne)
    assert [a.tokens for a in written] == [a.tokens for a in alone]
    assert any(tuple(a.tokens[6:9]) == CLOSING for a in written)
    pairs = [(r.prompt, a.tokens) for r, a in zip(requests(temp), written, strict=True)]
    read = BatchedTarget(target, (0, 2)).read(pairs)
    for one, other, features in zip(written, alone, read, strict=True):
        np.testing.assert_allclose(one.features, features, atol=5e-3)
        np.testing.assert_allclose(other.features, features, atol=5e-3)


def test_both_modes_are_in_the_data_and_answers_reach_behind_the_thought(
    tmp_path: Path, thinker: Path
) -> None:
    run = begin(tmp_path / "run", thinker, **THINKING)
    stages.answers(run)
    opened, closed = (run.tokenizer.convert_tokens_to_ids(t) for t in (OPENED, CLOSED))
    found = [c for f in imports.split(run.config.out)[1] for c in read_conversations(f)]
    thinking = [c for c in found if c.prompt[-1] == opened]
    assert {c.prompt[-1] for c in found} == {opened, closed}
    assert 0.2 < len(thinking) / len(found) < 0.8
    most = THINKING["thought_tokens"] + len(run.supply.thinking.closing)
    for c in found:
        rest = c.answer
        if c in thinking and closed in rest:
            assert rest.index(closed) < most
            rest = rest[rest.index(closed) + 1 :]
        assert c.answer[-1] == tiny_chat.END or len(rest) == 8
    assert sum(len(c.answer) == most + 8 for c in thinking) > 2
    again = [r for p in run.supply.batches(4) for part in run.supply.requests(*p, 4) for r in part]
    assert [list(r.prompt) for r in again[: len(found)]] == [c.prompt for c in found]
    assert not [f.warning("") for f in agreement.findings(run.supply).values() if f.own]


def test_a_prompt_is_rendered_as_the_chat_renders_it(tmp_path: Path, thinker: Path) -> None:
    supply = begin(tmp_path / "run", thinker, system_prompt="ba").supply
    messages = [{"role": r, "content": t} for r, t in (("system", "ba"), ("user", "do du"))]
    for mode in supply.thinking.modes:
        chat = prompt_ids(supply.tokenizer, messages, mode)
        assert supply.encode({"prompt": "do du"}, mode) == chat
    usual = prompt_ids(supply.tokenizer, messages)
    assert supply.encode({"prompt": "do du"}) == usual != chat[:-1]


@pytest.mark.parametrize(
    ("share", "most", "mean"), [(0.5, 772, 514), (0.25, 772, 385), (0, 256, 256)]
)
def test_lengths_with_thoughts(thinker: Path, share: float, most: int, mean: float) -> None:
    tokenizer = stages.load_tokenizer(thinker)
    config = TrainConfig(thinking=float(share))
    extra = len(thoughts.Thinking(config, tokenizer).closing)
    found = thoughts.lengths(replace(config, thought_tokens=516 - extra), tokenizer)
    assert found == (most, mean)


def test_a_share_needs_a_switch(tmp_path: Path, thinker: Path) -> None:
    model = tiny_chat.write_chat_model(tmp_path / "chat")
    said = refusal(lambda: begin(tmp_path / "run", model, thinking=1.0))
    assert "has no switch for thinking" in said
    run = begin(tmp_path / "run", model)
    assert run.lengths == (16, 16) and run.supply.thinking.modes == ({},)
    all_of_it = begin(tmp_path / "all", thinker, thinking=1.0)
    modes = [all_of_it.supply.thinking.mode(i) for i in range(20)]
    assert modes == [{"enable_thinking": True}] * 20


def test_earlier_answers_of_both_modes_are_known_again(
    tmp_path: Path, thinker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supply = begin(tmp_path / "run", thinker).supply
    rows = [
        {"prompt": supply.encode({"prompt": text}, mode), "answer": [9, 9, 1], "temp": 0.0}
        for text in ("ba be", "do du", "fa fe", "ka ko")
        for mode in supply.thinking.modes
    ]
    file = tmp_path / "old.jsonl"
    file.write_text(lines_of(*rows))
    monkeypatch.setattr(prompts, "read_prompts", lambda: [Prompt("do du", "chat")])
    run: Any = begin(tmp_path / "new", thinker, answers=file, answer_tokens=9)
    stages.prompts(run)
    taken = imports.split(run.config.out)[0]
    assert [c.prompt for c in read_conversations(taken[0])] == [
        row["prompt"] for i, row in enumerate(rows) if i not in (2, 3)
    ]
    assert all(f.own is None for f in agreement.findings(run.supply).values())


@pytest.mark.parametrize(
    ("on", "off", "found"),
    [
        ("", "<think> </think>", [None, False]),  # the model opens its thought, as Qwen3
        ("<think>", "<think> </think>", [None, True]),
        ("<think>", "<think>", [True]),  # no switch
        ("", "", [False]),
    ],
)
def test_where_a_thought_begins_is_seen_from_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: str, off: str, found: list[bool | None]
) -> None:
    monkeypatch.setattr(tiny_chat, "WORDS", [*WORDS, OPENED, CLOSED])
    write_tokenizer(
        tmp_path,
        "{% for m in messages %}{{ m['content'] }}{% endfor %} "
        f"{{{{ '{on}' if enable_thinking | default(true) else '{off}' }}}}",
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = stages.load_tokenizer(tmp_path)
    thinking = thoughts.Thinking(TrainConfig(), tokenizer)
    assert thinking.share == (0.5 if len(found) > 1 else 1)
    given = [thinking.thought(prompt_ids(tokenizer, [{"role": "user", "content": "ba"}], mode))
             for mode in thinking.modes]  # fmt: skip
    assert [t and t.begun for t in given] == found
    closed = tokenizer.convert_tokens_to_ids(CLOSED)
    assert all(t.closing == (closed,) and t.closes([5, closed]) for t in given if t)
    assert not any(t.closes([closed, 5]) or t.opens([closed]) for t in given if t)
