"""`mlx-redrafter bench needles`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_redrafter.cli.options import ModelName
from mlx_redrafter.runtime.paths import BUILTIN, expanded


def command(
    model: ModelName = BUILTIN,
    lengths: Annotated[str, typer.Option(help="Lengths of the texts, in tokens.")] = "1024 2048",
    depths: Annotated[
        str, typer.Option(help="Where the answer is: 0 at the beginning, 1 at the end.")
    ] = "0.1 0.5 0.9",
    tasks: Annotated[
        str | None, typer.Option(help="Tasks, separated by commas.", show_default="all")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Cases of every task, length and depth.")] = 1,
    min_context: Annotated[int, typer.Option(help="Read this many tokens densely first.")] = 512,
    patterns: Annotated[
        Path | None,
        typer.Option(
            callback=expanded, help="A file for mode minference, as bench patterns writes it."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--json", callback=expanded, help="JSON file for all results."),
    ] = None,
) -> None:
    """Answer questions about long prompts densely and with every sparse prefill."""
    from mlx_redrafter.bench.prefill import needles

    needles.run(model, lengths, depths, tasks, seeds, min_context, patterns, output)
