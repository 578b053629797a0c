"""``/v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from mlx_redrafter.server.conversation import conversation, text_of, tools_of
from mlx_redrafter.server.events import (
    Call,
    Drawn,
    Event,
    Finished,
    Gathered,
    Progress,
    Reasoning,
    Text,
)
from mlx_redrafter.server.fields import MOST_CHOICES, Body, Options
from mlx_redrafter.server.forms import Form, of_openai
from mlx_redrafter.server.problems import Wrong, invalid, unsupported
from mlx_redrafter.server.prompts import Talk, chosen
from mlx_redrafter.server.tools import Tool
from mlx_redrafter.server.wire import statistics
from mlx_redrafter.server.wire.dialect import comment, data, fresh_id

DONE = b"data: [DONE]\n\n"


class StreamOptions(Body):
    """What a stream says besides the answer."""

    include_usage: bool = False


class Common(Options):
    """What both endpoints of OpenAI's completions take."""

    n: int = 1
    stream_options: StreamOptions = StreamOptions()
    return_progress: bool = False
    _form: Form | None = PrivateAttr(None)

    @property
    def form(self) -> Form | None:
        """What the answer may be, once it was checked."""
        return self._form

    def check(self, body: dict[str, Any]) -> None:
        """Raises Problem for what would be wrong in silence."""
        if not 1 <= self.n <= MOST_CHOICES:
            raise invalid(f"n {self.n} is not possible: use 1 to {MOST_CHOICES}", "n")
        if body.get("best_of") not in (None, self.n):
            raise unsupported("best_of", "leave it out, and give n")
        for name in ("logprobs", "top_logprobs"):
            if body.get(name) not in (None, False, 0):
                raise unsupported(name, "leave it out")
        self._form = of_openai(body)


class Prediction(Body):
    """What the answer may be."""

    type: Literal["content"] = "content"
    content: str | list[Any]


class ChatBody(Common):
    """A request."""

    messages: list[Any]
    tools: list[Any] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    prediction: Prediction | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True

    @property
    def predicted(self) -> str:
        """See `Options`."""
        return text_of(self.prediction.content, "prediction.content") if self.prediction else ""

    def talk(self) -> Talk:
        """What the model is asked; raises Problem."""
        config = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            config |= effort(self.reasoning_effort)
        messages = conversation(self.messages)
        open_end = self.continue_final_message or not self.add_generation_prompt
        if open_end and messages[-1]["role"] != "assistant":
            raise invalid(
                "the last message is not the assistant's: there is nothing to continue",
                "continue_final_message",
            )
        tools, must = demanded(self.tool_choice, tools_of(self.tools))
        one_call = not self.parallel_tool_calls or isinstance(self.tool_choice, dict)
        return Talk(messages, tools, config, one_call, open_end, must, self.form)


def effort(value: str) -> dict[str, Any]:
    """Variables of the chat template for how long to think."""
    return {"enable_thinking": False} if value == "none" else {"reasoning_effort": value}


