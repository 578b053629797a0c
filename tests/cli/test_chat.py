"""The conversation without a terminal, and the chat on a model that says what it is told."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path

import pytest
from fakes import SUMMARY, FakeModel, FakeTokenizer, install
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from typer.testing import CliRunner

from mlx_redrafter.cli import chat
from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli.conversation import HELP, Conversation, Reply, unfinished, unquoted
from mlx_redrafter.cli.options import DecodeOptions
from mlx_redrafter.errors import OptionError
from mlx_redrafter.stats import DraftStats


def conversation(**options: object) -> Conversation:
    return Conversation(
        FakeTokenizer(),
        DecodeOptions(**options),  # type: ignore[arg-type]
        context=1000,
        drafter="mine",
        model="fake",
    )


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def talk(monkeypatch: pytest.MonkeyPatch, model: FakeModel, *lines: str) -> chat.Chat:
    """A chat as on a terminal, after these lines."""
    install(monkeypatch, model)
    talking = chat.Chat(model, model.tokenizer, DecodeOptions(), interactive=True)
    for line in lines:
        talking.say(line)
    return talking


# The conversation


def test_every_turn_renders_all_messages_so_that_the_prefix_is_shared() -> None:
    talk = conversation(system_prompt="Be brief.")
    first = talk.ask("One?")
    talk.answered("1", None)
    second = talk.ask("Two?")
    assert text(first) == "[system]Be brief.[user]One?[assistant]"
    assert text(second) == text(first) + "1[user]Two?[assistant]"


def test_a_stopped_answer_is_kept_and_marked_but_the_mark_is_not_read_by_the_model() -> None:
    talk = conversation()
    talk.ask("One?")
    talk.answered("Half an", None, stopped=True)
    assert talk.messages[-1] == {"role": "assistant", "content": "Half an", "stopped": True}
    assert text(talk.ask("Go on")) == "[user]One?[assistant]Half an[user]Go on[assistant]"


def test_an_answer_stopped_before_its_first_word_takes_its_question_along() -> None:
    talk = conversation()
    talk.ask("One?")
    talk.answered("", None, stopped=True)
    assert talk.messages == []


def test_commands_change_the_next_answer() -> None:
    talk = conversation()
    assert talk.command("/set temp 0.5") == Reply("temp = 0.5")
    assert talk.command("/set max-tokens 9") == Reply("max_tokens = 9")
    assert talk.command("/set stop END") == Reply("stop = ['END']")
    assert talk.command("/set repetition_penalty 1.2") == Reply("repetition_penalty = 1.2")
    assert talk.command("/set repetition_penalty off") == Reply("repetition_penalty = off")
    assert talk.command("/set lookup 3") == Reply("lookup = 3")
    assert talk.command("/set lookup off") == Reply("lookup = default")
    assert talk.command("/set beam_width 2").text == "beam_width = 2"
    assert talk.command("/set logit_bias 42=-5") == Reply("logit_bias = ['42=-5']")
    assert talk.command("/set sparse_prefill xattention").text == "sparse_prefill = xattention"
    assert talk.arguments()["sparse_prefill"].mode == "xattention"
    assert talk.command("/set sparse_prefill off") == Reply("sparse_prefill = off")
    assert talk.arguments()["sparse_prefill"] is None
    assert talk.command("/drafter off").text.startswith("drafting is off; ")
    arguments = talk.arguments()
    assert (arguments["temp"], arguments["max_tokens"], arguments["stop"]) == (0.5, 9, ("END",))
    assert (arguments["repetition_penalty"], arguments["draft"]) == (None, False)
    assert arguments["tree"].width == 2
    assert "temp" in talk.command("/set").text


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("/nonsense", "unknown command /nonsense: /help lists them"),
        ("/", "unknown command /: /help lists them"),
        ("/set warmth 3", "unknown option warmth: /set lists them"),
        ("/set system_prompt x", "unknown option system_prompt: /set lists them"),
        ("/set temp", "/set temp needs a value; it is 0.0"),
        ("/set temp warm", "temp 'warm' is not possible: give a number"),
        ("/set top_k 1.5", "top_k '1.5' is not possible: give a whole number"),
        ("/set temp -1", "temp -1.0 is not possible: use 0 to 100"),
        ("/set max_tokens 0", "max_tokens 0 is not possible: use 1 or more"),
        ("/set nodes 99", "99 nodes are not possible with beam width 3, beam length 4"),
        (
            "/set sparse_prefill x",
            "sparse prefill: mode 'x' is not possible: use off, a_shape, tri_shape, trianglemix, "
            "xattention, minference",
        ),
        ("/retry", "there is no question to answer again"),
        ("/stats", "no answer yet"),
        ("/save", "/save needs a file name"),
        ("/load", "/load needs a file name"),
        ("/system", "system prompt: that of the template"),
        ("/drafter", "drafting is on: from mine and the text itself"),
        ("/drafter of", "/drafter of is not possible: use on or off"),
        ("/help", HELP),
        ("/?", HELP),
    ],
)
def test_what_is_wrong_with_a_command_is_said_and_changes_nothing(line: str, answer: str) -> None:
    talk = conversation()
    reply = talk.command(line)
    assert reply.text.startswith(answer)
    assert reply.action == "stay"
    assert (talk.options, talk.draft, talk.messages) == (DecodeOptions(), True, [])


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit", " /exit "])
def test_ways_to_leave(line: str) -> None:
    assert conversation().command(line) == Reply(action="exit")


def test_clear_and_system_start_anew() -> None:
    talk = conversation(system_prompt="A")
    talk.ask("One?")
    talk.command("/clear")
    assert talk.messages == [{"role": "system", "content": "A"}]
    talk.ask("One?")
    talk.command("/system Be a pirate.")
    assert talk.messages == [{"role": "system", "content": "Be a pirate."}]


def test_save_and_load(tmp_path: Path) -> None:
    talk, file = conversation(), tmp_path / "talk.json"
    talk.ask("Où?")
    talk.answered("Là", None)
    assert talk.command(f"/save {file}").text == f"2 messages written to {file}"
    assert json.loads(file.read_text(encoding="utf-8"))["model"] == "fake"
    other = conversation()
    assert other.command(f"/load {file}").text == f"2 messages read from {file}"
    assert other.messages == talk.messages


@pytest.mark.parametrize("content", ["no json", "[]", '{"messages": [{"role": "user"}]}', "{}"])
def test_loading_something_else_changes_nothing(tmp_path: Path, content: str) -> None:
    talk, file = conversation(), tmp_path / "talk.json"
    talk.ask("One?")
    file.write_text(content)
    assert f"{file} is not a saved conversation" in talk.command(f"/load {file}").text
    assert "cannot be read" in talk.command(f"/load {tmp_path / 'missing'}").text
    assert "cannot be written" in talk.command(f"/save {tmp_path / 'no' / 'folder'}").text
    assert len(talk.messages) == 1


def test_retry_draws_anew_when_sampling_and_says_so_when_greedy() -> None:
    talk = conversation(temp=1.0, seed=5)
    question = talk.ask("One?")
    talk.answered("1", None)
    assert talk.command("/retry") == Reply("", "retry")
    assert talk.again() == question
    assert talk.arguments()["seed"] == 6
    talk.answered("uno", None)
    talk.ask("Two?")
    assert talk.arguments()["seed"] == 5
    assert "will be the same" in conversation_with_question().command("/retry").text


def conversation_with_question() -> Conversation:
    talk = conversation()
    talk.ask("One?")
    talk.answered("1", None)
    return talk


def test_a_context_that_is_nearly_full_is_said_before_the_answer() -> None:
    talk = conversation(max_tokens=100)
    assert talk.warning(900) is None
    assert talk.warning(901) == (
        "context nearly full: 901 of 1000 tokens are used, the answer can have 99; "
        "/clear starts anew"
    )


def test_a_question_beyond_the_context_is_refused_and_forgotten() -> None:
    talk = conversation()
    with pytest.raises(OptionError, match=r"has 1017 tokens and the model's context 1000: /clear"):
        talk.ask("x" * 1000)
    assert talk.messages == []


def test_statistics_of_the_last_answer_and_of_all() -> None:
    talk = conversation()
    for _ in range(2):
        stats = DraftStats()
        stats.record(3, drafted=4)
        talk.ask("?")
        talk.answered("!", stats)
    shown = talk.command("/stats").text
    assert "1 (passes of the model), 3 tokens" in shown
    assert "2 (passes of the model), 6 tokens" in shown


def test_three_quotes_hold_several_lines() -> None:
    assert unfinished('"""') and unfinished('"""one') and unfinished('"""one\ntwo')
    assert not unfinished('"""one"""') and not unfinished("one") and not unfinished("")
    assert unquoted('"""one\ntwo"""\n') == "one\ntwo"
    assert unquoted('"""\none\n"""') == "one"
    assert unquoted("plain\n") == "plain"


