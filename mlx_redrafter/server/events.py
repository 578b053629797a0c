"""What happens while an answer is made: the dialects translate these, the engine thread sends them.

They hold plain Python values only: arrays of MLX belong to the engine thread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_redrafter.server.problems import Wrong
from mlx_redrafter.stats import DraftStats

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Progress:
    """So many tokens of the prompt are read."""

    done: int
    total: int


@dataclass(frozen=True)
class Reasoning:
    """A piece of a thought."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class Drawn:
    """The tokens of a step, as text, and whether each was drafted; for those who ask for them.
    tree: what was drafted, as `trees.shown` has it; seconds: on the clock of an answer that has one
    of its own."""

    tokens: tuple[tuple[str, bool], ...]
    tree: dict[str, Any] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Call:
    """A whole call of a tool; ``arguments`` is JSON."""

    id: str
    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any]:
        """The arguments, as an object."""
        return dict(json.loads(self.arguments))


@dataclass(frozen=True)
class Usage:
    """What an answer took. ``cached`` prompt tokens were not read, ``reasoning`` ones are among
    ``completion``; ``seconds`` runs from the end of the prompt to the last token; ``prediction``
    tokens came with the request and were drafted from."""

    prompt: int
    completion: int
    cached: int = 0
    reasoning: int = 0
    prediction: int = 0
    seed: int = 0
    seconds: float = 0.0
    stats: DraftStats = field(default_factory=DraftStats)


@dataclass(frozen=True)
class Finished:
    """The end; ``stop`` is the stop string that brought it."""

    reason: Reason
    usage: Usage
    stop: str | None = None


@dataclass(frozen=True)
class Failed:
    """The end of an answer that went wrong."""

    wrong: Wrong


Event = Progress | Drawn | Reasoning | Text | Call | Finished | Failed


@dataclass
class Gathered:
    """All of one answer, for a client that wants it whole."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    finished: Finished | None = None

    def take(self, event: Event) -> None:
        """The next event of the answer."""
        match event:
            case Text():
                self.text += event.text
            case Reasoning():
                self.reasoning += event.text
            case Call():
                self.calls.append(event)
            case Finished():
                self.finished = event
            case _:
                pass

    @property
    def end(self) -> Finished:
        """How it ended."""
        assert self.finished is not None, "an answer that is handed on has ended"
        return self.finished
