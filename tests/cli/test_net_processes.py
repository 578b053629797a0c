"""Programs in processes of their own: pipes, terminals and signals."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_redrafter.terminal import modes as terminal

HERE = Path(__file__).parents[1] / "support"


# Streams

PROGRAM = """
import typer
from mlx_redrafter.terminal import console
from mlx_redrafter.cli import net
app = typer.Typer(cls=net.Commands, pretty_exceptions_enable=False)
@app.command()
def say(text: str) -> None:
    console.write(text + "\\n")
    console.note(f"noted: {text}")
@app.command()
def show(text: str) -> None:
    print(text)
@app.command()
def repeat() -> None:
    for line in console.input_lines():
        console.write(console.decoded(line))
net.start(app)
"""


def shell(line: str, **env: str) -> tuple[int, bytes, bytes]:
    """The exit code, output and errors of a small program, {}, with a shell's redirections."""
    program = f"{sys.executable} -c '{PROGRAM}'"
    done = subprocess.run(
        ["sh", "-c", line.replace("{}", program)], capture_output=True,
        env={**os.environ, **env}, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("size", ["0", "00", "", "-1", "x", "\u00b2", "9" * 5000])
def test_a_screen_without_a_size_shows_every_line(size: str) -> None:
    code, out, err = shell("{} say hello", COLUMNS=size, LINES=size)
    assert (code, out, err) == (0, b"hello\n", b"noted: hello\n")


LOST = "error: standard output cannot be written: "


@pytest.mark.parametrize(
    ("line", "code", "err"),
    [
        ("{} say x > /dev/full", 1, LOST + "no space left on device"),
        ("{} show x > /dev/full", 1, LOST + "no space left on device"),
        ("{} --help > /dev/full", 1, LOST + "no space left on device"),
        ("{} say x >&-", 1, LOST + "bad file descriptor"),
        ("{} repeat <&-", 1, "error: standard input cannot be read (Bad file descriptor)"),
        ("{} say x <&- >&- 2>&-", 1, ""),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_full_and_closed_streams(line: str, code: int, err: str, unbuffered: str) -> None:
    told = f"{err}\n".encode() if err else b""
    assert shell(line, PYTHONUNBUFFERED=unbuffered) == (code, b"", told)


def test_errors_that_nobody_can_read_cost_no_answer() -> None:
    assert shell("{} say x 2> /dev/full") == (0, b"x\n", b"")
    assert shell("{} say x 2>&- <&-") == (0, b"x\n", b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict"])
def test_what_a_terminal_cannot_show_is_replaced(encoding: str) -> None:
    told = (0, "caf\xe9 ?\n" if encoding != "ascii" else "caf? ?\n")
    code, out, err = shell("{} say 'caf\xe9 \u4f60'", PYTHONIOENCODING=encoding)
    assert (code, out.decode("latin-1")) == told
    assert err.decode("latin-1") == f"noted: {told[1]}"


def test_input_in_ascii_is_read_as_utf_8() -> None:
    """What stdin is said to be where nothing is set; the letters of a pipe are UTF-8."""
    assert shell("printf 'caf\xe9\n' | {} repeat", PYTHONIOENCODING="ascii")[:2] == (0, b"caf?\n")


def test_a_temporary_folder_that_is_none_is_not_used() -> None:
    code, out, err = shell("{} show x", TMPDIR="/no/such/folder")
    assert (code, out) == (0, b"x\n")
    assert err.startswith(
        b"warning: TMPDIR=/no/such/folder is not a folder that can be written: using "
    )


def test_a_chat_whose_output_is_lost_ends_at_once() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} {HERE / 'terminal_chat.py'} 0 chat -q > /dev/full"],
        input=b"1\n2\n", capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    lost = f"{LOST}no space left on device\n".encode()
    assert (done.returncode, done.stderr) == (1, lost)


# Terminals


class Terminal:
    """A pseudo-terminal with a program on it."""

    def __init__(self, *arguments: str, job: bool = False) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            script = str(HERE / "terminal_chat.py")
            line = [sys.executable, script, *(["--job"] if job else []), *arguments]
            os.execve(sys.executable, line, {**os.environ, "TERM": "xterm"})
        self.text = ""

    def until(self, found: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not found():
            assert time.monotonic() < end, self.text
            if select.select([self.fd], [], [], 0.02)[0]:
                with contextlib.suppress(OSError):  # it has left
                    data = os.read(self.fd, 65536)
                    self.text += data.decode(errors="replace")
                    if "\x1b[6n" in data.decode(errors="replace"):
                        os.write(self.fd, b"\x1b[1;1R")  # where the cursor is

    def see(self, text: str) -> None:
        self.until(lambda: text in self.text)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    @property
    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.fd)

    @property
    def echoes(self) -> bool:
        return bool(self.modes[3] & termios.ECHO)

    def left(self) -> int:
        """The exit code."""
        status: list[int] = []

        def gone() -> bool:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            status.extend([code] if pid else [])
            return bool(pid)

        self.until(gone)
        return os.waitstatus_to_exitcode(status[0])


@contextlib.contextmanager
def chatting(*, job: bool = False) -> Iterator[tuple[Terminal, list[Any]]]:
    """A chat at its prompt, and the terminal's modes from before."""
    screen = Terminal("0.1", "chat", "-q", "--no-history", job=job)
    before = screen.modes
    try:
        screen.see("/help lists the commands")
        screen.until(lambda: screen.modes != before)
        yield screen, before
    finally:
        os.close(screen.fd)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("SIGHUP", "SIGQUIT")]


@pytest.mark.parametrize("number", ["SIGTERM", *SLOW])
def test_a_signal_during_an_answer_gives_the_terminal_back(number: str) -> None:
    with chatting() as (screen, before):
        screen.type("Count\r")
        screen.see("word2")
        assert not screen.echoes
        os.kill(screen.pid, getattr(signal, number))
        assert screen.left() == 128 + getattr(signal, number)
        assert screen.modes == before
        assert "Traceback" not in screen.text


def test_a_signal_at_the_prompt_gives_the_terminal_back() -> None:
    with chatting() as (screen, before):
        os.kill(screen.pid, signal.SIGTERM)
        assert screen.left() == 143
        assert screen.modes == before
        assert "Traceback" not in screen.text


@pytest.mark.slow
def test_a_stopped_chat_gives_the_terminal_back_and_goes_on() -> None:
    with chatting(job=True) as (screen, before):
        screen.type("Count\r")
        screen.see("word2")
        os.kill(os.tcgetpgrp(screen.fd), signal.SIGTSTP)
        screen.see("stopped True, echo True")
        screen.see("word9")
        assert not screen.echoes
        screen.see("word19")
        screen.until(lambda: not screen.modes[3] & termios.ICANON)  # the prompt is back
        screen.type("\x04")
        screen.see("left 0, echo True")
        assert screen.left() == 0
        assert screen.modes == before


def test_signals_that_are_ignored_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminal.kept():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            assert callable(signal.getsignal(signal.SIGTERM))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_at_any_time_is_quiet() -> None:
    with chatting() as (screen, before):
        screen.type("Count\r")
        screen.see("word2")
        for _ in range(2):
            os.kill(screen.pid, signal.SIGINT)
            time.sleep(0.05)
        screen.see("Ctrl-D or /exit leaves")
        screen.until(lambda: not screen.modes[3] & termios.ICANON)  # the prompt is back
        screen.type("\x04")
        assert screen.left() == 0
        assert screen.modes == before
        assert "Traceback" not in screen.text


def test_ctrl_c_before_a_program_has_begun_is_quiet() -> None:
    code = "import signal, sys; sys.argv = {!r}; import mlx_redrafter\nsignal.raise_signal(2)"
    for argv, quiet in ((["bin/mlx-redrafter", "chat"], True), (["notebook"], False)):
        done = subprocess.run([sys.executable, "-c", code.format(argv)], capture_output=True)
        assert done.returncode == -signal.SIGINT
        assert (done.stderr == b"") is quiet
