"""What a person reads beside the text: statistics, warnings and errors, all on stderr."""

from __future__ import annotations

import codecs
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mlx_redrafter.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from mlx_redrafter.api import GenerationResponse
    from mlx_redrafter.stats import DraftStats, PrefillStats
    from mlx_redrafter.tree.shape import TreeShape

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


def drafts_from(drafter: str | None, tree: TreeShape | None) -> str:
    """What drafts, in a few words: the trained drafter of that name, the text itself, both; ""."""
    sources = []
    if drafter is not None and (tree is None or tree.depth):
        sources.append(drafter)
    if tree is None or tree.lookup:
        sources.append("the text itself")
    return " and ".join(sources)


def drafter_name(folder: Path | None) -> str | None:
    """The hub id of a drafter's folder, or its name; None where there is no drafter."""
    if folder is None:
        return None
    if folder.parent.name == "snapshots" and (hub := folder.parent.parent.name).count("--") == 2:
        return "/".join(hub.split("--")[1:])
    return f"{folder.parent.name}/{folder.name}" if folder.name == "drafter" else folder.name


def no_drafter(model: str) -> str:
    """What to say once of a model for which no trained drafter was found."""
    return (
        f"no trained drafter for {model} was found, so drafts come from the text itself; to train "
        f"one: mlx-redrafter train -m {shlex.quote(model)}, to use one: --drafter FOLDER-OR-ID"
    )


def no_template(model: str, system_prompt: str | None = None) -> str:
    """What to say once of a base model."""
    without = ", without the system prompt" if system_prompt else ""
    return f"note: {model} has no chat template, so it continues the text as it stands{without}"


def cut_thought(tokens: int, limit: int, how: str) -> str:
    """What to say of an answer that ends before its thought; ``how`` to allow a longer one."""
    if limit < 0 or tokens < limit:
        return "the answer ended inside a thought: the model's context is full"
    return f"the answer ended inside a thought, at the limit of {limit} tokens: {how} allows more"


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


def summary(last: GenerationResponse) -> str:
    """Tokens, tokens per second and tokens per step of an answer, in one line."""
    read = last.stats.prefill_tokens
    new = f" ({read} new)" if 0 < read < last.prompt_tokens else ""
    parts = [
        f"{last.generation_tokens} token{'' if last.generation_tokens == 1 else 's'}",
        f"{last.generation_tps:.1f} tokens/s",
        f"{last.stats.tokens_per_step:.2f} tokens per step",
        f"prompt {last.prompt_tokens} tokens{new}, {last.prompt_tps:.1f} tokens/s",
    ]
    if last.peak_memory:
        parts.append(f"peak {last.peak_memory:.2f} GB")
    if last.finish_reason == "length":
        parts.append("ended by the token limit")
    return " · ".join(parts)


def details(stats: DraftStats) -> str:
    """Counts, acceptance and time split of an answer, one fact a line."""
    values = stats.as_dict()
    histogram = " ".join(f"{k}:{n}" for k, n in values["histogram"].items())
    depths = " ".join(f"{share:.0%}" for share in values["per_depth"])
    shapes = " · ".join(f"{name}: {n}" for name, n in values["shapes"].items())
    seconds = " · ".join(f"{name} {value:.2f}" for name, value in values["seconds"].items())
    rows = [
        ("prompt read", f"{stats.prefill_tokens} tokens"),
        ("steps", f"{stats.steps} (passes of the model), {stats.tokens} tokens"),
        ("tokens per step", f"{stats.tokens_per_step:.2f}"),
        (
            "drafts checked",
            f"{stats.drafted}, accepted {stats.accepted} ({stats.acceptance_rate:.1%})",
        ),
        ("steps by accepted", histogram or "-"),
        ("accepted by depth", depths or "-"),
        ("steps by shape", shapes or "-"),
        ("seconds", seconds),
    ]
    if stats.sparse_prefill is not None:
        rows.insert(1, ("sparse prefill", sparse_prefill(stats.sparse_prefill)))
    return "\n".join(f"  {name:<18}{value}" for name, value in rows)


def sparse_prefill(stats: PrefillStats) -> str:
    """What sparse prefill did with a prompt, in a few words."""
    text = f"{stats.mode}: {stats.sparse_chunks} of {stats.chunks} chunks"
    if stats.sparse_layers:
        text += f", in their sparse layers {stats.density:.0%} of the attention"
    reasons = ", ".join(f"{reason} {count}" for reason, count in stats.declined.most_common())
    return text + (f"; dense layer passes: {reasons}" if reasons else "")
