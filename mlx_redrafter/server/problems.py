"""What a client is told when something is wrong: a status and an object in its dialect."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_redrafter.errors import OptionError, RedrafterError

INVALID = "invalid_request_error"
ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "overloaded_error",
    500: "api_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
TOO_LONG = "context_length_exceeded"
SOON = 2  # seconds after which to try again


@dataclass(frozen=True)
class Wrong:
    """What goes on the wire of a problem; ``more`` are further fields of OpenAI's object."""

    message: str
    status: int = 400
    kind: str = INVALID
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def openai(self) -> dict[str, Any]:
        """As on ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/responses``."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {**error, **self.more}}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        """As on ``/v1/messages``."""
        kind = ANTHROPIC_KINDS.get(self.status, INVALID)
        error = {"type": kind, "message": self.message}
        return {"type": "error", "error": error, "request_id": request_id}


class Problem(RedrafterError):
    """A request that is not answered."""

    def __init__(self, message: str, **more: Any) -> None:
        super().__init__(message)
        self.wrong = Wrong(message, **more)


def invalid(message: str, param: str | None = None) -> Problem:
    """400: what the client can mend."""
    return Problem(message, param=param)


def unsupported(param: str, use: str) -> Problem:
    """400: what is known and not there; never left out in silence."""
    return invalid(f"{param} is not supported: {use}", param)


def of_option(error: OptionError, param: str | None = None) -> Problem:
    """What the Python API says of a value."""
    # Its advice for the command line helps nobody who sends requests.
    return invalid(str(error).replace("(generate --raw)", "(/v1/completions)"), param)


def too_long(tokens: int, context: int) -> Problem:
    """The prompt does not fit. Claude Code knows the wording, others the code."""
    return Problem(
        f"prompt is too long: {tokens} tokens > {context} maximum",
        code=TOO_LONG,
        param="messages",
        more={"n_prompt_tokens": tokens, "n_ctx": context},
    )


def unavailable(why: str) -> Problem:
    """503: not now."""
    return Problem(
        f"{why}: try again later",
        status=503, kind="server_error", code="unavailable", retry_after=SOON,
    )  # fmt: skip


def queue_full(waiting: int) -> Problem:
    """429: as many requests wait as may."""
    return Problem(
        f"{waiting} requests are waiting already: try again later, or start the server with a "
        "longer --queue",
        status=429, kind="rate_limit_error", code="queue_full", retry_after=SOON,
    )  # fmt: skip


def internal(request_id: str) -> Problem:
    """500: a fault of ours; the log has a line on it."""
    return Problem(f"internal error (request {request_id})", status=500, kind="server_error")