def demanded(choice: str | dict[str, Any], tools: list[Tool]) -> tuple[list[Tool], tuple[str, ...]]:
    """The tools that the model is told of, and those of which it has to call one, in the form of
    either endpoint; raises Problem."""
    if choice in ("auto", "none"):
        return ([] if choice == "none" else tools), ()
    if choice == "required":
        return tools, chosen(tools, None)
    named = choice.get("function", choice) if isinstance(choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or choice.get("type") != "function":  # type: ignore[union-attr]
        use = "use 'auto', 'none', 'required', or the name of a function"
        raise unsupported("tool_choice", use)
    return tools, chosen(tools, name)


class Choices:
    """The answers to one request in OpenAI's form: what both endpoints share.

    Args:
        model: as the request names it.
        fingerprint: of the program.
        body: the request.
    """

    kind: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, model: str, fingerprint: str, body: Common) -> None:
        self.body, self.usages = body, dict[int, Any]()
        self.drawn: dict[int, dict[str, Any]] = {}  # of every answer: what no chunk has told yet
        self.head = {
            "id": fresh_id(self.prefix),
            "object": self.kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """One event of a stream."""
        used = {"usage": None} if self.body.stream_options.include_usage else {}
        if choices and (drawn := self.drawn.pop(choices[0]["index"], None)):
            more["x_redrafter"] = drawn
        return data({**self.head, "choices": choices, **used, **more})

    def note(self, row: int, event: Event) -> None:
        """Keep what the end will say."""
        if isinstance(event, Finished):
            self.usages[row] = event.usage
        elif isinstance(event, Drawn):
            told = [[text, "d" if drafted else "b"] for text, drafted in event.tokens]
            waiting = self.drawn.setdefault(row, {"tokens": []})
            waiting["tokens"] += told
            if event.tree is not None:
                waiting.setdefault("trees", []).append(event.tree)
            if event.seconds is not None:
                waiting["seconds"] = round(event.seconds, 6)

    def progress(self, event: Progress) -> list[bytes]:
        """llama.cpp's chunk, for those who ask for it."""
        if not self.body.return_progress:
            return []
        read = {"total": event.total, "cache": 0, "processed": event.done}
        return [self.chunk([], prompt_progress=read)]

    def waiting(self, progress: Progress | None) -> bytes:
        """See `Dialect`."""
        return comment(progress)

    def failed(self, wrong: Wrong) -> list[bytes]:
        """See `Dialect`; without [DONE], so that nobody takes it for an answer."""
        return [data(wrong.openai())]

    def closing(self) -> list[bytes]:
        """See `Dialect`."""
        if not self.body.stream_options.include_usage:
            return [DONE]
        used = [self.usages[row] for row in sorted(self.usages)]
        counts = statistics.usage(used, self.body.n)
        return [self.chunk([], **{"usage": counts, **statistics.more(used)}), DONE]

    def document(
        self, choices: list[dict[str, Any]], answers: Sequence[Gathered]
    ) -> dict[str, Any]:
        """The whole answer."""
        used = [answer.end.usage for answer in answers]
        counts = statistics.usage(used, self.body.n)
        return {**self.head, "choices": choices, "usage": counts, **statistics.more(used)}


class ChatAnswer(Choices):
    """A chat's answers."""

    kind, prefix = "chat.completion", "chatcmpl-"

    def __init__(self, model: str, fingerprint: str, body: Common) -> None:
        super().__init__(model, fingerprint, body)
        self.calls: dict[int, int] = {}
        if body.stream:
            self.head["object"] = "chat.completion.chunk"

    def opening(self) -> list[bytes]:
        """See `Dialect`."""
        begun = {"role": "assistant", "content": ""}
        return [self._delta(row, begun) for row in range(self.body.n)]

    def event(self, row: int, event: Event) -> list[bytes]:
        """See `Dialect`."""
        self.note(row, event)
        match event:
            case Text():
                return [self._delta(row, {"content": event.text})]
            case Reasoning():
                return [self._delta(row, {"reasoning_content": event.text})]
            case Call():
                return self._call(row, event)
            case Finished():
                return [self._delta(row, {}, event.reason)]
            case Progress():
                return self.progress(event)
            case _:
                return []

    def _call(self, row: int, call: Call) -> list[bytes]:
        index = self.calls[row] = self.calls.get(row, -1) + 1
        begun = {"name": call.name, "arguments": ""}
        head = {"index": index, "id": call.id, "type": "function", "function": begun}
        rest = {"index": index, "function": {"arguments": call.arguments}}
        return [self._delta(row, {"tool_calls": [part]}) for part in (head, rest)]

    def _delta(self, row: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        return self.chunk([{"index": row, "delta": delta, "finish_reason": reason}])

    def whole(self, answers: Sequence[Gathered]) -> dict[str, Any]:
        """See `Dialect`."""
        choices = [
            {
                "index": row,
                "message": _message(answer),
                "logprobs": None,
                "finish_reason": answer.end.reason,
            }
            for row, answer in enumerate(answers)
        ]
        return self.document(choices, answers)


def _message(answer: Gathered) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in answer.calls
        ]
    return message
