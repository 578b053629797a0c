"""`mlx-redrafter generate`: the text on stdout, what a person reads beside it on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_redrafter.cli import question, remarks
from mlx_redrafter.cli.answer_writer import AnswerWriter
from mlx_redrafter.cli.form import FormOptions, made
from mlx_redrafter.cli.machines import MachineOptions
from mlx_redrafter.cli.options import DRAFTING, DecodeOptions, Json, ModelOptions, Quiet, Verbose
from mlx_redrafter.cli.question import Question, Raw
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.paths import expanded
from mlx_redrafter.terminal import console
from mlx_redrafter.terminal.progress import Waiting

if TYPE_CHECKING:
    from mlx_redrafter.text.answer import GenerationResponse

Prediction = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=DRAFTING,
        callback=expanded,
        help="File of what the answer may be, to draft from.",
    ),
]


def command(
    *,
    prompt: Question = None,
    source: ModelOptions,
    options: DecodeOptions,
    form: FormOptions,
    machines: MachineOptions,
    prediction: Prediction = None,
    raw: Raw = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Answer one question: the text on stdout, statistics on stderr."""
    text = "" if machines.elsewhere else question.asked(prompt)
    options.check(raw)
    asked = form.arguments()
    predicted = _read(prediction) if prediction is not None else None
    with machines.joined() as there:
        model, tokenizer = source.load(options.tree(), there)
        run(
            model, tokenizer, text, options, asked, raw=raw, as_json=as_json, quiet=quiet,
            verbose=verbose, prediction=predicted,
        )  # fmt: skip


def _read(file: Path) -> str:
    """A text; raises OptionError."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OptionError(f"--prediction {file} cannot be read ({why})") from None


def run(
    model: Any,
    tokenizer: Any,
    text: str,
    options: DecodeOptions,
    form: dict[str, Any] | None = None,
    *,
    raw: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    prediction: str | None = None,
) -> None:
    """Answer ``text``, in a form by `FormOptions`; raises the errors of `stream_generate`."""
    from mlx_redrafter.api import stream_generate

    if model.drafting and model.drafter is None and not (quiet or as_json):
        console.note(remarks.no_drafter(model.name))
    if not raw:
        options = options.for_model(tokenizer, model.target.config.max_positions)
    prompt = question.read(model, tokenizer, text, options, raw)
    writer = AnswerWriter.after(tokenizer, prompt, terminal=sys.stdout.isatty())
    pieces, tokens, last, waiting = [], [], None, Waiting()
    arguments = {"prompt_progress_callback": waiting.on_progress, **options.arguments()}
    if prediction is not None:
        arguments["prediction"] = prediction
    if form:
        arguments["grammar"] = made(model, tokenizer, prompt, raw, form)
    if (verbose or as_json) and not model.engine.same_bits:
        arguments["margins"] = True
    try:
        for last in stream_generate(model, tokenizer, prompt, **arguments):
            waiting.word()
            pieces.append(last.text)
            tokens.append(last.token)
            if not as_json:
                writer.write(last.text)
    except BaseException:
        if pieces and not as_json:
            writer.close()
            console.write("\n")
        raise
    finally:
        waiting.close()
    assert last is not None, "a generation yields at least one response"
    answer = "".join(pieces)
    if as_json:
        print(json.dumps(_as_dict(model, options.seed, answer, tokens, last)))
    else:
        writer.close()
        console.write("\n")
    if last.finish_reason == "length" and writer.in_thought(answer):
        limit = arguments["max_tokens"]
        console.warn(remarks.cut_thought(last.generation_tokens, limit, "--max-tokens"))
    if not (quiet or as_json):
        _report(last, verbose)


def _report(last: GenerationResponse, verbose: bool) -> None:
    console.note(remarks.summary(last))
    if verbose:
        console.note(remarks.details(last.stats))


def _as_dict(
    model: Any, seed: int, text: str, tokens: list[int], last: GenerationResponse
) -> dict[str, Any]:
    from mlx_redrafter.runtime.device import device

    return {
        "text": text,
        "tokens": tokens,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": round(last.prompt_tps, 2),
        "generation_tps": round(last.generation_tps, 2),
        "peak_memory_gb": round(last.peak_memory, 3),
        "stats": last.stats.as_dict(),
        "model": model.name,
        "drafter": str(model.drafter_folder) if model.drafter_folder else None,
        "device": device(),
        "seed": seed,
    }
