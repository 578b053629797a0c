"""``/v1/responses``: OpenAI's newer dialect, without a memory of earlier answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from mlx_redrafter.server.conversation import conversation, function
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
from mlx_redrafter.server.prompts import Talk
from mlx_redrafter.server.tools import Tool
from mlx_redrafter.server.wire.dialect import data, fresh_id
from mlx_redrafter.server.wire.openai_chat import demanded, effort
from mlx_redrafter.text.template import Message

Item = dict[str, Any]


class Effort(Body):
    """How long to think."""

    effort: str | None = None


class ResponsesBody(Options):
    """A request."""

    input: str | list[Any]
    instructions: str = ""
    tools: list[Any] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning: Effort = Effort()
    max_output_tokens: int | None = None
    length_field: ClassVar[str] = "max_output_tokens"
    text: dict[str, Any] = Field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        """Under the name that all dialects share."""
        if self.max_output_tokens is not None:
            self.max_tokens = self.max_output_tokens

    def check(self, body: dict[str, Any]) -> None:
        """Raises Problem for what would be wrong in silence."""
        for name in ("previous_response_id", "conversation"):
            if body.get(name) is not None:
                raise unsupported(name, "this server is stateless, send the whole input")
        if body.get("background"):
            raise unsupported("background", "leave it out")
        if body.get("top_logprobs") not in (None, 0):
            raise unsupported("top_logprobs", "leave it out")
        included = body.get("include")
        if isinstance(included, list) and "message.output_text.logprobs" in included:
            raise unsupported("include", "leave message.output_text.logprobs out")

    def talk(self) -> Talk:
        """What the model is asked; raises Problem."""
        config = dict(self.chat_template_kwargs)
        if self.reasoning.effort is not None:
            config |= effort(self.reasoning.effort)
        given: list[Message] = []
        if self.instructions:
            given.append({"role": "system", "content": self.instructions})
        items = self.input
        if isinstance(items, str):
            items = [{"role": "user", "content": items}]
        for i, item in enumerate(items):
            _add(given, item, f"input[{i}]")
        if not given:
            raise invalid("input is empty: give a text, or items", "input")
        tools, must = demanded(self.tool_choice, _tools(self.tools))
        one_call = not self.parallel_tool_calls or isinstance(self.tool_choice, dict)
        form = of_format(self.text.get("format"), "text.format")
        return Talk(conversation(given), tools, config, one_call, must=must, form=form)


def _tools(given: Sequence[Any]) -> list[Tool]:
    """The functions; tools of other types are for OpenAI's own servers, or for none here."""
    found = []
    for i, tool in enumerate(given):
        if not isinstance(tool, dict):
            raise invalid(f"tools[{i}] is not an object", f"tools[{i}]")
        if tool.get("type") == "function":
            found.append(function(tool, f"tools[{i}]"))
    return found


def _add(messages: list[Message], item: Any, at: str) -> None:
    """One item, as OpenAI's older messages have it. Reasoning and what is unknown is left out."""
    if not isinstance(item, dict):
        raise invalid(f"{at} is not an object", at)
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        called = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": called}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        result = {"tool_call_id": item.get("call_id"), "content": item.get("output")}
        messages.append({"role": "tool", **result})


