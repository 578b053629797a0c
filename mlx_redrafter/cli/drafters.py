"""`mlx-redrafter drafters`: which published drafters can be used, and with which model."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mlx_redrafter.cli.options import Json
from mlx_redrafter.terminal import console


def command(
    model: Annotated[
        str | None,
        typer.Argument(help="Only those for this model, or a copy of it.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List drafters that others have published, by the model that they are for.

    Use one with --drafter ID; a model's first is the one to try. Where the weights are a PyTorch
    file, `mlx-redrafter convert ID --out FOLDER` makes a drafter folder of them.
    """
    from mlx_redrafter.drafters import published

    rows = list(published.PUBLISHED if model is None else published.of_model(model))
    if as_json:
        typer.echo(json.dumps({"drafters": [row._asdict() for row in rows]}))
        return
    if not rows:
        console.show(
            f"no published drafter for {model} is known here; to see all that are: "
            "mlx-redrafter drafters"
        )
        return
    listed = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("for", "drafter", "kind", "size", "licence", "facts from"):
        listed.add_column(title, overflow="fold")
    for row in rows:
        size = f"{row.size:g} GB" if row.size else "-"
        listed.add_row(row.bases[0], row.id, row.kind, size, row.licence or "-", row.source)
    width = None if sys.stdout.isatty() else 1000
    Console(width=width, markup=False, highlight=False).print(listed)
