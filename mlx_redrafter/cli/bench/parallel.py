"""`mlx-redrafter bench parallel`: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from mlx_redrafter.cli.options import DrafterName, Json, ModelName
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import checks
from mlx_redrafter.runtime.paths import BUILTIN


def command(
    model: ModelName = BUILTIN,
    drafter: DrafterName = "auto",
    widths: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of answers at once.")
    ] = "1,2,4,8",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    rounds: Annotated[int, typer.Option(help="How often everything is timed, in turns.")] = 3,
    servers: Annotated[
        bool,
        typer.Option("--servers", help="Over HTTP too, beside mlx_lm's server on this model."),
    ] = False,
    beside: Annotated[
        int,
        typer.Option(
            metavar="TOKENS", help="A short request beside a prompt of so many tokens too; 0: not."
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Time answers at once: one after the other, together, together and drafted."""
    from mlx_redrafter.bench import parallel

    checks.at_least(1, max_tokens=max_tokens, rounds=rounds)
    checks.at_least(0, beside=beside)
    try:
        numbers = [int(part) for part in widths.split(",")]
    except ValueError:
        raise OptionError(
            f"--widths {widths} is not possible: give numbers of answers at once, such as 1,2,4,8"
        ) from None
    parallel.run(model, drafter, numbers, max_tokens, rounds, servers, beside, as_json)
