"""What clients send, in the form that chat templates take."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest
from scripted_engine import ChatBytes, ScriptedEngine

from mlx_redrafter.server.conversation import (
    conversation,
    short_id,
    with_tools_told,
    without_system,
)
from mlx_redrafter.server.prompts import Talk, of_talk
from mlx_redrafter.server.settings import Settings

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": "é"}'}}


def said(role: str, content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([said("user")], [said("user")]),
        ([said("developer", "a"), said("system", "b"), said("user")],
         [said("system", "a\n\nb"), said("user")]),
        ([said("user"), said("system", "now"), said("user", "y")],
         [said("user"), said("user", "now\n\ny")]),
        ([said("user"), said("assistant", "a"), said("system", "now")],
         [said("user"), said("assistant", "a"), said("user", "now")]),
        ([said("system", "only")], [said("system", "only"), said("user", "")]),
        ([said("user", [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}])],
         [said("user", "a\nb")]),
        ([said("user"), said("assistant", None)], [said("user"), said("assistant", "")]),
        ([said("user"), said("assistant", "a", reasoning_content="t", name="n")],
         [said("user"), said("assistant", "a", reasoning_content="t")]),
        ([said("user"), said("assistant", None, tool_calls=[CALL]),
          said("tool", "r", tool_call_id="call_1")],
         [said("user"), said("assistant", "", tool_calls=[{
             "id": short_id("call_1"), "type": "function",
             "function": {"name": "f", "arguments": {"a": "é"}}}]),
          said("tool", "r", tool_call_id=short_id("call_1"))]),
    ],
)  # fmt: skip
def test_messages(given: list[Any], wanted: list[Any]) -> None:
    assert conversation(given) == wanted


def test_ids_stay_the_same() -> None:
    """Mistral's template takes nine letters and digits; what is of that form is left alone."""
    assert short_id("aB3456789") == "aB3456789"
    assert short_id("call_1") == short_id("call_1") != short_id("call_2")
    for other in ("call_1", "toolu_01ABCDEFGHIJ", "", None, "é" * 9):
        assert len(short_id(other)) == 9
        assert short_id(other).isalnum()


def test_a_template_that_refuses_system_messages() -> None:
    assert without_system([said("system", "s"), said("user", "u")]) == [said("user", "s\n\nu")]
    engine = ScriptedEngine()
    engine.tokenizer.refuses_system = True
    ids, _ = of_talk(engine, Settings(), Talk([said("system", "s"), said("user", "u")]))
    assert engine.tokenizer.decode(ids) == "[user]s\n\nu[assistant]"


def test_tools_in_words() -> None:
    messages = conversation(
        [said("system", "s"), said("user", "u"), said("assistant", "a", tool_calls=[CALL, CALL]),
         said("tool", "one"), said("tool", "two"), said("user", "more")]
    )  # fmt: skip
    system, *turns = with_tools_told(messages, [TOOL])
    assert system["content"].startswith("s\n\nYou can call tools.")
    assert (
        '\n{"type": "function", "function": {"name": "f", "parameters": {}}}\n' in system["content"]
    )
    call = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'
    assert turns == [
        said("user", "u"),
        said("assistant", f"a\n{call}\n{call}"),
        said("user", "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n"
             "</tool_response>\nmore"),
    ]  # fmt: skip


class Templated(ChatBytes):
    """Renders a template of Jinja, as transformers does."""

    def __init__(self, template: str) -> None:
        super().__init__()
        self.chat_template = template

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **more: Any) -> Any:
        made = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])

        def refuse(text: str) -> None:
            raise jinja2.TemplateError(text)

        made.globals["raise_exception"] = refuse
        text = made.from_string(self.chat_template).render(messages=messages, **more)
        return self.encode(text, add_special_tokens=False) if tokenize else text


