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

from mlx_redrafter.decoding.answering import Answering
from mlx_redrafter.decoding.engine import Emitted, Engine
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.stacks import Stacks
from mlx_redrafter.decoding.step import State
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.clock import Laps
from mlx_redrafter.tree.shape import TreeShape

_AT_ONCE = 64  # tokens of prompts between two steps, if no part of one is longer


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
    failed: OptionError | None = None

    @property
    def left(self) -> int:
        """Prompt tokens that are not read."""
        request = self.answer.request
        return len(request.prompt) - len(request.session.tokens)

    @property
    def read(self) -> int:
        """Prompt tokens that were read for it."""
        return max(0, self.answer.request.stats.prefill_tokens - self.left)


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
        self._stacks = Stacks(engine.target)
        self._read_for = self._decoded_for = 0.0  # seconds: the last part of a prompt, steps since
        self._laps = Laps()

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
                self._stacks.unseat(row.answer)
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
            Whatever the reading of a prompt raises, and OptionError of a grammar that cannot be
            followed: nothing of that answer is left in the batch, and the others go on.
        """
        for row in self.rows:
            if row.failed is not None:
                self.remove(row)
                raise row.failed
        start = time.perf_counter()
        if self.waiting and (not self.rows or self.reads()):
            self._laps.forget()
            self._decoded_for = 0.0
            self._read_on()
            self._read_for = time.perf_counter() - start
            return []
        found = self._decode()
        self._decoded_for += time.perf_counter() - start
        return found

    def reads(self) -> bool:
        """Is the next piece of work a part of a prompt, while others decode?"""
        return self._decoded_for > self._owed

    @property
    def _owed(self) -> float:
        """Seconds for those that decode before a further part of a prompt is read: of what the last
        part took, by how many they are, and more than none."""
        return self._read_for * len(self.rows) / (len(self.rows) + len(self.waiting))

    def _read_on(self) -> None:
        """A part of the prompt of which least is left, and more as long as it is little."""
        row, room = self._nearest(), _AT_ONCE
        while row is not None:
            before = row.read
            self._read(row)
            room -= row.read - before
            row = self._nearest()
            if row is not None and row.left > max(room, 1):
                return

    def _nearest(self) -> Row | None:
        return min(self.waiting, key=lambda row: row.left, default=None)

    def _read(self, row: Row) -> None:
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
        reading, came = [row for row in running if row.answer.in_flight], time.perf_counter()
        for row in running:
            row.answer.resumed()
        if all(row.answer.place is None for row in running):
            self._launch([row for row in running if row not in reading or row.answer.goes_on])
        else:  # what waits for the host would run without the others, if these were a step ahead
            self._launch([row for row in running if row not in reading])
            reading = running
        if not reading:
            return []
        if any(row.answer.in_flight[-1].fresh for row in reading):
            self._laps.forget()
        steps = [row.answer.in_flight[0] for row in reading]
        found = []
        for row in reading:
            answer = row.answer
            try:
                tokens = answer.read()
                found.append((row, Emitted(tokens, answer.tree)))
            except OptionError as error:
                row.failed = error  # the others' tokens are handed out first
        behind = sum(len(row.answer.in_flight) for row in reading)
        seconds = self._laps.ended(came, time.perf_counter(), behind)
        whole = all(step.together == len(steps) and not step.fresh for step in steps)
        if self.company is not None and whole and seconds is not None:
            self.company.learn([step.shape for step in steps], seconds)
        for row in reading:
            if row.answer.done:
                self.remove(row)
        return found

    def _launch(self, rows: list[Row]) -> None:
        """Start a step of these answers, in an order that knows few combinations."""
        if not rows:
            return
        self._stacks.seat([row.answer for row in rows])
        specs = {row.answer: row.answer.prepare() for row in rows}
        answers = sorted(
            specs,
            key=lambda a: (self._stacks.rank(a), specs[a].shape.nodes, repr(specs[a])),
        )
        lying = self._stacks.those(answers)
        stacked = tuple(map(len, lying.values()))
        step = self.engine.rows_step(tuple(specs[a] for a in answers), stacked)
        states, arrays = [a.state for a in answers], [a.arrays for a in answers]
        with self._stacks.taken(lying) as (together, put_back):
            texts, after, left = step(states, arrays, together)
            put_back(left)
        del states, left, together
        for answer, text, state in zip(answers, texts, after, strict=True):
            answer.launched(specs[answer], text, State(*state), together=len(answers))
        del after
        mx.async_eval(texts, [a.state for a in answers], [s.arrays for s in lying])
