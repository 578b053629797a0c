"""`mlx-redrafter shard`: a folder for each machine, with its share of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mlx_redrafter.cli.options import ModelArgument
from mlx_redrafter.runtime.paths import expanded
from mlx_redrafter.terminal import console


def command(
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=expanded, help="New folder for all of them.")
    ],
    ranks: Annotated[int, typer.Option(help="Machines that share the model.")] = 2,
    split: Annotated[
        Literal["tensor", "pipeline"],
        typer.Option(help="Share every layer (tensor), or the layers (pipeline)."),
    ] = "pipeline",
    shares: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="What part each machine takes, such as 2,1.",
            show_default="equal parts",
        ),
    ] = None,
) -> None:
    """Write one folder for each machine, so that it stores and reads its part of a model only.

    Copy OUT/rank-1 to the second machine, to the same place, and so on; then give
    --model OUT --hosts.
    """
    from mlx_redrafter.distributed.sharding import shard
    from mlx_redrafter.distributed.split import Split, shares_of
    from mlx_redrafter.hub import resolve

    shard(resolve(model), out, ranks, Split(split, shares_of(shares)), console.note)