QWEN = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}\n</tools> in <tool_call></tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'assistant' and message.tool_calls %}"
    "<|im_start|>assistant{% if message.content %}\n{{ message.content }}{% endif %}"
    "{% for tool_call in message.tool_calls %}{% set tool_call = tool_call.function %}"
    '\n<tool_call>\n{"name": "{{ tool_call.name }}", "arguments": '
    "{{ tool_call.arguments | tojson }}}"
    "\n</tool_call>{% endfor %}<|im_end|>\n{% elif message.role == 'tool' %}<|im_start|>user\n"
    "<tool_response>\n{{ message.content }}\n</tool_response><|im_end|>\n{% else %}<|im_start|>"
    "{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }}"
    "[/INST]{% elif message.role == 'assistant' and message.tool_calls %}[TOOL_CALLS] ["
    "{% for call in message.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception("
    "'Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{ call.function | tojson }}{% endfor %}]{% elif message.role == 'tool' %}[TOOL_RESULTS]"
    "{{ message.tool_call_id }} {{ message.content }}[/TOOL_RESULTS]{% else %}"
    "{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | length }}{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<start_of_turn>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (QWEN, ['<tools>\n{"function": {"name": "f"', "<|im_start|>assistant\n<tool_call>\n"
                '{"name": "f", "arguments": {"a":', "<tool_response>\nr\n</tool_response>"]),
        (MISTRAL, ["[INST] s\n\nu[/INST][TOOL_CALLS] [", f"[TOOL_RESULTS]{short_id('call_1')} r"]),
        (GEMMA, ["<start_of_turn>user\ns\n\nYou can call tools.", "u<end_of_turn>\n"
                 '<start_of_turn>model\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}',
                 "<start_of_turn>user\n<tool_response>\nr\n</tool_response><end_of_turn>"]),
    ],
    ids=["qwen", "mistral", "gemma"],
)  # fmt: skip
def test_a_history_with_tools(template: str, wanted: list[str]) -> None:
    """In templates of several families, made to refuse what theirs refuse."""
    engine = ScriptedEngine(tokenizer=Templated(template), context=5000)
    settings = Settings(tool_parser="mistral" if template == MISTRAL else None)
    messages = conversation(
        [said("system", "s"), said("user", "u"), said("assistant", None, tool_calls=[CALL]),
         said("tool", "r", tool_call_id="call_1")]
    )  # fmt: skip
    ids, _ = of_talk(engine, settings, Talk(messages, [TOOL]))
    text = engine.tokenizer.decode(ids)
    for part in wanted:
        assert part in text


def test_the_beginning_of_an_answer() -> None:
    engine = ScriptedEngine()
    talk = Talk([said("user", "u"), said("assistant", "It is")], open_end=True)
    ids, _ = of_talk(engine, Settings(), talk)
    assert engine.tokenizer.decode(ids) == "[user]u[assistant]It is"


@pytest.mark.parametrize(
    ("reasoning", "given", "variable", "apart"),
    [
        ("deepseek", {}, None, True),
        ("off", {}, False, True),
        ("off", {"enable_thinking": True}, True, True),
        ("inline", {}, None, False),
    ],
)
def test_thoughts(reasoning: Any, given: dict[str, Any], variable: Any, apart: bool) -> None:
    engine = ScriptedEngine()
    engine.tokenizer.think_start, engine.tokenizer.think_end = "<think>", "</think>"
    settings = Settings(reasoning=reasoning, template={"x": 1})
    _, reading = of_talk(engine, settings, Talk([said("user")], template=given))
    assert engine.tokenizer.last.get("enable_thinking") is variable
    assert engine.tokenizer.last["x"] == 1
    assert (reading.thoughts is not None) is apart
    assert not reading.opened
    engine = ScriptedEngine(tokenizer=Templated("{{ messages[0].content }}<think>\n"))
    engine.tokenizer.think_start, engine.tokenizer.think_end = "<think>", "</think>"
    assert of_talk(engine, settings, Talk([said("user")]))[1].opened is apart
