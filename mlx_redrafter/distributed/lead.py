"""The first machine: it decides, and tells the others before it does what all of them do.

Requests, the shape of every step, how prompts are read, when an answer stops: whatever chooses a
graph comes from here. The others need no clock, no policy and no text, and nothing that is timed
has to be equal anywhere.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mlx_redrafter.api import Model, all_drafters
from mlx_redrafter.api.parts import parts_of
from mlx_redrafter.budget import chunks
from mlx_redrafter.budget.machine import Budget
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.batch import Batch, Company, Row
from mlx_redrafter.decoding.engine import Emitted, Engine
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.distributed import messages
from mlx_redrafter.distributed.cluster import Cluster
from mlx_redrafter.distributed.forms import TellingGrammar
from mlx_redrafter.distributed.link import Link
from mlx_redrafter.distributed.split import Planned, Split
from mlx_redrafter.distributed.wire import ClusterError
from mlx_redrafter.prefill.reading import USUAL, Progress
from mlx_redrafter.runtime import clock
from mlx_redrafter.runtime.paths import user_path
from mlx_redrafter.tree.shape import TreeShape


class Sharing(Engine):
    """An engine whose target several machines share: they forget the same of a session."""

    link: Link

    def keep(self, session: Session, prompt: Sequence[int], tag: str, awake: bool) -> None:
        """What layers can be cut to differs by machine, if each has layers of its own, and so may
        the snapshots that they have room for."""
        super().keep(session, prompt, tag, awake)
        while True:
            lengths = [length for (length,) in self.link.numbers(len(session.tokens))]
            if min(lengths) == max(lengths):
                return
            session.trim(min(lengths))


class Chosen:
    """A policy whose choices the others are told of."""

    def __init__(self, policy: Policy, cluster: Cluster) -> None:
        self.policy, self._cluster = policy, cluster
        self.shapes = policy.shapes

    def choose(self, position: int) -> TreeShape:
        shape = self.policy.choose(position)
        self._cluster.tell("shape", shape=self.shapes.index(shape), at=position)
        return shape

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        self.policy.record(shape, produced, seconds, experts)


class Reading:
    """What follows the reading of a prompt: the others are told of every part before it is read.
    ``left``: somebody has stopped it, in good order."""

    def __init__(self, progress: Progress | None, cluster: Cluster) -> None:
        self._progress, self._cluster, self.left = progress, cluster, False

    def __call__(self, done: int, total: int) -> None:
        try:
            if self._progress is not None:
                self._progress(done, total)
        except BaseException:
            self.left = True
            self._cluster.tell("leave")
            raise
        self._cluster.tell("read", done=done)


class Leading(Sharing):
    """The first machine's engine of one model."""

    cluster: Cluster
    number: int

    def lead(self, cluster: Cluster, number: int) -> Leading:
        self.cluster, self.link, self.number = cluster, cluster.link, number
        self._numbers, self._dropped = itertools.count(), deque[int]()
        self._sessions: weakref.WeakKeyDictionary[Session, int] = weakref.WeakKeyDictionary()
        return self

    def generate(self, request: Request) -> Generator[Emitted, None, None]:
        """See `Engine.generate`; what it refuses is refused before the others are told."""
        self.refuse(request)
        number, told = next(self._numbers), self.told(request)
        self.say_of("answer", request, number=number)
        steps, seen = super().generate(told), 0
        try:
            while True:
                self.cluster.tell("next", number=number, seen=seen)
                with self.cluster.whole(lambda: left(told)):
                    emitted = next(steps, None)
                if emitted is None:
                    return
                seen = messages.checksum(emitted.tokens, seen)
                yield emitted
        finally:
            steps.close()
            if not self.cluster.closed:
                self.cluster.tell("close", number=number)

    def told(self, request: Request) -> Request:
        """A request, all of whose decisions the others are told of."""
        shape = Chosen(self.policy(request.shape), self.cluster)
        grammar = request.grammar
        if grammar is not None:
            grammar = TellingGrammar(grammar, self.cluster.tell)
        progress = Reading(request.progress, self.cluster)
        return replace(request, shape=shape, progress=progress, grammar=grammar)

    def refuse(self, request: Request) -> None:
        """Raise what is wrong with a request, before the others are told of it."""
        self.answering(request)
        request.session.check(self.target)

    def say_of(self, op: str, request: Request, **more: int) -> None:
        """Tell the others of a request, and of sessions that are gone."""
        while self._dropped:
            self.cluster.tell("drop", model=self.number, session=self._dropped.popleft())
        plain = messages.of_request(request, self.policy(request.shape).shapes)
        session = self.session(request.session)
        self.cluster.tell(op, model=self.number, session=session, **more, **plain)

    def session(self, session: Session) -> int:
        """The number of a session by which the others have theirs."""
        if session not in self._sessions:
            self._sessions[session] = number = next(self._numbers)
            session.forked = self._forked
            weakref.finalize(session, self._dropped.append, number)
        return self._sessions[session]

    def _forked(self, session: Session, copy: Session, length: int) -> None:
        before, after = self.session(session), self.session(copy)
        self.cluster.tell("fork", model=self.number, session=before, copy=after, length=length)

    def batch(self, engine: Engine, company: Company | None = None) -> LeadBatch:
        """See `Model.batch`."""
        return LeadBatch(self, company)


def left(request: Request) -> bool:
    """Did an answer end, in good order, by an error?"""
    progress, grammar = request.progress, request.grammar
    by_grammar = isinstance(grammar, TellingGrammar) and grammar.left
    return by_grammar or (isinstance(progress, Reading) and progress.left)