# The chat


def test_an_answer_streams_and_the_session_is_the_same_in_every_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FakeModel(answers=[["Hel", "lo"], ["Good", "bye"]])
    talking = talk(monkeypatch, model, "Hi", "Bye")
    out, err = capsys.readouterr()
    assert out == "Hello\nGoodbye\n"
    assert err.count("tokens per step") == 2
    assert model.prompts[1] == "[user]Hi[assistant]Hello[user]Bye[assistant]"
    assert all(call["session"] is talking.session for call in model.calls)


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FakeModel(answers=[["One ", "two ", "three"], ["four"]])
    model.before_piece = lambda i: signal.raise_signal(signal.SIGINT) if i == 1 else None
    before = signal.getsignal(signal.SIGINT)
    talking = talk(monkeypatch, model, "Count")
    out, err = capsys.readouterr()
    assert out == "One two \n"
    assert err.splitlines()[0] == "[stopped]"
    assert signal.getsignal(signal.SIGINT) is before
    assert talking.conversation.messages[-1]["content"] == "One two "
    model.before_piece = lambda index: None
    assert talking.say("Go on")
    assert model.prompts[1] == "[user]Count[assistant]One two [user]Go on[assistant]"
    assert capsys.readouterr().out == "four\n"


def test_ctrl_c_while_the_prompt_is_read_forgets_the_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FakeModel()

    def reading(index: int) -> None:
        signal.raise_signal(signal.SIGINT)
        model.calls[-1]["prompt_progress_callback"](1, 2)

    model.before_piece = reading
    talking = talk(monkeypatch, model, "Read this")
    assert capsys.readouterr().err == "[stopped]\n"
    assert talking.conversation.messages == []


