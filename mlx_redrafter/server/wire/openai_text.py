"""``/v1/completions``: text that is continued, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_redrafter.server.events import Event, Finished, Gathered, Progress, Text
from mlx_redrafter.server.problems import invalid, unsupported
from mlx_redrafter.server.wire.openai_chat import Choices, Common

MOST_PROMPTS = 64
Prompt = str | list[int]


class TextBody(Common):
    """A request."""

    prompt: str | list[Any]

    def check(self, body: dict[str, Any]) -> None:
        """See `Common.check`."""
        if body.get("logprobs") == 0:
            raise unsupported("logprobs", "leave it out")
        super().check(body)
        for name in ("echo", "suffix"):
            if body.get(name):
                raise unsupported(name, "leave it out")

    def prompts(self) -> list[Prompt]:
        """Texts or token ids, one or several; raises Problem."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if not given:
            raise invalid("prompt is empty: give at least one token of text", "prompt")
        if all(_is_token(token) for token in given):
            return [given]
        if len(given) > MOST_PROMPTS:
            raise invalid(f"prompt has {len(given)} texts: give at most {MOST_PROMPTS}", "prompt")
        for i, each in enumerate(given):
            if not (
                isinstance(each, str) or (isinstance(each, list) and all(map(_is_token, each)))
            ):
                raise invalid(
                    f"prompt[{i}] is not possible: give texts, or lists of token ids", "prompt"
                )
        return list(given)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class TextAnswer(Choices):
    """The continuations, in the order prompt by prompt."""

    kind, prefix = "text_completion", "cmpl-"

    def opening(self) -> list[bytes]:
        """See `Dialect`: the headers have gone out, there is no role to tell."""
        return []

    def event(self, row: int, event: Event) -> list[bytes]:
        """See `Dialect`."""
        self.note(row, event)
        match event:
            case Text():
                return [self.chunk([_choice(row, event.text)])]
            case Finished():
                return [self.chunk([_choice(row, "", event.reason)])]
            case Progress():
                return self.progress(event)
            case _:
                return []

    def whole(self, answers: Sequence[Gathered]) -> dict[str, Any]:
        """See `Dialect`."""
        choices = [_choice(row, a.text, a.end.reason) for row, a in enumerate(answers)]
        return self.document(choices, answers)


def _choice(row: int, text: str, reason: str | None = None) -> dict[str, Any]:
    return {"index": row, "text": text, "logprobs": None, "finish_reason": reason}
