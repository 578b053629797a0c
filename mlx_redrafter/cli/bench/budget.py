"""`mlx-redrafter bench budget`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_redrafter.cli.options import DrafterName, Json, ModelName
from mlx_redrafter.runtime.paths import BUILTIN, expanded


def command(
    model: ModelName = BUILTIN,
    drafter: DrafterName = "auto",
    again: Annotated[
        bool, typer.Option("--again", help="Measure again what is known already.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Draw the cost curve into this PNG or SVG file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what steps cost on this machine and which trees are worth drafting."""
    from mlx_redrafter.bench import budget

    budget.run(model, drafter, again, plot, as_json)
