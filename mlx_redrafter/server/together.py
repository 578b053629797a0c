"""Answers that run at the same time, as the engine thread runs them."""

from __future__ import annotations

import itertools
import time
from typing import Protocol

import mlx.core as mx

from mlx_redrafter.api.batching import BatchGenerator
from mlx_redrafter.cache.session import Session
from mlx_redrafter.prefill.reading import Progress
from mlx_redrafter.server.engine import Engine, ModelEngine, Responses, options
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.text.answer import GenerationResponse

TURN = 0.1  # seconds, as in `race`


class Together(Protocol):
    """What runs answers, each under a number."""

    def insert(self, asked: Generation, session: Session, progress: Progress) -> int:
        """Take one in; raises OptionError. See `Engine.answer`."""
        ...

    def next(self) -> list[tuple[int, GenerationResponse]]:
        """What the next piece of work brings. An answer is gone with its last response, or when
        this raises what went wrong with it; if all are still there, with all of them."""
        ...

    def remove(self, number: int) -> None:
        """Let one go; its session keeps what was given out."""
        ...

    def __contains__(self, number: int) -> bool: ...

    def close(self) -> None:
        """Let all go."""
        ...


class InTurns:
    """Answers that have the machine to themselves, in turns of `TURN` seconds, each with a clock of
    its own, `DraftStats.decode_seconds`. As in `race` the next turn goes to the one whose clock is
    behind, and a turn ends by waiting, on its owner's clock, for what is in flight."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[int, Responses] = {}
        self._stats: dict[int, DraftStats] = {}
        self._numbers = itertools.count()
        self._whose, self._used = -1, 0.0

    def __contains__(self, number: int) -> bool:
        return number in self._running

    def __len__(self) -> int:
        return len(self._running)

    def insert(self, asked: Generation, session: Session, progress: Progress) -> int:
        number = next(self._numbers)
        self._running[number] = self._engine.answer(asked, session, progress)
        self._stats[number] = DraftStats()
        return number

    def next(self) -> list[tuple[int, GenerationResponse]]:
        number, start = self._choose(), time.perf_counter()
        found = []
        try:
            for response in self._running[number]:
                found.append((number, response))
                self._stats[number] = response.stats
                if response.finish_reason is not None:
                    self.remove(number)
                    break
                if not response.from_draft:  # the step is over
                    break
        except BaseException:
            self.remove(number)
            raise
        self._used += time.perf_counter() - start
        return found

    def _choose(self) -> int:
        """Whose turn it is."""
        over = len(self._running) > 1 and self._used >= TURN
        if self._whose not in self._running or over:
            self.settle()
            clocks = self._stats
            self._whose = min(self._running, key=lambda number: clocks[number].decode_seconds)
            self._used = 0.0
        return self._whose

    def settle(self) -> None:
        """Wait for what is in flight, on the clock of whose turn it was."""
        start = time.perf_counter()
        mx.synchronize()
        if self._whose in self._running:
            self._stats[self._whose].decode_seconds += time.perf_counter() - start

    def remove(self, number: int) -> None:
        self._running.pop(number).close()
        del self._stats[number]

    def close(self) -> None:
        for number in list(self._running):
            self.remove(number)


class Batched:
    """All answers in every step, but for those that want to be alone: these have every other piece
    of work. Their numbers are negative."""

    def __init__(self, engine: ModelEngine) -> None:
        engine.model.budget.costs(say=lambda text: None)  # measured while the model loads
        self._batch = BatchGenerator(engine.model, engine.tokenizer)
        self._alone, self._theirs = InTurns(engine), False

    def __contains__(self, number: int) -> bool:
        return ~number in self._alone if number < 0 else number in self._batch

    def insert(self, asked: Generation, session: Session, progress: Progress) -> int:
        if asked.alone:
            return ~self._alone.insert(asked, session, progress)
        return self._batch.insert(
            asked.prompt, asked.max_tokens, **options(asked, session, progress)
        )

    def next(self) -> list[tuple[int, GenerationResponse]]:
        company = len(self._batch) > 0
        self._theirs = len(self._alone) > 0 and not (company and self._theirs)
        if not self._theirs:
            return self._batch.next()
        if not company:
            return [(~number, response) for number, response in self._alone.next()]
        mx.synchronize()  # what the others have in flight is not their time
        found = [(~number, response) for number, response in self._alone.next()]
        self._alone.settle()
        return found

    def remove(self, number: int) -> None:
        if number < 0:
            self._alone.remove(~number)
        else:
            self._batch.remove(number)

    def close(self) -> None:
        self._alone.close()
        self._batch.close()


def of(engine: Engine, parallel: int) -> Together:
    """What runs so many answers of an engine at once."""
    if parallel > 1 and isinstance(engine, ModelEngine):
        return Batched(engine)
    return InTurns(engine)
