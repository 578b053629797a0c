"""The command line: which commands there are. Each is a file, imported when it is named."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import mlx_redrafter
from mlx_redrafter.cli import net
from mlx_redrafter.cli.lazy import Entry, Group
from mlx_redrafter.runtime import blas

USE, PREPARE = "Use a model", "Prepare and measure"
MOVED = {  # names of an older release
    "tune": "bench budget",
    "acceptance": "bench acceptance",
    "prefill-bench": "bench prefill",
    "prefill-search": "bench patterns",
}


class Commands(Group):
    """The commands in their order: what is wanted most comes first in every section."""

    package = "mlx_redrafter.cli"
    table = {  # noqa: RUF012
        "chat": Entry(USE, "Talk with a model; /help lists what you can type."),
        "generate": Entry(USE, "Answer one question: text on stdout, statistics on stderr."),
        "serve": Entry(USE, "Serve a model over HTTP, as OpenAI and Anthropic do."),
        "demo": Entry(USE, "Compare text and speed with and without drafting, on three tasks."),
        "race": Entry(USE, "Watch plain and drafted decoding side by side.", "race.command"),
        "info": Entry(USE, "Show a model, its drafter, and the memory they need."),
        "drafters": Entry(USE, "List published drafters, all or those for a model."),
        "train": Entry(PREPARE, "Train a drafter for any model, on this machine."),
        "convert": Entry(PREPARE, "Convert a model or a drafter: PyTorch, GGUF, TensorRT-LLM."),
        "shard": Entry(PREPARE, "Cut a model into one folder for each of several machines."),
        "doctor": Entry(PREPARE, "Test the installation, and a model on it."),
        "bench": Entry(PREPARE, "Measure speed, drafting and exactness here.", "bench.command"),
    }  # fmt: skip

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] in MOVED:
            raise net.moved(args[0], MOVED[args[0]])
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"mlx-redrafter {mlx_redrafter.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Run a language model with ReDrafter: the same text in fewer passes."""
    blas.status()  # a wrong MLX_REDRAFTER_BLAS is one line before any command


def main() -> None:
    """Entry point of the console scripts."""
    net.start(app)
