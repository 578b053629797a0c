"""Calls of tools as a grammar, each in the model's own way of writing them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_redrafter.errors import OptionError
from mlx_redrafter.server.tools import Tool, ToolFormat
from mlx_redrafter.text.grammar import Source, of_schema, quoted

MOST = 8  # calls of an answer
Mark = Callable[[str], str]
"""A marker of a format, as a Lark grammar has it."""


def calls(
    how: ToolFormat, tools: Sequence[Tool], most: int, mark: Mark, template: str = ""
) -> Source:
    """One call or more of the tools.

    Args:
        how: calls are written.
        most: calls.
        mark: see `Mark`.
        template: the text of the chat template, where it tells one form from another.

    Raises:
        OptionError: a format whose grammar is not known.
    """
    if how.name not in _WRITTEN:
        raise OptionError(
            f"calls cannot be demanded of a model that writes them as this one ({how.name}): "
            "use a tool_choice of 'auto' or 'none'"
        )
    start, call, more = _WRITTEN[how.name](how, mark, template)
    again = f" ({more} call){{0,{most - 1}}}" if most > 1 and more else ""
    rules = [f"start: {start.format(call='call' + again)}"]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        rules += call(i, tool["function"])
    return {"lark_grammar": "\n".join(rules) + "\n"}


Rules = Callable[[int, Mapping[str, Any]], list[str]]
Written = tuple[str, Rules, str]
"""How a whole answer looks around its {call}, the rules of each, and what stands between two; "":
there is only one."""


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "object", **function["parameters"]}


def _schema(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps(of_schema(schema)["json_schema"])


def _object(key: str, before: str = "", behind: str = "") -> Rules:
    """{"name": NAME, "arguments": {...}}."""

    def rules(i: int, function: Mapping[str, Any]) -> list[str]:
        name = json.dumps(function["name"], ensure_ascii=False)
        begun = quoted(f'{{"name": {name}, "{key}": ')
        parts = [before, begun, f"arguments_{i}", quoted("}"), behind]
        return [
            f"call_{i}: {' '.join(part for part in parts if part)}",
            f"arguments_{i}: {_schema(_parameters(function))}",
        ]

    return rules


def _hermes(how: ToolFormat, mark: Mark, template: str) -> Written:
    before = f"{mark(how.start)} {quoted(chr(10))}"
    behind = f"{quoted(chr(10))} {mark(how.end)}"
    return "{call}", _object("arguments", before, behind), quoted("\n")


def _llama(how: ToolFormat, mark: Mark, template: str) -> Written:
    return "{call}", _object("parameters"), ""


def _granite(how: ToolFormat, mark: Mark, template: str) -> Written:
    return _list(mark(how.start)), _object("arguments"), quoted(", ")


def _list(mark: str) -> str:
    return f'{mark} "[" {{call}} "]"'


def _mistral(how: ToolFormat, mark: Mark, template: str) -> Written:
    """The newer form, NAME[ARGS]{...}, where the template writes it."""
    if "[ARGS]" not in template:
        return _list(f"{mark(how.start)} {quoted(' ')}"), _object("arguments"), quoted(", ")

    def rules(i: int, function: Mapping[str, Any]) -> list[str]:
        named = f"{mark(how.start)} {quoted(function['name'])} {mark('[ARGS]')}"
        schema = _schema(_parameters(function))
        return [f"call_{i}: {named} arguments_{i}", f"arguments_{i}: {schema}"]

    return "{call}", rules, '""'


def _qwen_coder(how: ToolFormat, mark: Mark, template: str) -> Written:
    """<function=NAME>, and a <parameter=NAME> for each; texts stand there as they are."""

    def rules(i: int, function: Mapping[str, Any]) -> list[str]:
        parameters = _parameters(function)
        shared = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
        body, values = [], []
        for j, (name, schema) in enumerate(parameters.get("properties", {}).items()):
            value = f"value_{i}_{j}"
            one = f"{quoted(f'<parameter={name}>{chr(10)}')} {value}"
            body.append(one if name in parameters.get("required", ()) else f"({one})?")
            values.append(_value(value, schema, shared))
        parts = [
            mark(how.start), quoted(f"\n<function={function['name']}>\n"), *body,
            quoted("</function>\n"), mark(how.end),
        ]  # fmt: skip
        return [f"call_{i}: {' '.join(parts)}", *values]

    return "{call}", rules, quoted("\n")


_CLOSED = "\n</parameter>\n"


def _value(rule: str, schema: Any, shared: Mapping[str, Any]) -> str:
    """The rule of a value and what closes it."""
    schema = schema if isinstance(schema, dict) else {}
    options = schema.get("enum")
    if schema.get("type") == "string" and isinstance(options, list):
        texts = " | ".join(quoted(str(option)) for option in options)
        return f"{rule}: ({texts}) {quoted(_CLOSED)}"
    if schema.get("type") == "string":  # a pattern cannot be followed where no quotes end it
        least, most = (schema.get(name) for name in ("minLength", "maxLength"))
        letters = f"/(.|\\n){{{least or 0},{'' if most is None else most}}}/"
        if most is not None:
            return f"{rule}: {letters} {quoted(_CLOSED)}"
        return f"{rule}[suffix={quoted(_CLOSED)}]: {letters}"
    inner = _schema({**shared, **schema})
    return f"{rule}: {rule}_json {quoted(_CLOSED)}\n{rule}_json: {inner}"


_WRITTEN: dict[str, Callable[[ToolFormat, Mark, str], Written]] = {
    "hermes": _hermes,
    "generic": _hermes,
    "json_tools": _hermes,
    "llama": _llama,
    "granite": _granite,
    "mistral": _mistral,
    "qwen3_coder": _qwen_coder,
}
