"""From messages and tools to the token ids that the engine reads, and how the answer is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_redrafter import arguments
from mlx_redrafter.decoding.grammar import Grammar
from mlx_redrafter.errors import OptionError
from mlx_redrafter.server.conversation import with_tools_told, without_system
from mlx_redrafter.server.engine import Engine
from mlx_redrafter.server.forced_calls import MOST, calls
from mlx_redrafter.server.forms import Form
from mlx_redrafter.server.problems import invalid, of_option, too_long
from mlx_redrafter.server.reader import Reading
from mlx_redrafter.server.settings import Settings
from mlx_redrafter.server.tools import Tool, template_text, tool_format
from mlx_redrafter.text import template
from mlx_redrafter.text.grammar import Source
from mlx_redrafter.text.template import Message

# What transformers takes beside the variables of a template: a template of somebody else's, or a
# prompt of a billion tokens, is not a client's to choose.
_NO_VARIABLES = {
    "chat_template", "tools", "documents", "messages", "conversation", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip


@dataclass(frozen=True)
class Talk:
    """What a model is asked.

    Args:
        messages: as `conversation.conversation` gives them.
        tools: in OpenAI's form.
        template: variables of the chat template.
        one_call: the answer ends with the first call.
        open_end: the last message is the beginning of the answer.
        must: names of tools, one of which has to be called; none: as the model likes.
        form: what the answer may be, unless tools are called.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    one_call: bool = False
    open_end: bool = False
    must: Sequence[str] = ()
    form: Form | None = None


def of_talk(engine: Engine, settings: Settings, talk: Talk) -> tuple[list[int], Reading]:
    """The prompt, and how its answer is read. Raises Problem: a template that refuses the messages,
    a prompt that does not fit."""
    tokenizer, messages = engine.tokenizer, list(talk.messages)
    for name in _NO_VARIABLES.intersection(talk.template):
        place = f"chat_template_kwargs.{name}"
        raise invalid(f"{place} is not a variable of the template: leave it out", place)
    calls = tool_format(tokenizer, settings.tool_parser)
    config = {**settings.template, **talk.template}
    if settings.reasoning == "off":
        config.setdefault("enable_thinking", False)
    if talk.tools and calls.described:
        config["tools"] = list(talk.tools)
    elif not calls.described and (talk.tools or _with_calls(messages)):
        messages = with_tools_told(messages, talk.tools)
    if talk.open_end:
        config |= {"continue_final_message": True, "add_generation_prompt": False}
    ids = checked(engine, _rendered(tokenizer, messages, config))
    thoughts = None if settings.reasoning == "inline" else template.markers(tokenizer)
    opened = thoughts is not None and template.opens_thought(tokenizer, ids)
    return ids, Reading(thoughts, opened, talk.tools, calls, talk.one_call)


def grammar_of_talk(
    engine: Engine, settings: Settings, talk: Talk, prompt: list[int]
) -> Grammar | None:
    """What the answer to a talk may be: behind a thought, if the model thinks. Raises Problem."""
    if talk.form is None and not talk.must:
        return None
    tokenizer = engine.tokenizer
    called = [tool for tool in talk.tools if not talk.must or tool["function"]["name"] in talk.must]
    try:
        grammars, sources = engine.grammars(), list[Source]()
        if called:
            how, most = tool_format(tokenizer, settings.tool_parser), 1 if talk.one_call else MOST
            sources.append(calls(how, called, most, grammars.marked, template_text(tokenizer)))
        if talk.form is not None and not talk.must:
            sources.append(talk.form.source)
        thought = template.thought_ahead(tokenizer, prompt)
        opened = template.opens_thought(tokenizer, prompt)
        return grammars.compiled(*sources, thought=thought, opened=opened)
    except OptionError as error:
        param = talk.form.param if talk.form is not None and not talk.must else "tool_choice"
        raise of_option(error, param) from None


def grammar_of_text(engine: Engine, form: Form | None) -> Grammar | None:
    """What the continuation of a text may be. Raises Problem."""
    try:
        return engine.grammars().compiled(form.source) if form is not None else None
    except OptionError as error:
        assert form is not None
        raise of_option(error, form.param) from None


def chosen(tools: Sequence[Tool], name: str | None) -> tuple[str, ...]:
    """Names of the tools of which one has to be called: all, or the one named. Raises Problem."""
    names = tuple(tool["function"]["name"] for tool in tools)
    if not names:
        raise invalid("tool_choice demands a call: give tools", "tool_choice")
    if name is None:
        return names
    if name not in names:
        raise invalid(f"tool_choice names {name[:60]!r}, which is none of the tools", "tool_choice")
    return (name,)


def _with_calls(messages: Sequence[Message]) -> bool:
    return any(m["role"] == "tool" or m.get("tool_calls") for m in messages)


def _rendered(tokenizer: Any, messages: list[Message], config: dict[str, Any]) -> list[int]:
    try:
        return template.prompt_ids(tokenizer, messages, config)
    except OptionError as error:
        if messages[0]["role"] != "system":
            raise of_option(error, "messages") from None
        refused = error
    try:
        return template.prompt_ids(tokenizer, without_system(messages), config)
    except OptionError:
        raise of_option(refused, "messages") from None


def of_text(engine: Engine, prompt: str | Sequence[int]) -> list[int]:
    """The prompt of a text to be continued, or of token ids. Raises Problem."""
    try:
        return checked(engine, arguments.prompt_ids(engine.tokenizer, prompt))
    except OptionError as error:
        raise of_option(error, "prompt") from None


def checked(engine: Engine, ids: list[int]) -> list[int]:
    """The prompt, if it is one of this model's and fits the context.

    Raises Problem and OptionError.
    """
    if not ids:
        raise OptionError("the prompt is empty: give at least one token of text")
    wrong = next((token for token in ids if not 0 <= token < engine.vocab_size), None)
    if wrong is not None:
        raise OptionError(
            f"the prompt holds token {wrong}, which is outside the model's vocabulary: "
            f"use 0 to {engine.vocab_size - 1}"
        )
    if len(ids) >= engine.context:
        raise too_long(len(ids), engine.context)
    return ids
