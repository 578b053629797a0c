"""The command line. A command imports what it needs inside itself, so that --help is instant."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import mlx_redrafter
from mlx_redrafter import blas as matrix_library
from mlx_redrafter import console
from mlx_redrafter.console import DEBUG
from mlx_redrafter.errors import OptionError, RedrafterError
from mlx_redrafter.options import Blas, Debug, DecodeOptions, ModelOptions, flat_options

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + the signal, as a shell has it


class Commands(TyperGroup):
    """Turns what a user can get wrong into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except RedrafterError as error:
            if ctx.meta.get(DEBUG):
                raise
            console.error(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output has left; the flush at exit must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(PIPE_CLOSED) from None


# A command whose options are read by its own file.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    console.warn(f"warning: {message}")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"mlx-redrafter {mlx_redrafter.__version__}")
        raise typer.Exit


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
ModelName = Annotated[
    str, typer.Option("--model", "-m", help="Built-in name, local folder or hub id.")
]
DrafterName = Annotated[
    str, typer.Option("--drafter", "-d", help="Local folder or hub id; 'auto' looks for one.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(help='jsonl with "prompt" and "category".', show_default="92 built-in"),
]
Question = Annotated[str | None, typer.Argument(help="The question; '-' or nothing reads a pipe.")]
Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the text itself, without a chat template.")
]
BUILTIN = "smollm2-135m"
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No statistics on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="All statistics, on stderr.")]


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it, leave."),
    ] = False,
) -> None:
    """Run a language model with ReDrafter: the same text in fewer passes over the model."""
    matrix_library.status()  # a wrong MLX_REDRAFTER_BLAS is one line before any command


@app.command()
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
    """Answer one prompt: the text alone on stdout, statistics on stderr."""
    text = _read_prompt(prompt)
    options.check()
    model, tokenizer = source.load(options.tree())
    from mlx_redrafter.api import stream_generate
    from mlx_redrafter.waiting import Waiting

    ids = text if raw else _render(tokenizer, text, options.system_prompt)
    writer = console.AnswerWriter(
        (tokenizer.think_start, tokenizer.think_end), dim=sys.stdout.isatty()
    )
    pieces, tokens, last = [], [], None
    waiting = Waiting()
    arguments = {"prompt_progress_callback": waiting.on_progress, **options.arguments()}
    try:
        for last in stream_generate(model, tokenizer, ids, **arguments):
            waiting.word()
            pieces.append(last.text)
            tokens.append(last.token)
            if not as_json:
                writer.write(last.text)
    except KeyboardInterrupt:
        writer.close()
        console.write("\n")
        raise
    finally:
        waiting.close()
    assert last is not None, "a generation yields at least one response"
    if as_json:
        from mlx_redrafter import reports

        found = reports.answer(model, options.seed, "".join(pieces), tokens, last)
        typer.echo(json.dumps(found))
        return
    writer.close()
    console.write("\n")
    if not quiet:
        console.note(console.summary(last))
        if verbose:
            console.note(console.details(last.stats))


@app.command()
@flat_options
def chat(
    *,
    source: ModelOptions,
    options: DecodeOptions,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Do not keep what is typed in a file.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Talk with the model; /help lists the commands."""
    options.check()
    model, tokenizer = source.load(options.tree())
    from mlx_redrafter.chat import run

    raise typer.Exit(
        run(model, tokenizer, options, history=not no_history, quiet=quiet, verbose=verbose)
    )


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(help="Built-in name, local folder or hub id.")
    ] = "smollm2-135m",
    drafter: Annotated[
        str, typer.Option("--drafter", "-d", help="Local folder or hub id; 'auto' looks for one.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens to reckon the cache for.", show_default="longest")
    ] = None,
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Show a model, its drafter, whether they fit, and what they need of this machine."""
    from mlx_redrafter import info as report

    facts = report.collect(model, drafter, revision, context)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        report.show(facts)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Test this model too: built-in name, local folder or hub id.",
            show_default="built-in, if it is here",
        ),
    ] = None,
    drafter: DrafterName = "auto",
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Test the installation on this machine, and a model on it; exit code 1 if something fails."""
    from mlx_redrafter import doctor as tests

    checks = tests.examine(None if as_json else tests.show, model, drafter)
    if as_json:
        typer.echo(json.dumps(tests.as_dict(checks)))
    if any(check.mark == "fail" for check in checks):
        raise typer.Exit(1)


@app.command()
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
    """Answer three tasks, or your question, with and without drafting: text and speed compared."""
    from mlx_redrafter.demo import run

    run(source, prompt, max_tokens)


@app.command()
@flat_options
def race(
    *,
    prompt: Question = None,
    source: ModelOptions,
    options: DecodeOptions,
    raw: Raw = False,
    save_svg: Annotated[
        Path | None, typer.Option(help="Picture of the moment when the first one finishes.")
    ] = None,
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Decode plainly and with drafting side by side; exit code 1 if float32 texts differ."""
    text = _read_prompt(prompt)
    options.check()
    from mlx_redrafter import race as racing

    racing.check(source, options, save_svg)
    model, tokenizer = source.load(options.tree())
    ids = text if raw else _render(tokenizer, text, options.system_prompt)
    code = racing.run(
        model, tokenizer, ids, options, question=text, picture=save_svg, as_json=as_json
    )
    raise typer.Exit(code)


