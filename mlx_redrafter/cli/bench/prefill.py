"""`mlx-redrafter bench prefill`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_redrafter.cli.options import ModelName
from mlx_redrafter.runtime.paths import BUILTIN, expanded


def command(
    model: ModelName = BUILTIN,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, multiples of 128.")
    ] = "2048,4096,8192",
    modes: Annotated[
        str, typer.Option(help="Kinds of sparse reading; a_shape and tri_shape exist too.")
    ] = "trianglemix,xattention,minference",
    text: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Text to read.", show_default="Python's manual"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="How many times each is timed; with --quality it can be 0.",
            show_default="1; layer 7",
        ),
    ] = None,
    min_context: Annotated[
        int | None,
        typer.Option(
            help="Read sparsely from this token on.", show_default="a quarter of the length"
        ),
    ] = None,
    quality: Annotated[
        bool,
        typer.Option(
            "--quality",
            help="Also show recall and error by layer, compared with random, nearest and best "
            "blocks at equal density, and by tau, window and lines.",
        ),
    ] = False,
    layer: Annotated[
        bool, typer.Option("--layer", help="Time one attention layer at a long prefix instead.")
    ] = False,
    prefix: Annotated[
        int, typer.Option(help="Length of the prefix for --layer, in tokens.")
    ] = 32768,
    as_json: Annotated[
        Path | None,
        typer.Option("--json", callback=expanded, help="Write all results into this JSON file."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Draw time by length into this PNG or SVG file."),
    ] = None,
) -> None:
    """Compare dense and sparse reading of a long prompt on this machine.

    Time, the share of the query-key pairs that is scored (density), and how
    much of the attention these hold (recall). The built-in model takes about a
    minute for 2048 tokens on a CPU, and more than ten for 8192.
    """
    from mlx_redrafter.bench.prefill import run as measuring

    settings = measuring.Settings(
        model=model, lengths=measuring.numbers(lengths), modes=measuring.names(modes), text=text,
        rounds=rounds, min_context=min_context, quality=quality, layer=layer, prefix=prefix,
        json=as_json, plot=plot,
    )  # fmt: skip
    measuring.measure(settings)
