"""`mlx-redrafter bench counts`: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_redrafter.cli.options import DrafterName, Json, ModelName
from mlx_redrafter.runtime.paths import BUILTIN


def command(
    model: ModelName = BUILTIN,
    drafter: DrafterName = "auto",
    shape: Annotated[
        str | None, typer.Option(help="One more tree: width,length,nodes[,lookup].")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache.")] = 1024,
    bits: Annotated[
        int | None,
        typer.Option(help="Count an unquantised model as if it had this many bits; 16: as stored."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Count every kind of drafter for a model of these sizes instead: llama-8b, "
            "qwen3-30b-a3b, qwen3.5-9b, or the config.json of a model. No weights are needed.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count what a decode step does. No Mac is needed; only host times are measured."""
    from mlx_redrafter.bench.counts import kinds, report

    if base is not None:
        kinds.run(base, context, as_json)
        return
    report.run(model, drafter, shape, context, bits, as_json)
