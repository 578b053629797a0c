"""Options for the form of an answer: JSON by a schema, a pattern, a grammar."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.checks import checked_text
from mlx_redrafter.runtime.paths import expanded

MOST = 1 << 20  # bytes of a file


@dataclass(frozen=True)
class FormOptions:
    """What the answer may be; at most one."""

    json_schema: Annotated[
        Path | None,
        typer.Option(
            callback=expanded, metavar="FILE", help="Answer in JSON that is valid by this schema."
        ),
    ] = None
    regex: Annotated[
        str | None, typer.Option(help="Answer with a text that matches as a whole.")
    ] = None
    grammar: Annotated[
        Path | None,
        typer.Option(
            callback=expanded,
            metavar="FILE",
            help="Answer by a grammar, in Lark or GBNF.",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """By the names of `stream_generate`; raises OptionError."""
        schema = None if self.json_schema is None else _read("--json-schema", self.json_schema)
        grammar = None if self.grammar is None else _read("--grammar", self.grammar)
        if self.regex is not None:
            checked_text(self.regex, "--regex")
        given = {"json_schema": schema, "regex": self.regex, "grammar": grammar}
        return {name: value for name, value in given.items() if value is not None}


def made(model: Any, tokenizer: Any, prompt: Any, raw: bool, form: dict[str, Any]) -> Any:
    """The grammar of an answer; raises OptionError.

    Args:
        form: as `FormOptions.arguments` has it.
        raw: the answer goes on with a text, and has no thought in front.
    """
    from mlx_redrafter.text import grammar, template

    named = {name: form.get(name) for name in ("json_schema", "regex", "grammar")}
    source = grammar.asked(**named)
    assert source is not None, "one is given"
    if raw:
        return model.grammars(tokenizer).compiled(source)
    thought = template.thought_ahead(tokenizer, prompt)
    opened = template.opens_thought(tokenizer, prompt)
    return model.grammars(tokenizer).compiled(source, thought=thought, opened=opened)


def _read(option: str, path: Path) -> str:
    try:
        if path.stat().st_size > MOST:
            raise OptionError(f"{option} {path} is larger than {MOST >> 20} MiB")
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        why = getattr(error, "strerror", None) or "not text in UTF-8"
        raise OptionError(f"{option} {path} cannot be read ({why.lower()})") from None