def test_a_second_ctrl_c_does_not_wait_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()

    def twice(index: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    model.before_piece = twice
    talking = talk(monkeypatch, model)
    with pytest.raises(KeyboardInterrupt):
        talking.say("Read this")
    assert talking.conversation.messages == []


def test_an_error_forgets_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(error=OptionError("the prompt is too long"))
    talking = talk(monkeypatch, model)
    with pytest.raises(OptionError):
        talking.say("Hi")
    assert talking.conversation.messages == []


def test_without_a_terminal_every_line_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    model = install(monkeypatch, FakeModel(answers=[["a", "b", "c"], ["d"]]))
    lines = '/set temp 0.5\nOne?\n\n"""\nTwo\nlines?\n"""\n'
    result = CliRunner().invoke(cli.app, ["chat"], input=lines)
    assert (result.exit_code, result.stdout) == (0, "abc\nd\n")
    assert result.stderr.startswith("temp = 0.5\n" + SUMMARY)
    assert "\x1b" not in result.output
    assert model.prompts[1].endswith("[user]Two\nlines?[assistant]")
    assert model.calls[0]["temp"] == 0.5


def test_without_a_terminal_an_error_is_told_and_exits_with_1_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = install(monkeypatch, FakeModel(error=OptionError("too long")))
    result = CliRunner().invoke(cli.app, ["chat", "-q"], input="One?\nTwo?\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: too long\nerror: too long\n"
    assert len(model.calls) == 2


def test_exit_leaves_the_rest_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = install(monkeypatch, FakeModel())
    result = CliRunner().invoke(cli.app, ["chat", "-q"], input="/exit\nOne?\n")
    assert (result.exit_code, result.output, model.calls) == (0, "", [])


@pytest.mark.parametrize(
    ("keys", "prompts"),
    [
        ("Hi\r\x04", ["[user]Hi[assistant]"]),
        ("one\x1b\rtwo\r\x04", ["[user]one\ntwo[assistant]"]),
        ('"""one\rtwo"""\r\x04', ["[user]one\ntwo[assistant]"]),
        ("\x1b[200~one\ntwo\x1b[201~\r\x04", ["[user]one\ntwo[assistant]"]),
        ("not this\x03Hi\r/exit\r", ["[user]Hi[assistant]"]),
        ("/nonsense\r\x04", []),
    ],
    ids=["enter", "alt-enter", "quotes", "paste", "ctrl-c", "unknown command"],
)
def test_keys_of_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    keys: str,
    prompts: list[str],
) -> None:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    model = FakeModel()
    talking = talk(monkeypatch, model)
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        keyboard.send_text(keys)
        assert chat.read_terminal(talking, chat.prompt_session(keep_history=True)) == 0
    assert model.prompts == prompts
    assert ("Ctrl-D or /exit leaves" in capsys.readouterr().err) == ("\x03" in keys)
    assert (tmp_path / "history").is_file()


def test_no_history_writes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        chat.prompt_session(keep_history=False)
        assert not (tmp_path / "cache").exists()
        (tmp_path / "cache").write_text("a file where a folder should be")
        monkeypatch.setattr(sys, "stderr", said := io.StringIO())
        chat.prompt_session(keep_history=True)
    assert "no history is kept" in said.getvalue()