class Turns:
    """A company whose decisions the others are told of."""

    def __init__(self, company: Company | None, cluster: Cluster) -> None:
        self._company, self._cluster = company, cluster

    def in_turns(self) -> bool:
        turns = self._company is not None and self._company.in_turns()
        self._cluster.tell("turns", turns=turns)
        return turns

    def learn(self, shapes: Sequence[TreeShape], seconds: float) -> None:
        if self._company is not None:
            self._company.learn(shapes, seconds)


class LeadBatch(Batch):
    """Answers that run together, on all machines."""

    def __init__(self, engine: Leading, company: Company | None) -> None:
        super().__init__(engine, Turns(company, engine.cluster))
        self._lead, self._named, self._within = engine, dict[Row, int](), False
        self._number, self._seen = next(engine._numbers), 0
        engine.cluster.tell("batch", model=engine.number, batch=self._number)

    def add(self, request: Request) -> Row:
        self._lead.refuse(request)
        number = next(self._lead._numbers)
        self._lead.say_of("add", request, number=number, batch=self._number)
        row = super().add(self._lead.told(request))
        self._named[row] = number
        return row

    def remove(self, row: Row) -> None:
        """Rows that end within a step end on all machines."""
        number = self._named.pop(row, None)
        if not self._within and number is not None and not self._lead.cluster.closed:
            self._lead.cluster.tell("remove", batch=self._number, number=number)
        super().remove(row)

    @property
    def everyone(self) -> list[Row]:
        return [*self.rows, *self.waiting]

    def reads(self) -> bool:
        due = super().reads()
        self._lead.cluster.tell("due", due=due)
        return due

    def step(self) -> list[tuple[Row, Emitted]]:
        cluster, asked = self._lead.cluster, [row.answer.request for row in self.everyone]
        cluster.tell("step", batch=self._number, seen=self._seen)
        self._within = True
        try:
            with cluster.whole(lambda: any(map(left, asked))):
                found = super().step()
            for _, emitted in found:
                self._seen = messages.checksum(emitted.tokens, self._seen)
            return found
        finally:
            self._within = False


class LeadBudget(Budget):
    """What steps cost over these machines, by the clock of the first: it waits for the slowest."""

    cluster: Cluster
    number: int
    split: Planned

    def conditions(self) -> dict[str, Any]:
        chips = [peer.facts["chip"] for peer in self.cluster.peers]
        shares = (self.split.kind, *self.split.shares, self.cluster.quick)
        return {**super().conditions(), "machines": [*chips, *map(str, shares)]}

    def measured(self, what: Literal["costs", "rows"], text: Sequence[int] = ()) -> Any:
        text = text or (self._text() if self.target.routes else ())
        self.cluster.tell("measure", model=self.number, what=what, text=list(text))

        def told(seconds: list[float]) -> list[float]:
            self.cluster.tell("seconds", seconds=seconds)
            return seconds

        with self.cluster.whole(), clock.agreed(told):
            return super().measured(what, text)

    def step_size(self, prompt: int, cached: int = 0) -> int:
        """The usual one: layers alone, which tell the best, are not timed over several machines."""
        return min(USUAL, chunks.most(self.target.config, prompt))


def load(
    cluster: Cluster,
    path: str,
    drafter: str | None = "auto",
    split: Split | None = None,
    **more: Any,
) -> tuple[Model, Any]:
    """Load a model on all machines; see `mlx_redrafter.load`.

    Args:
        path: a name, or a folder; of one with a folder ``rank-0`` and so on every machine takes its
            own.
        split: how it is shared.

    Raises:
        ClusterError: what went wrong on another machine, or weights that are not equal.
    """
    number, split = next(_MODELS), split or Split()
    text = more.pop("text", True)
    planned = Planned(cluster.link, split, cluster.quick)
    planned.split.for_size(cluster.link.size)
    cluster.tell(
        "load", model=number, path=path, drafter=drafter, kind=split.kind,
        shares=list(split.shares), quick=cluster.quick, **messages.load_options(more),
    )  # fmt: skip
    try:
        parts = parts_of(own_folder(path, 0), drafter, plan=planned, text=text, **more)
    except BaseException:
        with contextlib.suppress(ClusterError):  # what is wrong here is told, not what is there
            cluster.answers()
        raise
    own = messages.fingerprint(Path(parts.folder), parts.drafter_folder)
    for peer, answer in zip(cluster.peers, cluster.answers(), strict=True):
        if answer["fingerprint"] != own:
            raise ClusterError(
                f"{peer.name} has other weights of {path} than this machine: copy the model and "
                "its drafter to it again"
            )
    drafters = all_drafters(parts.drafter)
    engine = Leading(parts.target, drafters, parts.compiled).lead(cluster, number)
    budget = LeadBudget(engine, parts.target, parts.folder, parts.drafter_folder)
    budget.cluster, budget.number, budget.split = cluster, number, planned
    model = Model(
        parts.name, parts.folder, parts.target, parts.drafter, parts.drafter_folder, engine, budget,
        parts.drafting, engine.batch,
    )  # fmt: skip
    return model, parts.tokenizer


def own_folder(path: str, rank: int) -> str:
    """Of a folder with one for each machine, this machine's."""
    own = user_path(path) / f"rank-{rank}"
    return str(own) if own.is_dir() else path


_MODELS = itertools.count()
