"""``/v1/messages``: Anthropic's dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from mlx_redrafter.server.conversation import conversation, function, text_of
from mlx_redrafter.server.events import (
    Call,
    Event,
    Finished,
    Gathered,
    Progress,
    Reasoning,
    Text,
    Usage,
)
from mlx_redrafter.server.fields import Body, Options
from mlx_redrafter.server.forms import of_format
from mlx_redrafter.server.problems import Wrong, invalid, unsupported
from mlx_redrafter.server.prompts import Talk, chosen
from mlx_redrafter.server.tools import Tool
from mlx_redrafter.server.wire.dialect import data, fresh_id
from mlx_redrafter.text.template import Message

# Claude Code's first block, with a number that is new in every request: no prefix would be shared.
_BILLING = "x-anthropic-billing-header:"
_DROPPED = ("thinking", "redacted_thinking")


class Choice(Body):
    """Which tools may be called."""

    type: str = "auto"
    name: str = ""
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """Whether to think first."""

    type: str = "enabled"


class MessagesBody(Options):
    """A request."""

    messages: list[Any]
    system: str | list[Any] = ""
    stop_sequences: list[str] = Field(default_factory=list)
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Choice = Choice()
    thinking: Thinking | None = None
    output_format: dict[str, Any] | None = None
    output_config: dict[str, Any] = Field(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        """Under the name that all dialects share."""
        self.stop = list(self.stop_sequences) or None

    def talk(self) -> Talk:
        """What the model is asked; raises Problem."""
        choice = self.tool_choice
        if choice.type not in ("auto", "none", "any", "tool"):
            raise unsupported("tool_choice", "use 'auto', 'none', 'any' or 'tool'")
        tools = [] if choice.type == "none" else _tools(self.tools)
        must: tuple[str, ...] = ()
        if choice.type in ("any", "tool"):
            must = chosen(tools, choice.name if choice.type == "tool" else None)
        form = of_format(self.output_format, "output_format")
        form = of_format(self.output_config.get("format"), "output_config.format") or form
        config: dict[str, Any] = {}
        if self.thinking is not None and self.thinking.type in ("enabled", "disabled"):
            config["enable_thinking"] = self.thinking.type == "enabled"
        given: list[Message] = [{"role": "system", "content": _system(self.system)}]
        for i, message in enumerate(self.messages):
            given += _messages(message, f"messages[{i}]")
        if len(given) == 1:
            raise invalid("messages is empty: give at least one", "messages")
        one_call = choice.disable_parallel_tool_use or choice.type == "tool"
        return Talk(conversation(given), tools, config, one_call, must=must, form=form)


def _system(given: str | list[Any]) -> str:
    if isinstance(given, str):
        return "" if given.startswith(_BILLING) else given
    kept = [block for block in given if not _billing(block)]
    return text_of(kept, "system")


def _billing(block: Any) -> bool:
    text = block.get("text") if isinstance(block, dict) else None
    return isinstance(text, str) and text.startswith(_BILLING)


def _tools(given: Sequence[Any]) -> list[Tool]:
    """The tools that are the client's own; those that Anthropic's servers would run are left."""
    found = []
    for i, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise invalid(f"tools[{i}] is not an object", f"tools[{i}]")
        if tool.get("type", "custom") == "custom":
            found.append(function({**tool, "parameters": tool.get("input_schema")}, f"tools[{i}]"))
    return found


def _messages(given: Any, at: str) -> list[Message]:
    """One message as OpenAI's: results of tools become messages of their own before the text."""
    if not isinstance(given, dict) or given.get("role") not in ("user", "assistant", "system"):
        raise invalid(f"{at}.role is not possible: use user or assistant", f"{at}.role")
    content = given.get("content")
    if not isinstance(content, list):
        return [{"role": given["role"], "content": content}]
    results: list[Message] = []
    texts, calls = [], []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            text = text_of(block.get("content"), f"{at}.content[{i}].content")
            id = block.get("tool_use_id")
            results.append({"role": "tool", "tool_call_id": id, "content": text})
        elif kind == "tool_use":
            called = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": called})
        elif kind not in _DROPPED:
            texts.append(block)
    if not texts and not calls:
        return results
    message: Message = {"role": given["role"], "content": text_of(texts, f"{at}.content")}
    return [*results, {**message, "tool_calls": calls} if calls else message]


class MessagesAnswer:
    """The answer to one request.

    Args:
        model: as the request names it.
        prompt: its tokens.
    """

    def __init__(self, model: str, prompt: int) -> None:
        self.head: dict[str, Any] = {
            "id": fresh_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self.prompt = prompt
        self.index, self.block = -1, ""  # of the block that is open, if one is

    def opening(self) -> list[bytes]:
        """See `Dialect`."""
        usage = _usage(Usage(self.prompt, 1))
        return [_event("message_start", message={**self.head, "usage": usage}), _event("ping")]

    def event(self, row: int, event: Event) -> list[bytes]:
        """See `Dialect`. A block is opened when it is known what comes."""
        match event:
            case Reasoning():
                block = {"type": "thinking", "thinking": "", "signature": ""}
                delta = {"type": "thinking_delta", "thinking": event.text}
                return [*self._open(block), self._delta(delta)]
            case Text():
                delta = {"type": "text_delta", "text": event.text}
                return [*self._open({"type": "text", "text": ""}), self._delta(delta)]
            case Call():
                begun = self._open({**_use(event), "input": {}})
                delta = {"type": "input_json_delta", "partial_json": event.arguments}
                return [*begun, self._delta(delta), *self._close()]
            case Finished():
                reason = {"stop_reason": _reason(event), "stop_sequence": event.stop}
                usage = _usage(event.usage)
                return [*self._close(), _event("message_delta", delta=reason, usage=usage)]
            case _:
                return []

    def waiting(self, progress: Progress | None) -> bytes:
        """See `Dialect`."""
        return _event("ping")

    def failed(self, wrong: Wrong) -> list[bytes]:
        """See `Dialect`."""
        return [_event("error", error=wrong.anthropic("")["error"])]

    def closing(self) -> list[bytes]:
        """See `Dialect`."""
        return [_event("message_stop")]

    def whole(self, answers: Sequence[Gathered]) -> dict[str, Any]:
        """See `Dialect`."""
        (answer,) = answers
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": "local"})
        if answer.text or not answer.calls:
            content.append({"type": "text", "text": answer.text})
        content += [{**_use(call), "input": call.values} for call in answer.calls]
        end = answer.end
        ended = {"stop_reason": _reason(end), "stop_sequence": end.stop}
        return {**self.head, "content": content, **ended, "usage": _usage(end.usage)}

    def _open(self, block: dict[str, Any]) -> list[bytes]:
        if self.block == block["type"]:
            return []
        before = self._close()
        self.index, self.block = self.index + 1, block["type"]
        return [*before, _event("content_block_start", index=self.index, content_block=block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self.index, delta=delta)

    def _close(self) -> list[bytes]:
        kind, self.block = self.block, ""
        signed = {"type": "signature_delta", "signature": "local"}
        last = [self._delta(signed)] if kind == "thinking" else []
        return [*last, _event("content_block_stop", index=self.index)] if kind else []


def _use(call: Call) -> dict[str, Any]:
    """A block of a call, without its input."""
    return {"type": "tool_use", "id": call.id, "name": call.name}


def _event(kind: str, **more: Any) -> bytes:
    return data({"type": kind, **more}, kind)


def _reason(end: Finished) -> str:
    if end.stop is not None and end.reason == "stop":
        return "stop_sequence"
    return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[end.reason]


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "output_tokens": usage.completion,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
    }
