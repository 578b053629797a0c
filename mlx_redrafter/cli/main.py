"""The command line. A command imports what it needs inside itself, so that --help is instant."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mlx_redrafter
from mlx_redrafter.cli import net
from mlx_redrafter.cli.flat_options import flat_options
from mlx_redrafter.cli.net import Debug
from mlx_redrafter.cli.options import Blas, DecodeOptions, DrafterName, ModelName, ModelOptions
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import blas as matrix_library
from mlx_redrafter.runtime.checks import at_least, checked_text
from mlx_redrafter.runtime.paths import expanded
from mlx_redrafter.terminal import console

# As --help lists them: what is wanted most comes first in every group.
ORDER = (
    "chat", "generate", "demo", "race", "info", "train", "convert", "doctor", "prefill-search",
    "bench", "acceptance", "tune", "prefill-bench",
)  # fmt: skip


class Commands(net.Commands):
    """The commands in their order."""

    def list_commands(self, ctx: Any) -> list[str]:
        places = {name: place for place, name in enumerate(ORDER)}
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: places.get(name, len(places)))


# A command whose options are read by its own file.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

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


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        callback=expanded,
        help='Prompts to measure with: jsonl with "prompt" and "category".',
        show_default="92 built-in",
    ),
]
Question = Annotated[
    str | None,
    typer.Argument(help="The question; without one, or with '-', it is read from a pipe."),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the text as it stands, without a chat template.")
]
ModelArgument = Annotated[
    str, typer.Argument(help="Built-in name, local folder or Hugging Face id (org/name).")
]
BUILTIN = "smollm2-135m"
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no statistics on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print all statistics on stderr.")]
USE, PREPARE, MEASURE = "Use a model", "Prepare a model or a drafter", "Measure"


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Run a language model with ReDrafter: the same text in fewer passes over the model."""
    matrix_library.status()  # a wrong MLX_REDRAFTER_BLAS is one line before any command


@app.command(rich_help_panel=USE)
@flat_options
def generate(
    *,
    prompt: Question = None,
    source: ModelOptions,
    options: DecodeOptions,
    raw: Raw = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Answer one question: the text on stdout, statistics on stderr."""
    text = _read_prompt(prompt)
    options.check(raw)
    model, tokenizer = source.load(options.tree())
    from mlx_redrafter.cli import generating

    generating.run(
        model, tokenizer, text, options, raw=raw, as_json=as_json, quiet=quiet, verbose=verbose
    )


@app.command(rich_help_panel=USE)
@flat_options
def chat(
    *,
    source: ModelOptions,
    options: DecodeOptions,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Keep no file of what was typed.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Talk with a model; /help lists what you can type besides questions."""
    options.check()
    model, tokenizer = source.load(options.tree())
    from mlx_redrafter.cli.chat import run

    raise typer.Exit(
        run(model, tokenizer, options, history=not no_history, quiet=quiet, verbose=verbose)
    )


@app.command(rich_help_panel=USE)
def info(
    model: ModelArgument = BUILTIN,
    drafter: DrafterName = "auto",
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit of a Hugging Face id."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Length in tokens to size the cache for.", show_default="the model's longest"
        ),
    ] = None,
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Show a model and its drafter, whether they fit, and the memory they need."""
    from mlx_redrafter.cli import info as report

    at_least(1, context=context)
    facts = report.collect(model, drafter, revision, context)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        report.show(facts)


@app.command(rich_help_panel=PREPARE)
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Test this model too: built-in name, local folder or Hugging Face id.",
            show_default="built-in, if it is here",
        ),
    ] = None,
    drafter: DrafterName = "auto",
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Test the installation, and a model on it; exit code 1 if a check fails."""
    from mlx_redrafter.cli import doctor as tests

    checks = tests.examine(None if as_json else tests.show, model, drafter)
    if as_json:
        typer.echo(json.dumps(tests.as_dict(checks)))
    if any(check.mark == "fail" for check in checks):
        raise typer.Exit(1)


