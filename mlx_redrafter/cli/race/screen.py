"""What a race looks like: two texts side by side, coloured by how each token was produced."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlx_redrafter.cli.race.lanes import Piece, View
from mlx_redrafter.terminal import modes

# Blue and orange are told apart by colour-blind eyes too, on dark and light ground; bold without
# any colour.
ACCEPTED, BONUS = "bold color(32)", "color(166)"
NARROW = 80  # columns below which the texts stand one above the other
CAPTION = 3  # lines of figures below a text
PICTURE = (92, 60)  # columns and lines of a saved picture, the most of both


def is_live(out: Console) -> bool:
    """Can a frame be drawn over the last one?"""
    return out.is_terminal and not out.is_dumb_terminal


@contextlib.contextmanager
def screen(out: Console) -> Iterator[Callable[[Sequence[View]], None]]:
    """Within, the context draws views over one another, when it is called and not otherwise: a
    thread that draws would take time from the decoder whose turn it is."""
    with modes.silent(), Live(console=out, auto_refresh=False, vertical_overflow="crop") as live:
        yield lambda views: live.update(frame(views, out), refresh=True)


def frame(views: Sequence[View], out: Console) -> RenderableType:
    """All views and the legend, never more lines than the terminal has."""
    width, height = out.size
    rows = height - 2  # the legend, and the line that the cursor waits on
    side_by_side = width >= NARROW
    share = width // len(views) if side_by_side else width
    lines = rows - CAPTION - 2 if side_by_side else rows // len(views) - CAPTION - 2
    wrapped = [_wrap(view.pieces, share - 4, out) for view in views]
    tallest = max(len(text) for text in wrapped)
    shown = max(1, min(lines, tallest))
    boxes = [
        _box(view, text[-shown:], share, shown if side_by_side else min(shown, max(1, len(text))))
        for view, text in zip(views, wrapped, strict=True)
    ]
    if not side_by_side:
        return Group(*boxes, legend())
    grid = Table.grid()
    for _ in views:
        grid.add_column(width=share)
    grid.add_row(*boxes)
    return Group(grid, legend())


def _wrap(pieces: Sequence[Piece], width: int, out: Console) -> list[Text]:
    text = Text(overflow="fold")
    for drafted, run in groupby(pieces, key=lambda piece: piece.drafted):
        # An escape sequence in an answer must not reach the terminal.
        text.append(
            "".join(p.text for p in run).replace("\x1b", ""), ACCEPTED if drafted else BONUS
        )
    return list(text.wrap(out, max(1, width)))


def _box(view: View, lines: list[Text], width: int, height: int) -> RenderableType:
    panel = Panel(
        Text("\n").join(lines), title=view.name, title_align="left", border_style="dim",
        width=width, height=height + 2,
    )  # fmt: skip
    per_step = f", {view.tokens_per_step:.2f} tokens per step" if view.steps < view.tokens else ""
    captions = (
        (f"{view.tokens} tokens · {view.seconds:.1f} s · {view.speed:.1f} tokens/s", "bold"),
        (f"{view.steps} steps{per_step}", ""),
        (view.status, "bold"),
    )
    below = [
        Text(f"  {line}", style, no_wrap=True, overflow="ellipsis") for line, style in captions
    ]
    return Group(panel, *below)


def legend() -> Text:
    """What the colours mean."""
    text = Text("  ", no_wrap=True, overflow="ellipsis")
    text.append("drafted and accepted", ACCEPTED).append(" · ")
    return text.append("bonus: the model's own, one per step", BONUS)


def title(question: str) -> Text:
    """The question on one line."""
    return Text(f"> {' '.join(question.split())}", no_wrap=True, overflow="ellipsis")


def table(views: Sequence[View]) -> Table:
    """The figures alone, for where nothing can be drawn."""
    rows = Table(box=None, pad_edge=False, header_style="dim")
    rows.add_column("")
    for heading in ("tokens", "seconds", "tokens/s", "tokens per step"):
        rows.add_column(heading, justify="right")
    for view in views:
        rows.add_row(
            view.name,
            str(view.tokens),
            f"{view.seconds:.2f}",
            f"{view.speed:.1f}",
            f"{view.tokens_per_step:.2f}",
        )
    return rows


def picture(question: str, views: Sequence[View], verdict: Sequence[str], conditions: str) -> str:
    """An SVG of one moment, with the verdict of the end below."""
    width, height = PICTURE
    out = Console(
        record=True, file=io.StringIO(), width=width, height=height, force_terminal=True,
        color_system="truecolor", highlight=False, no_color=False,
    )  # fmt: skip
    out.print(title(question))
    out.print(frame(views, out))
    out.print("\nIn the end:\n" + "\n".join(verdict), markup=False)
    out.print(Text(conditions, style="dim"))
    svg = out.export_svg(title="mlx-redrafter race")
    # It fetches nothing: without the fonts of a web site it takes the viewer's own.
    return re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)