@app.command()
def acceptance(
    model: ModelName = BUILTIN,
    drafter: DrafterName = "auto",
    prompts: PromptFile = None,
    count: Annotated[int | None, typer.Option(help="So many prompts, of every group.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Measure tokens per step of the drafter: by prompt group, tree and temperature."""
    from mlx_redrafter import reports

    reports.acceptance(model, drafter, prompts, count, max_tokens, as_json)


@app.command()
def tune(
    model: ModelName = BUILTIN,
    drafter: DrafterName = "auto",
    again: Annotated[bool, typer.Option("--again", help="Measure even what is known.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the cost curve into this PNG or SVG file.")
    ] = None,
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Show what steps cost on this machine, and which trees are worth drafting."""
    from mlx_redrafter import tune as report

    report.run(model, drafter, again, plot, as_json)


@app.command("prefill-search")
def prefill_search(
    *,
    model: Annotated[str, typer.Argument(help="Built-in name, local folder or hub id.")] = BUILTIN,
    out: Annotated[Path, typer.Option(help="File for the patterns, in MInference's format.")],
    text: Annotated[
        Path | None, typer.Option(help="What to read.", show_default="Python's help topics")
    ] = None,
    length: Annotated[
        int, typer.Option(help="Tokens of it; patterns fit prompts of that length best.")
    ] = 4096,
    density: Annotated[
        float, typer.Option(help="Share of the pairs of dense attention that a head may score.")
    ] = 0.35,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what fits which head into this PNG or SVG file.")
    ] = None,
    as_json: Json = False,
    blas: Blas = None,
    debug: Debug = False,
) -> None:
    """Search the sparse pattern of every head for --sparse-prefill minference."""
    from mlx_redrafter import prefill_search as searching

    searching.run(model, out, text, length, density, plot, as_json)


@app.command(context_settings=PASSED_ON)
def bench(ctx: typer.Context) -> None:
    """Time mlx_lm, plain and drafted decoding, in turns in one process."""
    from mlx_redrafter.bench import command

    command.run(ctx)


@app.command("prefill-bench", context_settings=PASSED_ON)
def prefill_bench(ctx: typer.Context) -> None:
    """Compare dense and sparse reading of long prompts: time, density, recall."""
    from mlx_redrafter.prefill_bench import command

    command.run(ctx)


@app.command(context_settings=PASSED_ON)
def convert(ctx: typer.Context) -> None:
    """Convert a drafter or a base model: PyTorch, TensorRT-LLM or GGUF to MLX, and back."""
    from mlx_redrafter.convert import command

    command.run(ctx)


@app.command(context_settings=PASSED_ON)
def train(ctx: typer.Context) -> None:
    """Train a drafter for any model on this machine: prompts, answers, fit, evaluation."""
    from mlx_redrafter.training import command

    command.run(ctx)


def _render(tokenizer: Any, text: str, system: str | None) -> str | list[int]:
    """One question in the model's chat template; the text itself where it has none."""
    from mlx_redrafter.conversation import render

    if not tokenizer.has_chat_template:
        console.warn("note: this model has no chat template; it continues the text itself (--raw)")
        return text
    messages = [{"role": "system", "content": system}] if system else []
    return render(tokenizer, [*messages, {"role": "user", "content": text}])


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give it as an argument, or pipe it in", param_hint="PROMPT")
    if prompt in (None, "-"):
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeError:
            raise OptionError("the input is not UTF-8 text: convert it first (iconv)") from None
    assert prompt is not None
    if not prompt.strip():
        raise OptionError("the prompt is empty: give it as an argument, or pipe it in")
    try:
        prompt.encode()
    except UnicodeError:
        raise OptionError("the prompt is not UTF-8 text: convert it first (iconv)") from None
    return prompt


def main() -> None:
    """Entry point of the console scripts."""
    app()
