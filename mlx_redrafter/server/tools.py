"""How a model writes calls of tools, and how they are read out of its text."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_redrafter.errors import OptionError, one_line
from mlx_redrafter.server.events import Call

Tool = Mapping[str, Any]
"""In OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}."""

HERMES = "<tool_call>", "</tool_call>"
GENERIC = """\
You can call tools. They are described here, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write its name and arguments as a JSON object between these marks, and nothing after:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>
A call for each tool that you need; without one, answer as usual."""
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolFormat:
    """How calls are marked in a text, and read.

    Args:
        name: of it, as ``--tool-parser`` has it.
        start: what opens a call; "" where the whole answer is one.
        end: what closes it; "" where only the end of the answer does.
        parse: gives the calls in the text between the marks, one or several, each a dict with
            "name" and "arguments"; it may raise anything.
        described: does the chat template tell the model of its tools?
    """

    name: str
    start: str
    end: str
    parse: Callable[[str, Sequence[Tool]], Any]
    described: bool = True

    def calls(self, text: str, tools: Sequence[Tool]) -> list[Call]:
        """The calls in a text, none where it holds no whole one."""
        try:
            found = self.parse(text, tools)
            return [_call(each) for each in (found if isinstance(found, list) else [found])]
        except Exception:  # what a model wrote may break any parser: it is text then
            return []


def _call(found: Mapping[str, Any]) -> Call:
    name, arguments = found["name"], found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("not a call")
    written = json.dumps(arguments, ensure_ascii=False)
    written.encode()  # half a surrogate pair is no text
    return Call(new_id(), name, written)


def new_id() -> str:
    """Of a call: nine letters and digits, which Mistral's template demands."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


def _json(text: str, tools: Sequence[Tool]) -> Any:
    return json.loads(text.strip())


def _llama(text: str, tools: Sequence[Tool]) -> Any:
    """A whole answer that is one object with the name of a known tool."""
    found = json.loads(text.strip().removeprefix("<|python_tag|>"))
    if found["name"] not in [tool["function"]["name"] for tool in tools]:
        raise ValueError("no such tool")
    return found


FORMATS = {
    "hermes": ToolFormat("hermes", *HERMES, _json),
    "llama": ToolFormat("llama", "", "", _llama),
    "granite": ToolFormat("granite", "<|tool_call|>", "", _json),
    "generic": ToolFormat("generic", *HERMES, _json, described=False),
}
"""Those that are ours; the others are modules of mlx_lm.tool_parsers."""


def template_text(tokenizer: Any) -> str:
    """The chat template, or all of them."""
    template = getattr(tokenizer, "chat_template", None) or ""
    return template if isinstance(template, str) else "\n".join(map(str, template.values()))


def tool_format(tokenizer: Any, wanted: str | None = None) -> ToolFormat:
    """The format of a model: the one wanted, mlx_lm's choice, or what the chat template shows.

    A template that knows nothing of tools gets the generic one. Raises OptionError for a name that
    nobody knows.
    """
    if wanted is not None:
        return FORMATS.get(wanted) or _of_module(wanted)
    if tokenizer.tool_parser is not None:
        start, end = tokenizer.tool_call_start, tokenizer.tool_call_end
        name = str(getattr(tokenizer.tool_parser, "__module__", "")).rpartition(".")[2]
        return ToolFormat(name, start, end, tokenizer.tool_parser)
    text = template_text(tokenizer)
    if "tools" not in text:
        return FORMATS["generic"]
    if "<|python_tag|>" in text or '{"name": function name, "parameters"' in text:
        return FORMATS["llama"]
    if "<|tool_call|>" in text:
        return FORMATS["granite"]
    return FORMATS["hermes" if HERMES[0] in text else "generic"]


def check_format(wanted: str | None) -> None:
    """Raises OptionError for the name of a format that nobody knows."""
    if wanted is not None and wanted not in FORMATS:
        _of_module(wanted)


def _of_module(name: str) -> ToolFormat:
    import importlib
    import pkgutil

    from mlx_lm import tool_parsers

    known = [found.name for found in pkgutil.iter_modules(tool_parsers.__path__)]
    if name not in known:
        names = ", ".join(sorted([*FORMATS, *known]))
        raise OptionError(f"there is no tool parser {name!r}: use one of {names}")
    try:
        module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    except ImportError as error:
        raise OptionError(f"tool parser {name} cannot be loaded ({one_line(error)})") from None
    return ToolFormat(name, module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def described(tools: Sequence[Tool]) -> str:
    """The text that tells a model of tools where its template does not."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return GENERIC.format(tools=lines)
