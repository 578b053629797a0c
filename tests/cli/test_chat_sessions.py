"""A chat reads nothing twice: the session keeps what the next prompt begins with."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import pytest  # isort: skip
from tiny_chat import END, write_chat_model

from mlx_redrafter import api
from mlx_redrafter.cli.chat import Chat
from mlx_redrafter.cli.options import DecodeOptions
from mlx_redrafter.text.template import render

SYSTEM = "ba be bi bo bu " * 12
LAST = 2  # tokens that every request reads: the root, and the one before it for the drafter


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = write_chat_model(tmp_path_factory.mktemp("chat"), max_position_embeddings=4096)
    return api.load(str(folder), None)


@pytest.fixture
def chat(loaded: tuple[Any, Any], capsys: Any) -> Chat:
    # Its end token is never chosen: an answer has 8 tokens.
    options = DecodeOptions(
        max_tokens=8, system_prompt=SYSTEM, logit_bias=[f"{t}=-100" for t in (END, 0, 2)],
        prefill_step_size=16,
    )  # fmt: skip
    return Chat(*loaded, options, interactive=False, quiet=True)


def read(chat: Chat, line: str) -> int:
    """Prompt tokens that were read for the answer."""
    assert chat.say(line)
    assert chat.conversation.last is not None
    return chat.conversation.last.prefill_tokens


def known(chat: Chat) -> int:
    """Tokens of the conversation so far, the beginning of an answer not counted."""
    return len(chat.tokenizer.apply_chat_template(chat.conversation.messages))


def opening(chat: Chat) -> int:
    """What the turn that was just answered had to read: its question and the beginning of its
    answer, and of the answer before the last token, which no step has read, and the end token."""
    messages = chat.conversation.messages
    before = len(chat.tokenizer.apply_chat_template(messages[:-2]))
    return len(render(chat.tokenizer, messages[:-1])) - before + 2


def interrupt_at(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Ctrl-C as soon as so many tokens of the prompt are read, once."""
    real = api.stream_generate

    def stream(*given: Any, prompt_progress_callback: Any, **more: Any) -> Any:
        pressed = False

        def progress(done: int, total: int) -> None:
            nonlocal pressed
            if done >= tokens and not pressed:
                pressed = True
                signal.raise_signal(signal.SIGINT)
            prompt_progress_callback(done, total)

        return real(*given, prompt_progress_callback=progress, **more)

    monkeypatch.setattr(api, "stream_generate", stream)


def test_a_turn_reads_its_question_only(chat: Chat) -> None:
    assert read(chat, "da de") == known(chat) - 8 - 1  # all but the answer and its end token
    for question in ("di do du", "fa", "fe fi"):
        assert read(chat, question) == opening(chat)


def test_a_stopped_answer_is_not_read_again(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    read(chat, "da de")
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("mlx_redrafter.terminal.console.write", write)
        chat.say("di do")
    assert chat.conversation.messages[-1]["stopped"]
    assert read(chat, "go") == opening(chat)


def test_ctrl_c_while_a_prompt_is_read_stops_within_a_chunk_and_keeps_what_was_read(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 32)
        chat.say("da de")
    assert "[stopped]" in capsys.readouterr().err
    assert len(chat.session.tokens) == 32, "two chunks of 16, and no third one"
    assert [m["role"] for m in chat.conversation.messages] == ["system"]
    assert read(chat, "da de") == known(chat) - 8 - 1 - 32
    fresh = Chat(
        chat.model, chat.tokenizer, chat.conversation.options, interactive=False, quiet=True
    )
    fresh.say("da de")
    assert fresh.conversation.messages == chat.conversation.messages


def test_another_ending_of_the_conversation_keeps_what_is_before_it(
    chat: Chat, tmp_path: Path
) -> None:
    read(chat, "da de")
    read(chat, "di do")
    assert read(chat, "/retry") == LAST
    first = known(chat)
    file = tmp_path / "talk.json"
    chat.say(f"/save {file}")
    content = json.loads(file.read_text())
    content["messages"][3]["content"] = "ku ku"  # the second question
    file.write_text(json.dumps(content))
    chat.say(f"/load {file}")
    edited = read(chat, "ga")
    start = len(chat.tokenizer.apply_chat_template(content["messages"][:3]))
    assert edited <= known(chat) - 8 - 1 - start < first
    chat.say("/clear")
    # Also known are the two tokens that open any question.
    assert read(chat, "ka") == opening(chat) - 2 - 2 < known(chat) - 60


def test_a_changed_sparse_setting_reads_again_only_what_was_read_sparsely(chat: Chat) -> None:
    read(chat, "da de")
    chat.say("/set sparse_prefill_min_context 0")
    chat.say("/set sparse_prefill xattention")
    assert read(chat, "di do") == opening(chat), "what is dense serves everybody"
    assert chat.session.tag == "", "too short to be sparse"
    chat.say("/set sparse_prefill off")
    assert read(chat, "fa") == opening(chat)
    long = "ga ge gi go gu " * 80
    chat.say("/set sparse_prefill xattention")
    dense = len(chat.session.tokens)
    read(chat, long)
    assert chat.session.tag and chat.session.sparse_from >= dense
    sparse_from = chat.session.sparse_from
    assert read(chat, "bo") == opening(chat), "the same setting goes on"
    whole = known(chat) - 9
    chat.say("/set sparse_prefill off")
    assert read(chat, "/retry") == whole - sparse_from
    assert chat.session.tag == ""
