"""What every dialect does with the events of an answer, and how they lie on the wire."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from mlx_redrafter.server.events import Event, Gathered, Progress
from mlx_redrafter.server.problems import Wrong


class Dialect(Protocol):
    """One request's answers, translated. ``row`` is the number of an answer."""

    def opening(self) -> list[bytes]:
        """Before the prompt is read."""
        ...

    def event(self, row: int, event: Event) -> list[bytes]:
        """Something happened."""
        ...

    def waiting(self, progress: Progress | None) -> bytes:
        """Nothing happened for long: what keeps the client's timer from running out."""
        ...

    def failed(self, wrong: Wrong) -> list[bytes]:
        """The end of a stream in which something broke."""
        ...

    def closing(self) -> list[bytes]:
        """After the last answer."""
        ...

    def whole(self, answers: Sequence[Gathered]) -> dict[str, Any]:
        """Everything at once, for a client that does not stream."""
        ...


def data(content: Any, event: str | None = None) -> bytes:
    """One event of a stream. In ASCII: some clients break lines at other letters too."""
    named = f"event: {event}\n" if event else ""
    return f"{named}data: {json.dumps(content, separators=(',', ':'))}\n\n".encode()


def comment(progress: Progress | None) -> bytes:
    """What no client takes for an event."""
    if progress is None:
        return b": waiting\n\n"
    return f": prompt {progress.done}/{progress.total}\n\n".encode()


def fresh_id(kind: str) -> str:
    """Of an answer."""
    return f"{kind}{secrets.token_hex(12)}"
