"""Answers that run at the same time, as the engine thread runs them."""

from __future__ import annotations

import itertools
from typing import Protocol

from mlx_redrafter.api.batching import BatchGenerator
from mlx_redrafter.cache.session import Session
from mlx_redrafter.prefill.reading import Progress
from mlx_redrafter.server.engine import Engine, ModelEngine, Responses, options
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.text.answer import GenerationResponse


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
    """One answer after the other, a step at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: dict[int, Responses] = {}
        self._numbers = itertools.count()

    def __contains__(self, number: int) -> bool:
        return number in self._running

    def insert(self, asked: Generation, session: Session, progress: Progress) -> int:
        number = next(self._numbers)
        self._running[number] = self._engine.answer(asked, session, progress)
        return number

    def next(self) -> list[tuple[int, GenerationResponse]]:
        number, responses = next(iter(self._running.items()))
        found = []
        try:
            for response in responses:
                found.append((number, response))
                if response.finish_reason is not None:
                    self.remove(number)
                    break
                if not response.from_draft:  # the step is over
                    break
        except BaseException:
            self.remove(number)
            raise
        return found

    def remove(self, number: int) -> None:
        self._running.pop(number).close()

    def close(self) -> None:
        for number in list(self._running):
            self.remove(number)


class Batched:
    """All answers in every step."""

    def __init__(self, engine: ModelEngine) -> None:
        engine.model.budget.costs(say=lambda text: None)  # measured while the model loads
        self._batch = BatchGenerator(engine.model, engine.tokenizer)

    def __contains__(self, number: int) -> bool:
        return number in self._batch

    def insert(self, asked: Generation, session: Session, progress: Progress) -> int:
        return self._batch.insert(
            asked.prompt, asked.max_tokens, **options(asked, session, progress)
        )

    def next(self) -> list[tuple[int, GenerationResponse]]:
        return self._batch.next()

    def remove(self, number: int) -> None:
        self._batch.remove(number)

    def close(self) -> None:
        self._batch.close()


def of(engine: Engine, parallel: int) -> Together:
    """What runs so many answers of an engine at once."""
    if parallel > 1 and isinstance(engine, ModelEngine):
        return Batched(engine)
    return InTurns(engine)