@app.command(rich_help_panel=USE)
@flat_options
def demo(
    *,
    prompt: Annotated[
        str | None, typer.Argument(help="A question of your own.", show_default=False)
    ] = None,
    source: ModelOptions,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Compare text and speed with and without drafting, on three tasks or your question."""
    from mlx_redrafter.cli.demo import run

    at_least(1, max_tokens=max_tokens)
    run(source, None if prompt is None else checked_text(prompt, "prompt"), max_tokens)


@app.command(rich_help_panel=USE)
@flat_options
def race(
    *,
    prompt: Question = None,
    source: ModelOptions,
    options: DecodeOptions,
    raw: Raw = False,
    save_svg: Annotated[
        Path | None,
        typer.Option(
            callback=expanded, help="Save a picture of the moment when the first one finishes."
        ),
    ] = None,
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Watch plain and drafted decoding side by side.

    Exit code 1 if the texts differ in float32.
    """
    text = _read_prompt(prompt)
    options.check(raw)
    from mlx_redrafter.cli import generating
    from mlx_redrafter.cli.race import contest as racing

    racing.check(source, options, save_svg)
    model, tokenizer = source.load(options.tree())
    ids = generating.read(model, tokenizer, text, options, raw)
    code = racing.run(
        model, tokenizer, ids, options, question=text, picture=save_svg, as_json=as_json
    )
    raise typer.Exit(code)


@app.command(rich_help_panel=MEASURE)
def acceptance(
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
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Measure a drafter's tokens per step, by prompt group, tree and temperature."""
    from mlx_redrafter.bench import reports

    at_least(1, count=count, max_tokens=max_tokens)
    reports.acceptance(model, drafter, prompts, count, max_tokens, as_json)


@app.command(rich_help_panel=MEASURE)
def tune(
    model: ModelName = BUILTIN,
    drafter: DrafterName = "auto",
    again: Annotated[
        bool, typer.Option("--again", help="Measure again what is known already.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Draw the cost curve into this PNG or SVG file."),
    ] = None,
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Show what steps cost on this machine and which trees are worth drafting."""
    from mlx_redrafter.bench import budget as report

    report.run(model, drafter, again, plot, as_json)


@app.command("prefill-search", rich_help_panel=PREPARE)
def prefill_search(
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
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Find the sparse pattern of every head, for --sparse-prefill minference."""
    from mlx_redrafter.bench.prefill import patterns as searching

    searching.run(model, out, text, length, density, plot, as_json)


@app.command(context_settings=PASSED_ON, rich_help_panel=MEASURE)
def bench(ctx: typer.Context) -> None:
    """Time mlx_lm, plain and drafted decoding in turns."""
    from mlx_redrafter.cli.bench import speed as command

    net.pass_on(command.app, ctx)


@app.command("prefill-bench", context_settings=PASSED_ON, rich_help_panel=MEASURE)
def prefill_bench(ctx: typer.Context) -> None:
    """Compare dense and sparse reading of long prompts."""
    from mlx_redrafter.cli.bench import prefill as command

    net.pass_on(command.app, ctx)


@app.command(context_settings=PASSED_ON, rich_help_panel=PREPARE)
def convert(ctx: typer.Context) -> None:
    """Convert a model or a drafter to MLX: PyTorch, GGUF, TensorRT-LLM."""
    from mlx_redrafter.cli import convert as command

    net.pass_on(command.app, ctx)


@app.command(context_settings=PASSED_ON, rich_help_panel=PREPARE)
def train(ctx: typer.Context) -> None:
    """Train a drafter for any model, on this machine."""
    from mlx_redrafter.cli import train as command

    net.pass_on(command.app, ctx)


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give it as an argument, or pipe it in", param_hint="PROMPT")
    if prompt in (None, "-"):
        prompt = console.decoded(b"".join(console.input_lines())).removesuffix("\n")
    assert prompt is not None
    if not prompt.strip():
        raise OptionError("the prompt is empty: give it as an argument, or pipe it in")
    return checked_text(prompt, "prompt")


def main() -> None:
    """Entry point of the console scripts."""
    net.start(app)
