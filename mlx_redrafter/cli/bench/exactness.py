"""`mlx-redrafter bench exactness`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_redrafter.cli.options import DrafterName, ModelName, PromptFile
from mlx_redrafter.runtime.paths import BUILTIN, expanded


def command(
    model: ModelName = BUILTIN,
    drafter: DrafterName = "auto",
    prompts: PromptFile = None,
    count: Annotated[int, typer.Option(help="Number of prompts in total.")] = 40,
    max_tokens: Annotated[int, typer.Option(help="Longest greedy answer, in tokens.")] = 128,
    sampled: Annotated[int, typer.Option(help="Number of sampled answers in total.")] = 200,
    sampled_tokens: Annotated[int, typer.Option(help="Longest sampled answer.")] = 48,
    shard: Annotated[str, typer.Option(help="Only part i of n of all runs: i/n.")] = "0/1",
    output: Annotated[
        Path | None,
        typer.Option("--json", callback=expanded, help="JSON file for the report."),
    ] = None,
) -> None:
    """Compare drafted, plain and mlx_lm decoding token by token.

    Exit code 1 if a single token differs.
    """
    from mlx_redrafter.bench import exactness
    from mlx_redrafter.evaluation.prompts import DEV

    same = exactness.run(
        model, drafter, prompts or DEV, count, max_tokens, sampled, sampled_tokens, shard, output
    )
    raise typer.Exit(0 if same else 1)
