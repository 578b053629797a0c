"""The Python API on a tiny byte model: text, stops, limits, flags, statistics, errors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ByteTokenizer, Oracle, plainly, write_target

from mlx_redrafter.api import Model, generate, stream_generate
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.text.answer import GenerationResponse
from mlx_redrafter.tree.shape import TreeShape

PROMPT = "once"
# Small letters only, so that every token is a piece of text.
LETTERS = {t: -1000.0 for t in range(ByteTokenizer.vocab_size) if not 97 <= t < 123}
LENGTH = 24
TREES = {"chain": TreeShape.chain(4), "beam": TreeShape(3, 4, 8)}


def model_of(target: Decoder, drafter: Any) -> Model:
    return Model.of("tiny", Path("."), target, drafter, compiled=False)


@pytest.fixture(scope="module")
def answer(byte_target: Decoder) -> str:
    ids = ByteTokenizer().encode(PROMPT)
    params = SamplingParams(logit_bias=LETTERS)
    return bytes(plainly(byte_target, ids, LENGTH, params)).decode()


@pytest.fixture(scope="module")
def model(byte_target: Decoder, answer: str) -> Model:
    """Drafts runs of up to four right tokens."""
    texts = [ByteTokenizer().encode(PROMPT + answer)]
    return model_of(byte_target, Oracle(byte_target, texts, (0, 0, 0, 0, 1, 0, 0, 0, 9)))


def stream(
    model: Model, tokenizer: ByteTokenizer, prompt: str | Sequence[int] = PROMPT, **options: Any
) -> list[GenerationResponse]:
    options = {"max_tokens": LENGTH, "logit_bias": LETTERS, **options}
    return list(stream_generate(model, tokenizer, prompt, **options))  # type: ignore[arg-type]


def text_of(responses: Sequence[GenerationResponse]) -> str:
    return "".join(r.text for r in responses)


def check(responses: Sequence[GenerationResponse], answer: str, reason: str) -> None:
    """What must hold of every answer: its tokens, its reasons, its counts."""
    tokens = [r.token for r in responses]
    assert bytes(tokens).decode() == answer[: len(tokens)]
    assert [r.finish_reason for r in responses] == [None] * (len(tokens) - 1) + [reason]
    assert [r.generation_tokens for r in responses] == list(range(1, len(tokens) + 1))
    assert {r.prompt_tokens for r in responses} == {len(PROMPT) + 1}
    stats = responses[-1].stats
    assert stats.tokens == stats.accepted + stats.steps >= len(tokens)
    assert sum(stats.histogram.values()) == stats.steps
    assert sum(k * n for k, n in stats.histogram.items()) == stats.accepted
    assert sum(r.from_draft for r in responses) <= stats.accepted
    assert all(r.generation_tps > 0 and r.prompt_tps > 0 for r in responses)
    assert all(r.peak_memory > 0 for r in responses)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_length(model: Model, tokenizer: ByteTokenizer, answer: str, tree: TreeShape) -> None:
    for n in (1, 2, 3, 5, 11, LENGTH):
        responses = stream(model, tokenizer, tree=tree, max_tokens=n)
        check(responses, answer, "length")
        assert text_of(responses) == answer[:n]
        stats = responses[-1].stats
        assert stats.tokens == n and stats.accepted == sum(r.from_draft for r in responses)
    assert stats.drafted == stats.steps * (tree.nodes - 1)
    assert stats.tokens_per_step > 1.7
    assert any(r.from_draft for r in responses) and not responses[-1].stats.acceptance_rate > 1


def test_plain_is_the_same_text(model: Model, tokenizer: ByteTokenizer, answer: str) -> None:
    responses = stream(model, tokenizer, draft=False)
    check(responses, answer, "length")
    assert text_of(responses) == answer
    assert not any(r.from_draft for r in responses)
    stats = responses[-1].stats
    assert (stats.drafted, stats.accepted, stats.steps) == (0, 0, LENGTH)
    assert text_of(stream(model_of(model.target, None), tokenizer)) == answer


def test_generate_joins_and_prints(
    model: Model, tokenizer: ByteTokenizer, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_tokens": LENGTH, "logit_bias": LETTERS}
    assert generate(model, tokenizer, PROMPT, **options) == answer  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""
    generate(model, tokenizer, PROMPT, verbose=True, **options)  # type: ignore[arg-type]
    assert answer in capsys.readouterr().out


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_stop_strings(
    model: Model, tokenizer: ByteTokenizer, answer: str, tree: TreeShape, length: int
) -> None:
    """Every piece of the answer as stop string: inside a run, at its end, across two steps."""
    ids = tokenizer.encode(PROMPT)
    for start in range(0, LENGTH - length + 1, 2):
        stop = answer[start : start + length]
        cut = answer.index(stop)
        session = Session()
        responses = stream(model, tokenizer, tree=tree, stop=["#never#", stop], session=session)
        check(responses, answer, "stop")
        assert text_of(responses) == answer[:cut]
        assert len(responses) == cut + length  # not a token more than the stop string needs
        held = ids + [r.token for r in responses]
        assert session.tokens == held[: len(session.tokens)]


def test_the_earliest_stop_string_wins(model: Model, tokenizer: ByteTokenizer, answer: str) -> None:
    stops = [answer[9:12], answer[4:6], answer[6:20]]
    cut = min(answer.index(s) for s in stops)
    assert text_of(stream(model, tokenizer, stop=stops)) == answer[:cut]
    # A longer one that begins earlier ends later: the shorter, complete first, cuts.
    assert text_of(stream(model, tokenizer, stop=[answer[2:9], answer[3:5]])) == answer[:3]


def test_beginnings_of_a_stop_string_are_not_lost(
    model: Model, tokenizer: ByteTokenizer, answer: str
) -> None:
    """Text is held back while it may be a stop string, and comes when it is not."""
    stops = [answer[5:9] + "#", answer[-3:] + "#"]
    responses = stream(model, tokenizer, stop=stops)
    check(responses, answer, "length")
    assert text_of(responses) == answer
    held = []
    for i in range(1, LENGTH):
        begun = [n for s in stops for n in range(1, len(s)) if answer[:i].endswith(s[:n])]
        held.append(max(begun, default=0))
        assert text_of(responses[:i]) == answer[: i - held[-1]]
    assert max(held) == 4


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("own", [True, False], ids=["eos", "stop_tokens"])
def test_end_tokens(
    model: Model, tokenizer: ByteTokenizer, answer: str, tree: TreeShape, own: bool
) -> None:
    """At every place of the answer, so inside accepted runs too; nothing after it is seen."""
    drafted = []
    for token in sorted(set(answer.encode())):
        at = answer.encode().index(token)
        tokenizer.eos_token_ids = {token} if own else {ByteTokenizer.EOS}
        session = Session()
        responses = stream(
            model, tokenizer, tree=tree, stop_tokens=() if own else [token], session=session
        )
        check(responses, answer, "stop")
        assert responses[-1].token == token and len(responses) == at + 1
        assert text_of(responses) == answer[:at]
        held = tokenizer.encode(PROMPT + answer[: at + 1])
        assert session.tokens == held[: len(session.tokens)]
        drafted.append(responses[-1].from_draft)
    assert any(drafted) and not all(drafted)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_next_turn_after_a_stop(
    model: Model, tokenizer: ByteTokenizer, answer: str, tree: TreeShape
) -> None:
    for cut in range(2, 12):
        session = Session()
        stream(model, tokenizer, tree=tree, stop=[answer[cut : cut + 2]], session=session)
        prompt = PROMPT + answer[:cut] + " and then"
        fresh = text_of(stream(model, tokenizer, prompt, draft=False))
        assert text_of(stream(model, tokenizer, prompt, tree=tree, session=session)) == fresh


def test_closing_the_stream(model: Model, tokenizer: ByteTokenizer, answer: str) -> None:
    """A consumer that leaves inside a run: what it has not seen is not in the session."""
    for seen in range(1, 10):
        session = Session()
        options: dict[str, Any] = {"logit_bias": LETTERS, "session": session}
        steps = stream_generate(model, tokenizer, PROMPT, LENGTH, **options)  # type: ignore[arg-type]
        for _ in range(seen):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
        held = tokenizer.encode(PROMPT + answer[:seen])
        assert session.tokens == held[: len(session.tokens)]
        assert len(session.tokens) >= len(PROMPT)
        prompt = PROMPT + answer[:seen] + "!"
        fresh = text_of(stream(model, tokenizer, prompt, draft=False))
        assert text_of(stream(model, tokenizer, prompt, session=session)) == fresh


def test_characters_of_several_bytes(byte_target: Decoder, tokenizer: ByteTokenizer) -> None:
    """Alternating bytes of two-byte characters: half a character is never emitted."""
    word = "éßñü" * 4
    ids = tokenizer.encode(PROMPT)
    bytes_of = list(word.encode())
    allowed = {t: -1000.0 for t in range(tokenizer.vocab_size) if t not in (0xC3, *bytes_of)}
    leads = plainly(byte_target, ids, 20, SamplingParams(logit_bias=allowed))
    model = model_of(byte_target, Oracle(byte_target, [ids + leads]))
    responses = stream(model, tokenizer, logit_bias=allowed, max_tokens=20)
    assert [r.token for r in responses] == leads
    assert text_of(responses) == tokenizer.decode(leads)


def test_context_end(tmp_path: Path, tokenizer: ByteTokenizer, answer: str) -> None:
    vocab, limit = ByteTokenizer.vocab_size, len(PROMPT) + 1 + 7
    short = load_model(write_target(tmp_path, vocab_size=vocab, max_position_embeddings=limit))
    model = model_of(short, Oracle(short, [tokenizer.encode(PROMPT + answer)]))
    responses = stream(model, tokenizer, max_tokens=100)
    check(responses, answer, "length")
    assert text_of(responses) == answer[:7]
    with pytest.raises(OptionError, match=str(limit)):
        stream(model, tokenizer, "x" * limit)


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ([1, 5000], {}, "vocabulary"),
        (PROMPT, {"temperature": 0.5}, "temperature"),
        (PROMPT, {"temp": -1.0}, "temp"),
        (PROMPT, {"max_tokens": 0}, "max_tokens"),
        (PROMPT, {"max_tokens": -3}, "max_tokens"),
        (PROMPT, {"stop": ["ok", ""]}, "stop string"),
        (PROMPT, {"prefill_step_size": 0}, "prefill_step_size"),
        (PROMPT, {"logit_bias": {ByteTokenizer.vocab_size: 1.0}}, "logit_bias"),
        ("x" * 3000, {}, "3001"),
    ],
)
def test_impossible_requests(
    model: Model, tokenizer: ByteTokenizer, prompt: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        stream(model, tokenizer, prompt, **options)
    assert "\n" not in str(caught.value)


def test_a_refused_request_does_not_spoil_the_session(
    model: Model, tokenizer: ByteTokenizer, answer: str
) -> None:
    session = Session()
    stream(model, tokenizer, session=session)
    held = list(session.tokens)
    for options in ({"logit_bias": {-1: 1.0}}, {"temp": -1.0}, {"max_tokens": 0}):
        with pytest.raises(OptionError):
            stream(model, tokenizer, session=session, **options)
    assert session.tokens == held[: len(session.tokens)]
    assert text_of(stream(model, tokenizer, session=session)) == answer


def test_sampled_text_is_the_same_with_drafting(model: Model, tokenizer: ByteTokenizer) -> None:
    for seed in range(4):
        options: dict[str, Any] = {"temp": 0.9, "top_p": 0.95, "seed": seed}
        plain = stream(model, tokenizer, draft=False, **options)
        assert text_of(stream(model, tokenizer, **options)) == text_of(plain)


def test_progress_and_default_tree(model: Model, tokenizer: ByteTokenizer, answer: str) -> None:
    seen: list[tuple[int, int]] = []
    responses = stream(
        model, tokenizer, prefill_step_size=2,
        prompt_progress_callback=lambda *a: seen.append(a),
    )  # fmt: skip
    assert text_of(responses) == answer
    assert seen == [(0, 5), (2, 5), (5, 5)]
    stats = responses[-1].stats
    assert sum(stats.shapes.values()) == stats.steps and stats.drafted > 0
    assert any("lookup" in shape for shape in stats.shapes)


def test_plain_decoding_was_asked_for(model: Model, tokenizer: ByteTokenizer, answer: str) -> None:
    for options in ({"draft": False}, {}):
        asked = replace(model, drafting=False) if not options else model
        stats = (responses := stream(asked, tokenizer, **options))[-1].stats
        assert text_of(responses) == answer
        assert (stats.drafted, dict(stats.shapes)) == (0, {"plain": stats.steps})


def test_a_model_loaded_for_plain_decoding_drafts_where_it_is_told_to(
    model: Model, tokenizer: ByteTokenizer, answer: str
) -> None:
    asked = replace(model, drafting=False)
    stats = (responses := stream(asked, tokenizer, draft=True))[-1].stats
    assert text_of(responses) == answer and stats.drafted > 0
    stats = (responses := stream(asked, tokenizer, tree=TreeShape.chain(2)))[-1].stats
    assert text_of(responses) == answer and stats.drafted == 0


def test_the_first_special_token_is_not_doubled(
    model: Model, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that went through a chat template has it already."""
    calls: list[bool] = []
    encode = tokenizer.encode

    def recorded(text: str, add_special_tokens: bool = True) -> list[int]:
        calls.extend([add_special_tokens] * ("hello" in text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", recorded)
    stream(model, tokenizer, "<bos>hello", max_tokens=1)
    stream(model, tokenizer, "hello", max_tokens=1)
    assert calls == [False, True]


def test_what_mlx_lm_prints_of_a_large_model_is_not_part_of_the_answer(
    model: Model,
    tokenizer: ByteTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextlib.contextmanager
    def wired(target: Decoder) -> Iterator[None]:
        print("[WARNING] Generating with a model that requires 9 MB")
        yield

    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    monkeypatch.setattr(sys.modules["mlx_lm.generate"], "wired_limit", wired)
    for response in stream(model, tokenizer):
        print(response.text, end="")
    out, err = capsys.readouterr()
    assert "WARNING" not in out and len(out) == LENGTH
    assert err.startswith("[WARNING] Generating")
