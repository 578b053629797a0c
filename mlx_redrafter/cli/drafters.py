"""`mlx-redrafter drafters`: which published drafters can be used, and with which model."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mlx_redrafter.cli.options import Json
from mlx_redrafter.terminal import console

if TYPE_CHECKING:
    from mlx_redrafter.drafters.published import Published


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="Only those for this model, or a copy of it.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List drafters that others have published, by the model that they are for.

    Use one with --drafter ID; a model's first is the one to try. Name a model to see more of its
    drafters. Where the weights are a PyTorch file, `mlx-redrafter convert ID --out FOLDER` makes a
    drafter folder of them.
    """
    from mlx_redrafter.drafters import published

    rows = list(published.PUBLISHED if model is None else published.of_model(model))
    if as_json:
        listed = [{**row._asdict(), "usable": row.usable} for row in rows]
        typer.echo(json.dumps({"drafters": listed}))
    elif rows:
        _show(rows, in_full=model is not None)
    else:
        small = published.small_member(model or "")
        member = f"a small model of its family (--drafter {small}) or " if small else ""
        console.show(
            f"no published drafter for {model} is known here: use {member}one of your own "
            f"(mlx-redrafter train -m {shlex.quote(model or '')}); to see all that are: "
            "mlx-redrafter drafters"
        )


def _show(rows: Sequence[Published], in_full: bool) -> None:
    """One line a drafter under its model; in full, also what is known of it. 80 columns do."""
    listed = Table(box=None, pad_edge=False, header_style="dim")
    first = "drafter, and its tokens per step as published" if in_full else "drafter"
    for title in (first, "kind", "size"):
        listed.add_column(title, overflow="fold")
    base = ""
    for row in rows:
        if row.bases[0] != base:
            base = row.bases[0]
            listed.add_row(base, style="bold")
        kind = row.kind + "*" * (not row.usable)
        listed.add_row(f"  {row.id}", kind, f"{row.size:g} GB" if row.size else "-")
        if in_full:
            known = f"facts from {row.source}"
            known += f"; licence {row.licence}" if row.licence else ""
            listed.add_row(f"    {row.figures or 'no figures'}", style="dim")
            listed.add_row(f"    {known}", style="dim")
            if row.pickled:
                listed.add_row("    a PyTorch file: convert it first", style="dim")
    width = None if sys.stdout.isatty() else 1000
    Console(width=width, markup=False, highlight=False).print(listed)
    if not all(row.usable for row in rows):
        console.show("* not read by this version of mlx-redrafter")
