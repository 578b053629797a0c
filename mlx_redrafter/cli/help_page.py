"""The page of --help: one line an option where it fits, in sections, without boxes."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from rich.console import Console
from rich.text import Text

ARGUMENTS, OPTIONS, OTHER = "Arguments", "Options", "Other"
WIDEST, LEFT = 100, 30  # of a page, and of a name that has its help beside it
Row = tuple[str, str]
# As typer writes a type, by its version.
_TYPES = {
    "<str>": "TEXT", "<int>": "N", "<float>": "X", "<path>": "PATH", "<list[str]>": "TEXT",
    "<list[float]>": "X", "INTEGER": "N", "FLOAT": "X",
}  # fmt: skip
_WORDY = ", to copy it or customize the installation"  # typer's; a page fits a screen without it
# The names are the options' own: one sentence says so.
_VARIABLE = re.compile(r"\s+\\?\[env var: \w+\]$|env var: \w+;\s+")
_DEFAULT = re.compile(r"\s+\\?\[(?:default: )?\(?(.*?)(?:\.0)?\)?\]$")


def show(command: Any, ctx: Any, commands: dict[str, list[Row]]) -> None:
    """Print the page of a command; ``commands``: those of a group, by section."""
    out = Console(highlight=False)
    width = min(out.width, WIDEST)
    page = Text(command.get_usage(ctx)) + Text("\n\n")
    for paragraph in (command.help or "").split("\n\n"):
        page.append(textwrap.fill(" ".join(paragraph.split()), width) + "\n\n")
    for sections in (commands, _options(command, ctx)):
        names = [left for rows in sections.values() for left, _ in rows if len(left) <= LEFT]
        place = 4 + max(map(len, names), default=0)
        for title, rows in sections.items():
            page.append(f"{title}\n", "bold")
            for left, text in rows:
                page.append_text(_row(left, text, place, width))
    page.rstrip()
    out.print(page, soft_wrap=True)


def _row(left: str, text: str, place: int, width: int) -> Text:
    beside = len(left) + 4 <= place
    lines = textwrap.wrap(text, width - place) or [""]
    row = Text("  ").append(left, "cyan")
    row.append(" " * (place - len(row)) if beside else "\n" + " " * place)
    return row.append(("\n" + " " * place).join(lines) + "\n")


def _options(command: Any, ctx: Any) -> dict[str, list[Row]]:
    sections: dict[str, list[Row]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is None or getattr(param, "hidden", False):
            continue
        usual = OPTIONS if param.opts[0].startswith("-") else ARGUMENTS
        panel = OTHER if param.name == "help" else getattr(param, "rich_help_panel", None)
        sections.setdefault(panel or usual, []).append(_tidied(*record))
    if set(sections) <= {ARGUMENTS, OPTIONS, OTHER}:  # few are not worth two sections
        sections.setdefault(OPTIONS, []).extend(sections.pop(OTHER, []))
    return sections


def _tidied(left: str, text: str) -> Row:
    name, _, kind = left.rpartition(" ")
    if kind in _TYPES:
        left = f"{name} {_TYPES[kind]}"
    text = _VARIABLE.sub("", text).replace(_WORDY, "")
    return left.replace(" / ", ", "), _DEFAULT.sub(r" [\1]", text)
