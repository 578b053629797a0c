"""What an answer may be, as the dialects ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_redrafter.errors import OptionError
from mlx_redrafter.server.problems import invalid, of_option, unsupported
from mlx_redrafter.text import grammar
from mlx_redrafter.text.grammar import Source

_KINDS = ("text", "json_object", "json_schema")
# vLLM's fields, the older and the newer ones, and llama.cpp's.
_FIELDS = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice",
    "guided_grammar": "grammar", "json_schema": "json", "grammar": "grammar",
}  # fmt: skip
_MADE: dict[str, Callable[[Any], Source]] = {
    "json": grammar.of_schema,
    "regex": grammar.of_regex,
    "grammar": grammar.of_grammar,
    "json_object": lambda wanted: grammar.of_schema(),
}


@dataclass(frozen=True)
class Form:
    """A grammar of the whole answer, and the field that asks for it."""

    source: Source
    param: str


def of_openai(body: Mapping[str, Any]) -> Form | None:
    """That of a request to OpenAI's older endpoints; raises Problem."""
    found = [
        _made(kind, body[name], name)
        for name, kind in _FIELDS.items()
        if body.get(name) is not None
    ]
    wanted = body.get("structured_outputs")
    if wanted is not None:
        if not isinstance(wanted, dict):
            raise invalid("structured_outputs is not an object", "structured_outputs")
        found += [
            _made(kind, wanted[kind], f"structured_outputs.{kind}")
            for kind in (*_MADE, "choice")
            if wanted.get(kind) not in (None, False)
        ]
    if (form := of_format(body.get("response_format"), "response_format")) is not None:
        found.append(form)
    if len(found) > 1:
        names = " and ".join(form.param for form in found)
        raise invalid(f"{names} cannot be followed at once: give one of them", found[-1].param)
    return found[0] if found else None


def of_format(form: Any, param: str) -> Form | None:
    """That of ``response_format``, and of what other dialects call it; raises Problem."""
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind not in _KINDS:
        raise unsupported(param, f'use {{"type": ...}} of {", ".join(_KINDS)}')
    if kind == "text":
        return None
    inner, place = form, param
    if isinstance(form.get("json_schema"), dict):
        inner, place = form["json_schema"], f"{param}.json_schema"
    schema = inner.get("schema")
    if schema is None and kind == "json_schema":
        raise invalid(f"{place}.schema is missing", f"{place}.schema")
    return _made("json", schema, param)


def _made(kind: str, wanted: Any, param: str) -> Form:
    if kind == "choice":
        texts = isinstance(wanted, list) and all(isinstance(text, str) for text in wanted)
        if not texts or not wanted:
            raise invalid(f"{param} is not possible: give a list of texts", param)
        return Form(grammar.one_of(wanted), param)
    try:
        return Form(_MADE[kind](wanted), param)
    except OptionError as error:
        raise of_option(error, param) from None
