"""Thoughts and calls of tools in the text of an answer, in whatever pieces it comes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mlx_lm.tool_parsers import json_tools, mistral, qwen3_coder

from mlx_redrafter.errors import OptionError
from mlx_redrafter.server.events import Call, Event, Gathered
from mlx_redrafter.server.reader import Reader, Reading
from mlx_redrafter.server.tools import FORMATS, ToolFormat, check_format, tool_format

THINK = ("<think>", "</think>")


def tool(name: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    described = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": described}}


TOOLS = [tool("get", city="string", days="integer"), tool("stop")]


def of_module(module: Any) -> ToolFormat:
    return ToolFormat("x", module.tool_call_start, module.tool_call_end, module.parse_tool_call)


def read(text: str, reading: Reading, size: int = 1) -> tuple[list[Event], Reader]:
    reader, events = Reader(reading), list[Event]()
    for at in range(0, len(text), size):
        reader.add(text[at : at + size])
        events += reader.taken()
    reader.end()
    return [*events, *reader.taken()], reader


def gathered(text: str, reading: Reading, size: int = 1) -> tuple[str, str, list[Any]]:
    """(thought, text, calls), the same in pieces of every size."""
    found = Gathered()
    for event in read(text, reading, size)[0]:
        found.take(event)
    return found.reasoning, found.text, [(c.name, json.loads(c.arguments)) for c in found.calls]


ONE = '<tool_call>\n{"name": "get", "arguments": {"city": "Zürich 😀", "days": 2}}\n</tool_call>'
TWO = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
CODER = "<tool_call>\n<function=get>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n" \
    "</parameter>\n</function>\n</tool_call>"  # fmt: skip
GET = ("get", {"city": "Zürich 😀", "days": 2})
OSLO = ("get", {"city": "Oslo", "days": 3})
STOP = ("stop", {})
LLAMA = '{"name": "get", "parameters": {"city": "Oslo", "days": 3}}'
MISTRAL = '[TOOL_CALLS] [{"name": "get", "arguments": {"city": "Oslo", "days": 3}}]'
HERMES, JSONS = FORMATS["hermes"], of_module(json_tools)
CASES = [
    ("plain", None, "one two ", ("", "one two ", [])),
    ("text with tools", HERMES, "one <tool two> ", ("", "one <tool two> ", [])),
    ("one", HERMES, ONE, ("", "", [GET])),
    ("mlx_lm's", JSONS, ONE, ("", "", [GET])),
    ("text before", HERMES, f"Let me see.\n\n{ONE}", ("", "Let me see.", [GET])),
    ("three", HERMES, f"{ONE}\n{TWO}\n{ONE}\n", ("", "", [GET, STOP, GET])),
    ("text behind", HERMES, f"{TWO}\n so it is", ("", "so it is", [STOP])),
    ("cut off", HERMES, ONE[:-20], ("", ONE[:-20], [])),
    ("marker cut off", HERMES, "x <tool_ca", ("", "x <tool_ca", [])),
    ("not JSON", HERMES, "<tool_call>{x}</tool_call>", ("", "<tool_call>{x}</tool_call>", [])),
    ("no name", HERMES, "<tool_call>{}</tool_call>", ("", "<tool_call>{}</tool_call>", [])),
    ("a list", HERMES, "<tool_call>[1]</tool_call>", ("", "<tool_call>[1]</tool_call>", [])),
    ("arguments as text", HERMES,
     '<tool_call>{"name": "get", "arguments": "{\\"days\\": 1}"}</tool_call>',
     ("", "", [("get", {"days": 1})])),
    ("thought", HERMES, f"<think>\nhm\n</think>\n\n{ONE}", ("hm\n", "", [GET])),
    ("thought and text", None, "<think>\nhm\n</think>\n\nYes. ", ("hm\n", "Yes. ", [])),
    ("call in a thought", HERMES, f"<think>a {TWO} b</think>Yes", (f"a {TWO} b", "Yes", [])),
    ("thought cut off", None, "<think>hm </thi", ("hm </thi", "", [])),
    ("coder", of_module(qwen3_coder), CODER, ("", "", [OSLO])),
    ("mistral", of_module(mistral), MISTRAL, ("", "", [OSLO])),
    ("mistral text", of_module(mistral), "Hi [TOOL_", ("", "Hi [TOOL_", [])),
    ("mistral two", of_module(mistral), '[TOOL_CALLS]stop[ARGS]{}[TOOL_CALLS]stop[ARGS]{}',
     ("", "", [STOP, STOP])),
    ("llama", FORMATS["llama"], LLAMA, ("", "", [OSLO])),
    ("llama tag", FORMATS["llama"], f"<|python_tag|>{LLAMA}", ("", "", [OSLO])),
    ("llama text", FORMATS["llama"], "Hi there", ("", "Hi there", [])),
    ("llama other JSON", FORMATS["llama"], '{"a": 1}', ("", '{"a": 1}', [])),
    ("llama unknown", FORMATS["llama"], '{"name": "x", "parameters": {}}',
     ("", '{"name": "x", "parameters": {}}', [])),
    ("granite", FORMATS["granite"], '<|tool_call|>[{"name": "stop", "arguments": {}}]',
     ("", "", [STOP])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("calls", "text", "wanted"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_in_pieces_of_every_size(
    calls: ToolFormat | None, text: str, wanted: tuple[str, str, list[Any]]
) -> None:
    reading = Reading(THINK, tools=TOOLS if calls else (), calls=calls)
    for size in {1, 2, 3, 5, 7, 11, len(text)}:
        assert gathered(text, reading, size) == wanted


@pytest.mark.parametrize("text", [ONE, f"<think>a</think>{TWO}", CODER, MISTRAL])
def test_split_at_every_place(text: str) -> None:
    """The same in two pieces, wherever it is cut."""
    calls = of_module(qwen3_coder) if text == CODER else HERMES
    calls = of_module(mistral) if text == MISTRAL else calls
    reading = Reading(THINK, tools=TOOLS, calls=calls)
    whole = gathered(text, reading, len(text))
    for cut in range(1, len(text)):
        reader, found = Reader(reading), Gathered()
        for piece in (text[:cut], text[cut:]):
            reader.add(piece)
        reader.end()
        for event in reader.taken():
            found.take(event)
        assert [c.name for c in found.calls] == [name for name, _ in whole[2]], cut
        assert (found.reasoning, found.text) == whole[:2], cut


def test_text_is_not_held_back() -> None:
    """Only what may become a marker, and white space that a call would make nothing of."""
    reader = Reader(Reading(THINK, tools=TOOLS, calls=HERMES))
    shown = []
    for piece in ("one", " two", " <", "b", ">\n", "x"):
        reader.add(piece)
        shown.append("".join(event.text for event in reader.taken()))  # type: ignore[union-attr]
    assert shown == ["one", " two", "", " <b", ">", "\nx"]


def test_a_prompt_that_opens_a_thought() -> None:
    reading = Reading(THINK, opened=True)
    assert gathered("\nhm</think>\nYes", reading, 3) == ("hm", "Yes", [])
    reader = Reader(reading)
    assert reader.thinking
    reader.add("hm</think>")
    assert not reader.thinking


def test_without_tools_a_call_is_text() -> None:
    assert gathered(ONE, Reading(THINK, calls=HERMES), 4) == ("", ONE, [])


def test_one_call_is_enough_where_that_is_wanted() -> None:
    events, reader = read(f"{TWO}{ONE}", Reading(tools=TOOLS, calls=HERMES, one_call=True))
    assert reader.done
    calls = [event for event in events if isinstance(event, Call)]
    assert calls[0].name == "stop"


def test_ids_are_nine_letters_and_digits() -> None:
    events, _ = read(f"{TWO}{TWO}", Reading(tools=TOOLS, calls=HERMES))
    ids = [event.id for event in events if isinstance(event, Call)]
    assert len(set(ids)) == 2
    assert all(len(id) == 9 and id.isalnum() for id in ids)


class Shown:
    """A tokenizer, as far as formats are found."""

    tool_parser: Any = None

    def __init__(self, template: Any) -> None:
        self.chat_template = template


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ content }}", "generic"),
        (None, "generic"),
        ("{% if tools %}{{ tools }} <|python_tag|>", "llama"),
        ("{% if tools %}<|tool_call|>", "granite"),
        ("{% if tools %}<tool_call>", "hermes"),
        ("{% if tools %}", "generic"),
        ({"default": "x", "tool_use": "{{ tools }} <tool_call>"}, "hermes"),
    ],
)
def test_which_format_a_template_has(template: Any, name: str) -> None:
    assert tool_format(Shown(template)).name == name
    assert tool_format(Shown(template), "mistral").start == "[TOOL_CALLS]"


def test_an_unknown_format() -> None:
    check_format("pythonic")
    check_format(None)
    with pytest.raises(OptionError, match="no tool parser 'x': use one of function_gemma"):
        check_format("x")
