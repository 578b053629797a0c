"""Several answers at once: a step of all of them is one graph and one synchronisation, and each is
token for token what it would be alone.

Answers keep their own noise and trees. They join when their prompt is read, which goes on part by
part between steps, and leave when they end or are no longer wanted. The slabs of short ones lie in
a stack meanwhile, so that every layer attends once for all; long ones keep their own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from mlx_redrafter.cache.stack import Stack, Stacked, stackable
from mlx_redrafter.decoding.answering import Answering
from mlx_redrafter.decoding.engine import Emitted, Engine
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.rows import RowsStep
from mlx_redrafter.decoding.sampling import Arrays
from mlx_redrafter.decoding.step import State, settled
from mlx_redrafter.models.stacked import Seating
from mlx_redrafter.tree.shape import TreeShape

_STEPS_BETWEEN = 2  # of those that decode, between parts of prompts; one if more wait


class Company(Protocol):
    """What watches over answers that run together; `budget.company` has one."""

    def in_turns(self) -> bool:
        """Shall the next step be one answer's alone?"""
        ...

    def learn(self, shapes: Sequence[TreeShape], seconds: float) -> None:
        """A step of answers with these shapes took so long."""
        ...


@dataclass(eq=False)
class Row:
    """A request in a batch."""

    answer: Answering
    opening: Iterator[None]
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def left(self) -> int:
        """Prompt tokens that are not read."""
        request = self.answer.request
        return len(request.prompt) - len(request.session.tokens)


class Batch:
    """Answers of one engine that run together.

    Args:
        engine: whose target and drafters they use. Between calls of `step` one step may be in
            flight.
        company: None: all answers in every step.
    """

    def __init__(self, engine: Engine, company: Company | None = None) -> None:
        self.engine, self.company = engine, company
        self.rows: list[Row] = []  # that decode
        self.waiting: list[Row] = []  # whose prompts are not read yet
        self._stack = Stack(engine.target.caches, engine.target.dtype)
        self._since = 0  # steps since the last part of a prompt
        self._mark: float | None = None  # when the last step was read; None: something came between

    def add(self, request: Request) -> Row:
        """Take a request in; its prompt is read by the next calls of `step`.

        Raises:
            OptionError: as of `Engine.generate`.
        """
        answer = self.engine.answering(request)
        row = Row(answer, self.engine.opening(answer))
        row.held.enter_context(request.session.taken(self.engine.target, self.engine.keeping))
        self.waiting.append(row)
        return row

    def remove(self, row: Row) -> None:
        """Let an answer go, wherever it is; its session holds what there is of it."""
        if row in self.waiting:
            self.waiting.remove(row)
            row.held.close()
        elif row in self.rows:
            self.rows.remove(row)
            with row.held:
                if row in self._stack:
                    self._unseat(row)
                row.answer.close()

    def close(self) -> None:
        """Let all answers go."""
        for row in [*self.waiting, *self.rows]:
            self.remove(row)

    def step(self) -> list[tuple[Row, Emitted]]:
        """Do the next piece of work: a part of a prompt, or a step of all that decode.

        Returns:
            What came out, by answer. One that ended is no longer in the batch (``answer.done``).

        Raises:
            Whatever the reading of a prompt raises, of whose answer nothing is left in the batch.
        """
        between = _STEPS_BETWEEN if len(self.rows) > len(self.waiting) else 1
        if self.waiting and (not self.rows or self._since >= between):
            self._since, self._mark = 0, None
            self._read_on()
            return []
        self._since += 1
        return self._decode()

    def _read_on(self) -> None:
        """A part of the prompt of which least is left."""
        row = min(self.waiting, key=lambda row: row.left)
        try:
            next(row.opening)
        except StopIteration:
            self.waiting.remove(row)
            self.rows.append(row)
        except BaseException:
            self.remove(row)
            raise

    def _decode(self) -> list[tuple[Row, Emitted]]:
        if not self.rows:
            return []
        turns = self.company is not None and self.company.in_turns()
        if turns:
            self.rows.append(self.rows.pop(0))
        running = self.rows[-1:] if turns else list(self.rows)
        traces, reading = self.engine.traces, [row for row in running if row.answer.in_flight]
        self._launch([row for row in running if row not in reading or row.answer.goes_on])
        if not reading:
            return []
        found = []
        shapes = [row.answer.in_flight[0].shape for row in reading]
        for row in reading:
            answer = row.answer
            answer.resumed()
            found.append((row, Emitted(answer.read(alone=len(reading) == 1))))
        now = time.perf_counter()
        steady = len(reading) == len(running) and traces == self.engine.traces
        if self.company is not None and steady and self._mark is not None:
            self.company.learn(shapes, now - self._mark)
        self._mark = now
        for row in reading:
            if row.answer.done:
                self.remove(row)
                self._mark = None
        return found

    def _launch(self, rows: list[Row]) -> None:
        """Start a step of these answers, in an order that knows few combinations."""
        if not rows:
            return
        self._seat(rows)
        among = sorted(
            ((row not in self._stack, row.answer.prepare(), row) for row in rows),
            key=lambda one: (one[0], one[1].shape.nodes, repr(one[1])),
        )
        stacked = [row for apart, _, row in among if not apart]
        specs = tuple(spec for _, spec, _ in among)
        step = self.engine.rows_step(specs, len(stacked))
        answers = [row.answer for *_, row in among]
        states, arrays = [a.state for a in answers], [a.arrays for a in answers]
        texts, after = self._run(step, states, arrays, stacked)
        del states
        for spec, answer, text, state in zip(specs, answers, texts, after, strict=True):
            answer.launched(spec, text, State(*state))
        del after
        mx.async_eval(texts, [answer.state for answer in answers], self._stack.arrays)

    def _run(
        self, step: RowsStep, states: list[State], arrays: list[Arrays], stacked: list[Row]
    ) -> tuple[list[mx.array], list[State]]:
        """A step of answers of which these lie in the stack: texts, and the states afterwards."""
        if not stacked:
            return step(states, arrays, ())[:2]
        places = [self._stack.place(row) for row in stacked]
        order = [-1] * self._stack.size
        for i, place in enumerate(places):
            order[place] = i
        seating = Seating(mx.array(order, mx.int32), mx.array(places, mx.int32))
        before = self._stack.taken()
        try:
            texts, after, stack = step(states, arrays, (before, seating))
            before = Stacked(*stack)
        finally:
            self._stack.arrays = before
        return texts, after

    def _seat(self, rows: list[Row]) -> None:
        """Put into the stack, before a step of these answers, those that can lie there, if there
        are several, and take out those that cannot."""
        able = [row for row in rows if self._stackable(row.answer)]
        able = able if len(able) > 1 else []
        for row in rows:
            if row in self._stack and row not in able:
                self._unseat(row)
        needed = max((row.answer.needed for row in able), default=0)
        for row in able:
            if row not in self._stack:
                answer = row.answer
                caches = settled(answer.kinds, answer.state)
                answer.state = answer.state._replace(caches=[], pending=())
                self._stack.join(row, caches, needed)
        if able:
            self._stack.grow(needed)

    def _stackable(self, answer: Answering) -> bool:
        target = self.engine.target
        own = len(answer.kinds) == len(target.caches)  # drafters that keep rows have other slabs
        return own and target.stacks and stackable(target.caches, answer.needed)

    def _unseat(self, row: Row) -> None:
        """The answer has its slabs for itself again."""
        answer = row.answer
        answer.state = answer.state._replace(caches=self._stack.leave(row))
