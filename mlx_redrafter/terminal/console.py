"""What a person reads beside the text: notes, warnings and errors, all on stderr."""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mlx_redrafter.errors import OptionError

_NAME = re.compile(r".{0,28} {2}(?=\S)")  # the first column of a line that has two


def _say(text: str, style: str) -> None:
    # What a file or a pipe said may be quoted: no escape sequence of it reaches the terminal.
    shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
    # Made anew each time, because stderr may have been replaced since.
    show(Text(shown, style=style), Console(stderr=True, highlight=False))


def show(text: Text | str, out: Console | None = None) -> None:
    """Lines on stdout, or ``out``, that break between words on a terminal and nowhere else.

    What follows a name and two spaces keeps its column.
    """
    out = Console(highlight=False) if out is None else out
    # As Text, in which neither [brackets] nor :names: mean anything.
    text = Text(text) if isinstance(text, str) else text
    if not out.is_terminal:
        out.print(text, soft_wrap=True)
        return
    for line in text.split("\n", allow_blank=True):
        name = _NAME.match(line.plain)
        out.print(line if name is None else _in_columns(line, name.end()))


def _in_columns(line: Text, place: int) -> Table:
    grid = Table.grid(Column(width=place, no_wrap=True), Column(overflow="fold"))
    grid.add_row(line[:place], line[place:])
    return grid


def error(text: str) -> None:
    """One red line on stderr."""
    _say(f"error: {' '.join(text.split())}", "red")


def warn(text: str) -> None:
    """One yellow line on stderr."""
    _say(text, "yellow")


def note(text: str) -> None:
    """One dim line on stderr."""
    _say(text, "dim")


def facts(known: Mapping[str, Any], *names: str) -> str:
    """The conditions of a measurement, all or those named, in one line; what is None is left out:
    no drafter, or no BLAS where the GPU multiplies."""
    shown = {name: known.get(name) for name in names or known}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def write(text: str) -> None:
    """A piece of an answer, as it is, to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def input_lines() -> Iterator[bytes]:
    """Standard input as it is. Raises OptionError where it cannot be read."""
    try:
        yield from sys.stdin.buffer
    except OSError as error:
        raise OptionError(f"standard input cannot be read ({error.strerror})") from None


def decoded(data: bytes) -> str:
    """What was piped in, as text; raises OptionError."""
    encoding = sys.stdin.encoding or "utf-8"
    if codecs.lookup(encoding).name in ("ascii", "utf-8"):
        encoding = "utf-8-sig"  # without a byte order mark
    try:
        return data.decode(encoding).replace("\r\n", "\n")
    except UnicodeError:
        name = encoding.removesuffix("-sig").upper()
        raise OptionError(f"the input is not {name} text: convert it first (iconv)") from None
