"""One prompt answered: the text on stdout, what a person reads beside it on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from mlx_redrafter.cli import remarks
from mlx_redrafter.cli.answer_writer import AnswerWriter
from mlx_redrafter.cli.options import DecodeOptions
from mlx_redrafter.terminal import console
from mlx_redrafter.terminal.progress import Waiting
from mlx_redrafter.text.template import has_template, prompt_ids

if TYPE_CHECKING:
    from mlx_redrafter.text.answer import GenerationResponse


def read(model: Any, tokenizer: Any, text: str, options: DecodeOptions, raw: bool) -> Any:
    """The question as the model reads it: token ids, or with ``raw`` the text itself.

    A base model continues the text too, and that is said.
    """
    if raw:
        return text
    if not has_template(tokenizer):
        console.note(remarks.no_template(model.name, options.system_prompt))
    system = options.system_prompt
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    return prompt_ids(tokenizer, messages, options.template_config(tokenizer))


def run(
    model: Any,
    tokenizer: Any,
    text: str,
    options: DecodeOptions,
    *,
    raw: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> None:
    """Answer ``text``; raises the errors of `stream_generate`."""
    from mlx_redrafter.api import stream_generate

    if model.drafting and model.drafter is None and not (quiet or as_json):
        console.note(remarks.no_drafter(model.name))
    if not raw:
        options = options.for_model(tokenizer, model.target.config.max_positions)
    prompt = read(model, tokenizer, text, options, raw)
    writer = AnswerWriter.after(tokenizer, prompt, terminal=sys.stdout.isatty())
    pieces, tokens, last, waiting = [], [], None, Waiting()
    arguments = {"prompt_progress_callback": waiting.on_progress, **options.arguments()}
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
        from mlx_redrafter.bench import reports

        print(json.dumps(reports.answer(model, options.seed, answer, tokens, last)))
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
