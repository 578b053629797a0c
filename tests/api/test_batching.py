"""Several answers at once, from Python: each is what it would be alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ByteTokenizer

from mlx_redrafter.api import Model, generate
from mlx_redrafter.api.batching import BatchGenerator, batch_generate
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder
from mlx_redrafter.tree.shape import TreeShape

# Small letters only, so that every token is a piece of text.
LETTERS = {t: -1000.0 for t in range(ByteTokenizer.vocab_size) if not 97 <= t < 123}
TREE = TreeShape(1, 0, 6, lookup=5)
OPTIONS: dict[str, Any] = {"max_tokens": 20, "logit_bias": LETTERS, "tree": TREE}
PROMPTS = ("once", "twice upon a time", "thrice")


@pytest.fixture(scope="module")
def model(byte_target: Decoder) -> Model:
    return Model.of("tiny", Path("."), byte_target, compiled=False)


@pytest.fixture(scope="module")
def alone(model: Model) -> list[str]:
    return [generate(model, ByteTokenizer(), prompt, **OPTIONS) for prompt in PROMPTS]  # type: ignore[arg-type]


def test_answers_are_those_of_single_calls(
    model: Model, tokenizer: Any, alone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = batch_generate(model, tokenizer, PROMPTS, verbose=True, **OPTIONS)
    assert found.texts == alone and len(set(alone)) == 3
    assert [stats.tokens for stats in found.stats] == [20, 20, 20]
    assert capsys.readouterr().out.count("20 tokens") == 3
    found = batch_generate(model, tokenizer, PROMPTS, **{**OPTIONS, "max_tokens": [3, 1, 7]})
    assert found.texts == [text[:n] for text, n in zip(alone, (3, 1, 7), strict=True)]


def test_each_has_its_own_options(model: Model, tokenizer: Any, alone: list[str]) -> None:
    own: list[dict[str, Any]] = [
        {"temp": 0.9, "seed": 4}, {"stop": alone[1][6:8]}, {"repetition_penalty": 1.5},
    ]  # fmt: skip
    with BatchGenerator(model, tokenizer) as batch:
        texts = [""] * 3
        numbers = [
            batch.insert(prompt, **{**OPTIONS, **more})
            for prompt, more in zip(PROMPTS, own, strict=True)
        ]
        while len(batch):
            for number, response in batch.next():
                texts[numbers.index(number)] += response.text
    for prompt, more, text in zip(PROMPTS, own, texts, strict=True):
        assert text == generate(model, tokenizer, prompt, **{**OPTIONS, **more})


def test_the_time_of_a_prompt_is_its_own(
    model: Model, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of others between its parts are not in it, nor in the speed of its answer."""
    steps = Batch._decode

    def slow(batch: Batch) -> Any:
        time.sleep(0.1 if batch.waiting else 0.0)
        return steps(batch)

    monkeypatch.setattr(Batch, "_decode", slow)
    with BatchGenerator(model, tokenizer) as batch:
        batch.insert("once", **{**OPTIONS, "max_tokens": 100})
        while not batch.next():
            pass
        long = batch.insert("x" * 1000, prefill_step_size=128, **OPTIONS)
        last = None
        while long in batch:
            last = next((r for number, r in batch.next()[::-1] if number == long), last)
    assert last is not None
    assert last.stats.prefill_seconds < 7 * 0.1 / 2
    assert last.generation_tps > 20 / (7 * 0.1)


def test_what_is_removed_leaves_its_session(model: Model, tokenizer: Any, alone: list[str]) -> None:
    sessions = [Session(), Session()]
    with BatchGenerator(model, tokenizer) as batch:
        first, second = (
            batch.insert(prompt, session=session, **OPTIONS)
            for prompt, session in zip(PROMPTS, sessions, strict=False)
        )
        got = {first: "", second: ""}
        while len(got[first]) < 8:
            for number, response in batch.next():
                got[number] += response.text
        batch.remove(first)
        assert bytes(sessions[0].tokens[-4:]).decode() in PROMPTS[0] + got[first]
        with pytest.raises(OptionError, match="no answer of number"):
            batch.remove(first)
        while len(batch):
            for number, response in batch.next():
                assert number == second
                got[number] += response.text
    assert got[second] == alone[1] and alone[0].startswith(got[first])
    text = generate(model, tokenizer, PROMPTS[0], session=sessions[0], **OPTIONS)
    assert text == alone[0]


def test_what_is_wrong_is_said_at_once(model: Model, tokenizer: Any) -> None:
    with pytest.raises(OptionError, match="several"):
        batch_generate(model, tokenizer, "one text")
    with pytest.raises(OptionError, match="2 values for 3 prompts"):
        batch_generate(model, tokenizer, PROMPTS, max_tokens=[1, 2])
    with pytest.raises(OptionError, match="temp"):
        batch_generate(model, tokenizer, PROMPTS, temp=-1)
    batch = BatchGenerator(model, tokenizer)
    with pytest.raises(OptionError):
        batch.insert("")
    assert len(batch) == 0 and batch.next() == []
    batch.close()
