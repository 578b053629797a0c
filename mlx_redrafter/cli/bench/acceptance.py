"""`mlx-redrafter bench acceptance`: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_redrafter.cli.options import DrafterName, Json, ModelName, PromptFile
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.paths import BUILTIN


def command(
    model: ModelName = BUILTIN,
    drafter: DrafterName = "auto",
    prompts: PromptFile = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="Number of prompts in total, spread over the groups.", show_default="all"
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="Measure every draft too, and write into the drafter's folder what it yields: "
            "how much is drafted is chosen by that.",
        ),
    ] = False,
    sharing: Annotated[
        bool,
        typer.Option(
            "--sharing",
            help="Measure instead what beams that begin alike save, by beam width and length.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure a drafter's tokens per step, by prompt group, tree and temperature."""
    from mlx_redrafter.evaluation import report

    if sharing and record:
        raise OptionError("--sharing measures something else: give it without --record")
    if sharing:
        report.share(model, drafter, prompts, count, max_tokens, as_json)
        return
    report.run(model, drafter, prompts, count, max_tokens, record, as_json)
