"""The terminal's modes, and the signals that end or stop a program."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

try:
    import termios
except ImportError:  # no such terminals here
    termios = None  # type: ignore[assignment]

# Those that end a program by default and that a handler can answer.
ENDING = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGVTALRM",
          "SIGPROF")  # fmt: skip
_ECHO = 3  # where termios keeps it among a terminal's modes


def drop_unknown_size() -> None:
    """Take a COLUMNS or LINES that is no size out of the environment: at 0 columns, as a terminal
    without a size has them, rich prints nothing, errors included."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "1")):
            del os.environ[name]


def modes() -> list[Any] | None:
    """Of the terminal on standard input; None where there is none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if termios is not None and sys.stdin.isatty():
            with contextlib.suppress(termios.error):
                return termios.tcgetattr(sys.stdin)
    return None


def set_modes(wanted: list[Any] | None) -> None:
    """Put such modes back; nothing where they hold, or where the terminal is another program's."""
    if wanted is None or modes() in (None, wanted):
        return
    with contextlib.suppress(OSError, ValueError, termios.error):
        if os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp():
            termios.tcsetattr(sys.stdin, termios.TCSANOW, wanted)


def _give_back(wanted: list[Any] | None) -> None:
    """To whoever has it next, with a cursor and in its usual colour."""
    set_modes(wanted)
    if wanted is not None and os.isatty(2):
        with contextlib.suppress(OSError):
            os.write(2, b"\x1b[0m\x1b[?25h")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within, the terminal does not write ^C and what is typed ahead into the answer."""
    before = modes()
    if before is None:
        yield
        return
    try:
        set_modes([*before[:_ECHO], before[_ECHO] & ~termios.ECHO, *before[_ECHO + 1 :]])
        yield
    finally:
        set_modes(before)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within, a signal that ends the program unwinds it, with exit code 128 + signal; one that
    stops it gives the terminal back as it was, until the program goes on. So does the end."""
    before = modes()

    def leave(number: int, _: object) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        _give_back(before)
        raise SystemExit(128 + number)

    def pause(number: int, _: object) -> None:
        ours = modes()
        _give_back(before)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        signal.signal(number, pause)
        set_modes(ours)

    handlers = dict.fromkeys(ENDING, leave)
    if before is not None:
        handlers["SIGTSTP"] = pause  # type: ignore[assignment]
    replaced = {}
    if threading.current_thread() is threading.main_thread():
        for name, handler in handlers.items():
            number = getattr(signal, name, None)
            # nohup has some of them ignored.
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                replaced[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        set_modes(before)
        for number, old in replaced.items():
            signal.signal(number, old)