class ResponsesAnswer:
    """The answer to one request, as items.

    Args:
        model: as the request names it.
        body: the request.
    """

    def __init__(self, model: str, body: ResponsesBody) -> None:
        self.head: dict[str, Any] = {
            "id": fresh_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "temperature": body.temperature,
            "tool_choice": body.tool_choice,
            "tools": [],
            "top_p": body.top_p,
            "usage": None,
        }
        self.items: list[Item] = []
        self.open: Item | None = None  # the item that is being written
        self.number = -1
        self.end: Finished | None = None

    def opening(self) -> list[bytes]:
        """See `Dialect`."""
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self.head) for kind in kinds]

    def event(self, row: int, event: Event) -> list[bytes]:
        """See `Dialect`."""
        match event:
            case Text():
                return [*self._opened("message"), self._text(event.text)]
            case Reasoning():
                return [*self._opened("reasoning"), self._text(event.text)]
            case Call():
                return [*self._closed(), *self._call(event)]
            case Finished():
                self.end = event
                return self._closed()
            case _:
                return []

    def waiting(self, progress: Progress | None) -> bytes:
        """See `Dialect`: Codex counts events, not comments."""
        return self._event("response.in_progress", response=self.head)

    def failed(self, wrong: Wrong) -> list[bytes]:
        """See `Dialect`."""
        error = {"code": wrong.code or "server_error", "message": wrong.message}
        response = {**self.head, "status": "failed", "error": error, "output": self.items}
        return [self._event("response.failed", response=response)]

    def closing(self) -> list[bytes]:
        """See `Dialect`."""
        assert self.end is not None, "an answer that is closed has ended"
        response = self._document(self.items, self.end)
        return [self._event(f"response.{response['status']}", response=response)]

    def whole(self, answers: Sequence[Gathered]) -> dict[str, Any]:
        """See `Dialect`."""
        (answer,) = answers
        items = []
        if answer.reasoning:
            items.append(_reasoning(fresh_id("rs_"), answer.reasoning))
        if answer.text or not answer.calls:
            items.append(_message(fresh_id("msg_"), answer.text))
        items += [_called(fresh_id("fc_"), call) for call in answer.calls]
        return self._document(items, answer.end)

    def _document(self, items: list[Item], end: Finished) -> dict[str, Any]:
        cut = {"reason": "max_output_tokens"} if end.reason == "length" else None
        status = "incomplete" if cut else "completed"
        ended = {"status": status, "incomplete_details": cut, "usage": _usage(end.usage)}
        return {**self.head, **ended, "output": items}

    def _event(self, kind: str, **more: Any) -> bytes:
        self.number += 1
        return data({"type": kind, "sequence_number": self.number, **more}, kind)

    @property
    def _at(self) -> dict[str, Any]:
        """Where the open item is."""
        assert self.open is not None, "asked for within an item"
        return {"item_id": self.open["id"], "output_index": len(self.items)}

    def _opened(self, kind: str) -> list[bytes]:
        if self.open is not None and self.open["type"] == kind:
            return []
        before = self._closed()
        made = _message if kind == "message" else _reasoning
        self.open = made(fresh_id("msg_" if kind == "message" else "rs_"), "")
        empty = {**self.open, "status": "in_progress"}
        empty["content" if kind == "message" else "summary"] = []
        added = self._event("response.output_item.added", output_index=len(self.items), item=empty)
        part, where = self._part()
        return [*before, added, self._event(f"response.{part}.added", **where)]

    def _part(self) -> tuple[str, dict[str, Any]]:
        """(name, fields) of the one part of the open item."""
        assert self.open is not None, "asked for within an item"
        if self.open["type"] == "message":
            part = {"content_index": 0, "part": self.open["content"][0]}
            return "content_part", {**self._at, **part}
        part = {"summary_index": 0, "part": self.open["summary"][0]}
        return "reasoning_summary_part", {**self._at, **part}

    def _text(self, text: str) -> bytes:
        assert self.open is not None, "asked for within an item"
        if self.open["type"] == "message":
            self.open["content"][0]["text"] += text
            more: dict[str, Any] = {"content_index": 0, "delta": text, "logprobs": []}
            return self._event("response.output_text.delta", **self._at, **more)
        self.open["summary"][0]["text"] += text
        more = {"summary_index": 0, "delta": text}
        return self._event("response.reasoning_summary_text.delta", **self._at, **more)

    def _closed(self) -> list[bytes]:
        """The end of the item that is open, if one is."""
        item = self.open
        if item is None:
            return []
        if item["type"] == "message":
            done = "output_text.done"
            more: dict[str, Any] = {"content_index": 0, "text": item["content"][0]["text"]}
            more["logprobs"] = []
        else:
            done = "reasoning_summary_text.done"
            more = {"summary_index": 0, "text": item["summary"][0]["text"]}
        part, where = self._part()
        ended = [
            self._event(f"response.{done}", **self._at, **more),
            self._event(f"response.{part}.done", **where),
        ]
        return [*ended, self._done(item)]

    def _call(self, call: Call) -> list[bytes]:
        item = self.open = _called(fresh_id("fc_"), call)
        begun = {**item, "arguments": "", "status": "in_progress"}
        kind, at = "response.function_call_arguments", self._at
        return [
            self._event("response.output_item.added", output_index=len(self.items), item=begun),
            self._event(f"{kind}.delta", **at, delta=call.arguments),
            self._event(f"{kind}.done", **at, name=call.name, arguments=call.arguments),
            self._done(item),
        ]

    def _done(self, item: Item) -> bytes:
        index, self.open = len(self.items), None
        self.items.append(item)
        return self._event("response.output_item.done", output_index=index, item=item)


def _message(id: str, text: str) -> Item:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    shared = {"role": "assistant", "status": "completed"}
    return {"id": id, "type": "message", **shared, "content": [part]}


def _reasoning(id: str, text: str) -> Item:
    return {"id": id, "type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}


def _called(id: str, call: Call) -> Item:
    named = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"id": id, "type": "function_call", "status": "completed", **named}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    }
