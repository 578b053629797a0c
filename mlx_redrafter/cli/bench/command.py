"""`mlx-redrafter bench`: what can be measured. Each is a file, imported when it is named."""

from __future__ import annotations

from typing import Any

import typer

from mlx_redrafter.cli import net
from mlx_redrafter.cli.lazy import Entry, Group

HERE, PROMPTS, STEPS = "Speed and drafting", "Long prompts", "Steps"


class Measurements(Group):
    package = "mlx_redrafter.cli.bench"
    table = {  # noqa: RUF012
        "speed": Entry(HERE, "Time mlx_lm, plain and drafted decoding in turns."),
        "parallel": Entry(HERE, "Time answers at once, plain and drafted; servers too."),
        "acceptance": Entry(HERE, "Tokens per step by prompt group, tree and temperature."),
        "budget": Entry(HERE, "What steps cost here, and which trees are worth drafting."),
        "hosts": Entry(HERE, "Predict the speed over several machines, or time it there."),
        "prefill": Entry(PROMPTS, "Compare dense and sparse reading of long prompts."),
        "patterns": Entry(PROMPTS, "Find the sparse pattern of every head."),
        "needles": Entry(PROMPTS, "Ask what sparse reading forgets."),
        "exactness": Entry(STEPS, "Compare drafted, plain and mlx_lm's text token by token."),
        "counts": Entry(STEPS, "Count dispatches, bytes read and synchronisations of a step."),
    }

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for param in self.get_params(ctx) for name in param.opts}
        first = next((arg for arg in args if arg not in own), "")
        if first.startswith("-"):  # the options of an older release
            raise net.moved(f"bench {first}", f"bench speed {first}")
        return super().parse_args(ctx, args)


command = typer.Typer(cls=Measurements, no_args_is_help=True, add_completion=False)


@command.callback()
def bench() -> None:
    """Measure on this machine: speed, drafting, long prompts, exactness."""
