"""Decoders side by side on one machine, each with a clock of its own.

The decoders take turns, and each has a clock that runs only in its own turns. The next turn
goes to the one whose clock is behind, so that both are shown after the same time of their own, as
if each had the machine to itself.

The engine launches a step before it hands out the tokens of the one before, so that something is
always in flight between two steps. A turn therefore ends by waiting for it, on the clock of whose
turn it is: otherwise the other would wait for work that is not its own, and the owner find it done
for nothing. That wait hides one launch less than decoding without turns does, which at ``TURN``
seconds a turn was not to be told from the noise of a few per cent. Warming up, reading the prompt
and drawing run on no clock, and nothing is drawn while a step is in flight: that would be time for
free.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_redrafter.text.answer import GenerationResponse

TURN = 0.1  # seconds


def synchronize() -> None:
    """Wait until nothing is in flight on the device."""
    import mlx.core as mx

    mx.synchronize()


@dataclass(frozen=True)
class Piece:
    """One token; ``text`` is what it released, earlier pieces that were held back included."""

    text: str
    token: int
    drafted: bool


@dataclass(frozen=True)
class Step:
    """What one pass of the model gave: accepted drafts, then the bonus token; ``clock`` in seconds
    of the decoder's own when the tokens were there."""

    clock: float
    pieces: tuple[Piece, ...]


class Lane:
    """One decoder with its own clock.

    Args:
        name: what it is called on the screen.
        stream: the responses of `stream_generate`; not read before the first turn.
        now: seconds, from any zero.
        settle: waits until nothing is in flight on the device.
    """

    def __init__(
        self,
        name: str,
        stream: Generator[GenerationResponse, None, None],
        now: Callable[[], float] = time.perf_counter,
        settle: Callable[[], None] = synchronize,
    ) -> None:
        self.name, self.stream = name, stream
        self.clock = 0.0
        self.steps: list[Step] = []
        self.last: GenerationResponse | None = None
        self._now, self._settle = now, settle

    @property
    def finished(self) -> bool:
        return self.last is not None and self.last.finish_reason is not None

    @property
    def known_until(self) -> float:
        """Its clock when it last gave tokens: what is in flight behind is not known yet."""
        return self.steps[-1].clock if self.steps else 0.0

    @property
    def pieces(self) -> list[Piece]:
        return [piece for step in self.steps for piece in step.pieces]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def prompt_seconds(self) -> float:
        return self.last.stats.prefill_seconds if self.last is not None else 0.0

    def turn(self, seconds: float = TURN) -> None:
        """Decode a step, and more until the time is up or the answer at its end."""
        zero, until = self._now() - self.clock, self.clock + seconds
        while True:
            pieces = self._step()
            if not self.steps:  # the prompt was read on the way
                zero += self.prompt_seconds
            self.clock = self._now() - zero
            self.steps.append(Step(self.clock, pieces))
            if self.finished or self.clock >= until:
                break
        # What is launched behind the end of an answer is nobody's time, as nobody waits for it.
        self._settle()
        if not self.finished:
            self.clock = self._now() - zero

    def _step(self) -> tuple[Piece, ...]:
        pieces = []
        for response in self.stream:
            self.last = response
            pieces.append(Piece(response.text, response.token, response.from_draft))
            if self.finished or not response.from_draft:
                break
        assert pieces, "an answer ends with a reason"
        return tuple(pieces)

    def until(self, clock: float) -> list[Step]:
        """The steps that were there at a time of the decoder's own clock."""
        return [step for step in self.steps if step.clock <= clock]


@dataclass(frozen=True)
class View:
    """What there is to see of a lane after so many seconds of its own."""

    name: str
    pieces: tuple[Piece, ...]
    steps: int
    seconds: float
    status: str = ""

    @property
    def tokens(self) -> int:
        return len(self.pieces)

    @property
    def token_ids(self) -> list[int]:
        return [piece.token for piece in self.pieces]

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0


def views(lanes: Sequence[Lane], clock: float = math.inf) -> list[View]:
    """All lanes at the same time of their own clocks; by default at the end."""
    seen = []
    for lane in lanes:
        steps = lane.until(clock)
        pieces = tuple(piece for step in steps for piece in step.pieces)
        seconds, status = min(clock, lane.clock), ""
        if lane.finished and lane.clock <= clock:
            status = _status(lane, lanes)
        seen.append(View(lane.name, pieces, len(steps), seconds, status))
    return seen


def _status(lane: Lane, lanes: Sequence[Lane]) -> str:
    first = min((x for x in lanes if x.finished), key=lambda x: x.clock)
    if lane is not first:
        return f"finished {lane.clock - first.clock:.2f} s later"
    others = (x.until(lane.clock) for x in lanes if x is not lane)
    made = max((sum(len(step.pieces) for step in steps) for steps in others), default=0)
    lead = len(lane.pieces) - made
    return "finished" + (f", {lead} token{'' if lead == 1 else 's'} ahead" if lead > 0 else "")


def take_turns(
    lanes: Sequence[Lane],
    show: Callable[[Sequence[View]], None] = lambda views: None,
    turn: float = TURN,
) -> None:
    """Decode all lanes to their ends. ``show`` is called between turns, off the clocks."""
    show(views(lanes, 0.0))
    while running := [lane for lane in lanes if not lane.finished]:
        min(running, key=lambda lane: lane.clock).turn(turn)
        moments = (lane.known_until for lane in lanes if not lane.finished)
        show(views(lanes, min(moments, default=math.inf)))
