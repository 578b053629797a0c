"""Whatever goes wrong is one line and an exit code; the terminal is left as it was found."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModel, FakeTokenizer, install
from typer.testing import CliRunner

from mlx_redrafter.cli import chat, net
from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli.options import DecodeOptions
from mlx_redrafter.errors import HubError, OptionError
from mlx_redrafter.runtime import blas
from mlx_redrafter.runtime.checks import at_least
from mlx_redrafter.runtime.paths import cache_dir, user_path, write_whole
from mlx_redrafter.terminal import console

NOBODY = "~nobody_by_this_name/file"
REFUSED = f"{NOBODY} cannot be found, because ~nobody_by_this_name is nobody's home folder here"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    return install(monkeypatch, FakeModel())


def said(*arguments: str, **more: Any) -> tuple[int, str]:
    """Exit code and stderr of a command line."""
    result = CliRunner().invoke(cli.app, [*arguments], **more)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


# Errors


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (HubError("no such model:\n  give another"), "no such model: give another"),
        (KeyError("x"), "unexpected KeyError: 'x' (--debug shows where)"),
        (AssertionError(), "unexpected AssertionError (--debug shows where)"),
        (ValueError("[matmul] shapes\ndiffer"),
         "unexpected ValueError: [matmul] shapes differ (--debug shows where)"),
        (RecursionError("too deep"), "unexpected RecursionError: too deep (--debug shows where)"),
        (RuntimeError("\x1b[31m" + "x" * 1000),
         "unexpected RuntimeError: ?[31m" + "x" * 295 + " ... (--debug shows where)"),
        (OSError(28, "No space left on device", "some/file"),
         "some/file: no space left on device"),
        (PermissionError(13, "Permission denied"), "permission denied"),
        (MemoryError(), "out of memory: close other programs, or take a smaller model, a shorter "
         "prompt or fewer tokens"),
        (RuntimeError("[malloc] Unable to allocate 99 bytes."),
         "out of memory ([malloc] Unable to allocate 99 bytes.): close other programs, or take a "
         "smaller model, a shorter prompt or fewer tokens"),
    ],
)  # fmt: skip
def test_any_error_is_one_line_and_exit_code_1(
    model: FakeModel, error: Exception, line: str
) -> None:
    model.error = error
    assert said("generate", "Capital?") == (1, f"error: {line}\n")
    for where in (["--debug", "generate", "x"], ["generate", "--debug", "x"]):
        assert CliRunner().invoke(cli.app, where).exception is error
    assert said("generate", "Capital?")[0] == 1, "it does not stay on"


def test_wrong_usage_is_one_line_and_exit_code_2() -> None:
    for arguments, line in (
        (["genrate"], "no such command 'genrate'; did you mean 'generate'? (see root --help)"),
        (["convert"], "missing argument 'SRC' (see root convert --help)"),
        (["convert", "-o"], "option '-o' requires an argument (see root convert --help)"),
        (["train", "nonsense"], "no such command 'nonsense' (see root train --help)"),
    ):
        assert said(*arguments, prog_name="root") == (2, f"error: {line}\n")
    for arguments in (["generate", "--temp", "warm", "x"], ["bench", "speed", "--nonsense"]):
        code, err = said(*arguments)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert "Usage" in CliRunner().invoke(cli.app, []).output


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "-m", NOBODY, "x"],
        ["generate", "-d", NOBODY, "x"],
        ["generate", "--sparse-prefill", "minference", "--sparse-prefill-config", NOBODY, "x"],
        ["info", NOBODY],
        ["bench", "acceptance", "--prompts", NOBODY],
        ["race", "--save-svg", NOBODY, "x"],
        ["bench", "budget", "--plot", NOBODY],
        ["bench", "patterns", "--out", NOBODY],
        ["bench", "patterns", "--out", "x", "--text", NOBODY],
        ["bench", "speed", "--output", NOBODY],
        ["bench", "speed", "--prompts", NOBODY],
        ["bench", "prefill", "--json", NOBODY],
        ["convert", NOBODY, "-o", "x"],
        ["convert", "x", "-o", NOBODY],
        ["train", "--out", NOBODY],
        ["train", "--prompts", NOBODY],
        ["train", "--config", NOBODY],
        ["train", "fit", "--answers", NOBODY],
    ],
    ids=" ".join,
)
def test_a_path_of_nobody_is_one_line_everywhere(arguments: list[str]) -> None:
    code, err = said(*arguments)
    assert (code, err.count("\n")) == (1, 1) and err.startswith(f"error: {REFUSED}"), err


def test_paths_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a"
    assert user_path("a/~b") == Path("a/~b")
    with pytest.raises(OptionError, match="leave out the NUL byte"):
        user_path("a\0b")
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", NOBODY)
    with pytest.raises(OptionError, match="nobody's home folder"):
        blas._cache_folder()
    file = tmp_path / "a"
    file.write_text("before")
    with pytest.raises(UnicodeError):
        write_whole(file, "half\udce9")
    assert (file.read_text(), len(list(tmp_path.iterdir()))) == ("before", 1)
    write_whole(file, "after")
    assert (file.read_text(), len(list(tmp_path.iterdir()))) == ("after", 1)
    write_whole(Path("/dev/null"), "gone")


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MLX_REDRAFTER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_dir().name == f"mlx-redrafter-{os.getuid()}"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bench", "acceptance", "--count", "0"], "count 0 is not possible: use 1 or more"),
        (["bench", "acceptance", "--max-tokens", "-3"],
         "max_tokens -3 is not possible: use 1 or more"),
        (["demo", "--max-tokens", "0"], "max_tokens 0 is not possible: use 1 or more"),
        (["info", "--context", "0"], "context 0 is not possible: use 1 or more"),
        (["bench", "speed", "--count", "0"], "--count 0 is not possible: use 1 or more"),
        (["bench", "speed", "--rounds", "-1"], "--rounds -1 is not possible: use 1 or more"),
        (["train", "--eval-prompts", "0"], "eval_prompts 0 is not possible: use 1 or more"),
        (["bench", "prefill", "--min-context", "0"],
         "--min-context 0 is not possible: use 1 or more"),
        (["generate", "--system-prompt", "\udce9", "x"],
         "the system prompt is not UTF-8 text: convert it first (iconv)"),
        (["generate", "--stop", "\udce9", "x"],
         "the stop text is not UTF-8 text: convert it first (iconv)"),
    ],
)  # fmt: skip
def test_impossible_numbers_and_texts_are_refused(
    model: FakeModel, arguments: list[str], line: str
) -> None:
    assert said(*arguments) == (1, f"error: {line}\n")
    assert model.loaded == []


def test_the_range_check() -> None:
    at_least(1, count=1, rounds=None)
    with pytest.raises(OptionError, match="rounds 1 is not possible: use 2 or more"):
        at_least(2, count=2, rounds=1)


# The chat


def test_a_piped_chat_answers_every_later_line(model: FakeModel) -> None:
    model.answers = [["one"], ["two"], ["three"]]
    lines = b'\xef\xbb\xbffirst\r\ncaf\xe9\n"""\ncaf\xe9\n"""\n/load /nowhere\nsecond\nthird'
    result = CliRunner().invoke(cli.app, ["chat", "-q"], input=lines)
    assert (result.exit_code, result.stdout) == (1, "one\ntwo\nthree\n")
    unreadable = "error: the input is not UTF-8 text: convert it first (iconv)\n"
    assert result.stderr == unreadable * 2 + (
        "error: /nowhere cannot be read: No such file or directory\n"
    )
    assert model.prompts[2] == (
        "[user]first[assistant]one[user]second[assistant]two[user]third[assistant]"
    )


@pytest.mark.parametrize("error", [TypeError("no"), MemoryError(), RuntimeError("[eval] no")])
def test_a_turn_that_fails_in_any_way_costs_the_turn_alone(
    monkeypatch: pytest.MonkeyPatch, model: FakeModel, error: Exception
) -> None:
    def fail(index: int) -> None:
        if len(model.calls) == 2 and index == 1:
            raise error

    model.answers, model.before_piece = [["a"], ["b", "c"], ["d"]], fail
    result = CliRunner().invoke(cli.app, ["chat", "-q"], input="1\n2\n3\n")
    assert (result.exit_code, result.stdout) == (1, "a\nb\nd\n")
    assert result.stderr == f"error: {net.describe(error)}\n"
    assert model.prompts[2] == "[user]1[assistant]a[user]3[assistant]"
    sessions = [call["session"] for call in model.calls]
    assert sessions[0] is sessions[1] is not sessions[2], "a cache in an unknown state is left"


def test_a_template_that_fails_costs_the_turn_alone(
    monkeypatch: pytest.MonkeyPatch, model: FakeModel
) -> None:
    real = FakeTokenizer.apply_chat_template

    def failing(self: FakeTokenizer, messages: Any, **options: Any) -> list[int]:
        if "2" in str(messages[-1]["content"]):
            raise ZeroDivisionError("division by zero")
        return real(self, messages, **options)

    monkeypatch.setattr(FakeTokenizer, "apply_chat_template", failing)
    result = CliRunner().invoke(cli.app, ["chat", "-q"], input="1\n2\n3\n")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert model.prompts == ["[user]1[assistant]", "[user]1[assistant]Paris.[user]3[assistant]"]


def test_a_failed_retry_keeps_the_old_answer(model: FakeModel) -> None:
    talking = chat.Chat(model, model.tokenizer, DecodeOptions(), interactive=False, quiet=True)
    talking.say("Capital?")
    before = list(talking.conversation.messages)
    model.error = TypeError("no")
    with pytest.raises(TypeError):
        talking.say("/retry")
    assert talking.conversation.messages == before
    model.error, model.before_piece = None, lambda index: signal.raise_signal(signal.SIGINT)
    model.answers = [["", ""]]
    talking.say("/retry")
    assert talking.conversation.messages == before, "stopped before its first word"


def test_load_and_save_of_anything(tmp_path: Path, model: FakeModel) -> None:
    talking = chat.Chat(model, model.tokenizer, DecodeOptions(), interactive=False, quiet=True)
    talking.say("Capital?")
    before = list(talking.conversation.messages)
    for name, content in {
        "binary": b"\x00\xff\xfe" * 100, "list": b"[1, 2]", "number": b"7", "deep": b"[" * 10**5,
        "shape": b'{"messages": [{"role": "user"}]}', "cut": b'{"messages": [',
        "surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "types": b'{"messages": [{"role": ["user"], "content": "x"}]}',
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OptionError, match=f"{name} is not a saved conversation"):
            talking.say(f"/load {tmp_path / name}")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(10**9)
    os.mkfifo(tmp_path / "pipe")
    for line, message in {
        f"/load {tmp_path / 'huge'}": "not a saved conversation: it has 1000 MB",
        f"/load {tmp_path / 'pipe'}": "not a saved conversation: it is no regular file",
        f"/load {tmp_path}": "not a saved conversation: it is a folder",
        f"/load {NOBODY}": "is nobody's home folder here",
        "/load a\0b": "leave out the NUL byte",
        f"/save {tmp_path}": "cannot be written",
        "/save /dev/full": "/dev/full cannot be written: No space left on device",
        f"/save {tmp_path}/no/folder": "cannot be written: No such file or directory",
        f"/save {NOBODY}": "is nobody's home folder here",
    }.items():
        with pytest.raises(OptionError, match=message):
            talking.say(line)
    assert talking.conversation.messages == before


def test_a_history_that_breaks_costs_no_chat(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    file = tmp_path / "history"
    file.write_bytes(b"\x00\xff\xfe\n+caf\xe9\n#\n+\n")
    kept = chat._history(True)
    assert list(kept.load_history_strings()) == ["", "caf\ufffd"]
    kept.store_string("bad \udce9")
    assert "bad ?" in kept.load_history_strings()
    file.unlink()
    file.mkdir()
    kept.store_string("lost")
    assert list(kept.load_history_strings()) == []
    chat._history(True).store_string("in memory")
    assert "no history is kept" in capsys.readouterr().err


def test_notes_are_shown_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("two\nlines\x1b[2J \udce9")
    assert capsys.readouterr().err == "two\nlines?[2J ?\n"
