"""`mlx-redrafter bench patterns`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_redrafter.cli.options import Json, ModelArgument
from mlx_redrafter.runtime.paths import BUILTIN, expanded


def command(
    *,
    model: ModelArgument = BUILTIN,
    out: Annotated[
        Path, typer.Option(callback=expanded, help="File to write the patterns to (JSON).")
    ],
    text: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Text to read.", show_default="Python's help topics"),
    ] = None,
    length: Annotated[
        int, typer.Option(help="How many tokens of it; patterns fit prompts of that length best.")
    ] = 4096,
    density: Annotated[
        float, typer.Option(help="Share of all query-key pairs that a head may look at.")
    ] = 0.35,
    plot: Annotated[
        Path | None,
        typer.Option(
            callback=expanded, help="Draw which pattern fits which head into this PNG or SVG file."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the sparse pattern of every head, for --sparse-prefill minference."""
    from mlx_redrafter.bench.prefill import patterns

    patterns.run(model, out, text, length, density, plot, as_json)
