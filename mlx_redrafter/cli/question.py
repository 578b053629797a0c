"""The question of a command line: an argument or what is piped in, and as the model reads it."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from mlx_redrafter.cli import remarks
from mlx_redrafter.cli.options import DecodeOptions
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.checks import checked_text
from mlx_redrafter.terminal import console
from mlx_redrafter.text.template import has_template, prompt_ids

Question = Annotated[
    str | None, typer.Argument(help="The question; - or nothing: read from a pipe.")
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the text itself: no chat template.")]


def asked(prompt: str | None) -> str:
    """The text of the question; raises OptionError."""
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give it as an argument, or pipe it in", param_hint="PROMPT")
    if prompt in (None, "-"):
        prompt = console.decoded(b"".join(console.input_lines())).removesuffix("\n")
    assert prompt is not None
    if not prompt.strip():
        raise OptionError("the prompt is empty: give it as an argument, or pipe it in")
    return checked_text(prompt, "prompt")


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
