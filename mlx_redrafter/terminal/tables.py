"""What is measured, on stdout: tables of numbers, and a bar while it lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mlx_redrafter.terminal import console


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; the context is the function that advances it."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda: bar.advance(task)


def table(first: str, *others: str) -> Table:
    """An empty table; the columns after the first hold numbers."""
    empty = Table(box=None, pad_edge=False, header_style="dim")
    empty.add_column(first, no_wrap=True)
    for title in others:
        empty.add_column(title, justify="right")
    return empty


def show(title: str, filled: Table, facts: dict[str, Any] | None = None) -> None:
    """A title and a table on stdout, the conditions in one line on stderr."""
    out = Console(highlight=False)
    out.print(title, style="bold")
    out.print(filled)
    if facts is not None:
        console.note(console.facts(facts))
