"""All machines but the first: they do what they are told, in that order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import partial

from mlx_redrafter.api import all_drafters, wired
from mlx_redrafter.api.parts import parts_of
from mlx_redrafter.budget.machine import Budget
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.batch import Batch, Row
from mlx_redrafter.decoding.engine import Emitted
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.distributed import messages
from mlx_redrafter.distributed.cluster import LOST, is_lost
from mlx_redrafter.distributed.ending import End
from mlx_redrafter.distributed.forms import ToldGrammar
from mlx_redrafter.distributed.lead import Sharing, own_folder
from mlx_redrafter.distributed.link import Link
from mlx_redrafter.distributed.probing import probe
from mlx_redrafter.distributed.split import Planned, Split
from mlx_redrafter.distributed.wire import ClusterError, Message, Wire
from mlx_redrafter.errors import OptionError, RedrafterError
from mlx_redrafter.runtime import clock, threads
from mlx_redrafter.tree.shape import TreeShape


class Left(OptionError):
    """The first machine has stopped reading a prompt, or cannot follow a grammar any more."""


class Told:
    """A policy that does as it is told."""

    def __init__(self, shapes: Sequence[TreeShape], wire: Wire) -> None:
        self.shapes, self._wire = shapes, wire

    def choose(self, position: int) -> TreeShape:
        message = expected(self._wire, "shape")
        if message["at"] != position:
            raise ClusterError(
                f"this machine is at token {position} and the first one at {message['at']}: they "
                "do not compute the same"
            )
        return self.shapes[message["shape"]]

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        pass


class ToldTurns:
    """A company that does as it is told."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def in_turns(self) -> bool:
        return bool(expected(self._wire, "turns")["turns"])

    def learn(self, shapes: Sequence[TreeShape], seconds: float) -> None:
        pass


class ToldBatch(Batch):
    """Answers that run together, as it is told."""

    def __init__(self, engine: Sharing, wire: Wire) -> None:
        super().__init__(engine, ToldTurns(wire))
        self._wire = wire

    def reads(self) -> bool:
        return bool(expected(self._wire, "due")["due"])


class Ended(Exception):
    """The first machine has ended; why, if it was an error."""


def expected(wire: Wire, op: str) -> Message:
    """The next message, which must be of this kind."""
    message = wire.receive()
    if message["op"] == "end":
        raise Ended(message["error"])
    if message["op"] == "leave":
        raise Left
    if message["op"] != op:
        raise ClusterError(f"the first machine says {message['op']} where {op} is due")
    return message


@dataclass
class Followed:
    """A model, and its sessions by number."""

    engine: Sharing
    budget: Budget
    sessions: dict[int, Session] = field(default_factory=dict)


class Follower:
    """Does what the first machine says until it ends.

    Args:
        link: to all.
        wire: to the first.
    """

    def __init__(self, link: Link, wire: Wire) -> None:
        self._link, self._wire = link, wire
        self._models: dict[int, Followed] = {}
        self._answers: dict[int, Generator[Emitted, None, None]] = {}
        self._seen: dict[int, int] = {}  # checksums of what answers and batches gave
        self._batches: dict[int, Batch] = {}
        self._rows: dict[int, Row] = {}
        self._wrong: RedrafterError | None = None
        self._held = contextlib.ExitStack()

    def run(self) -> None:
        """Raises Ended, and whatever goes wrong."""
        while True:
            message = self._wire.receive()
            if message["op"] == "end":
                raise self._wrong or Ended(message["error"])
            getattr(self, f"_{message['op']}")(message)

    def _load(self, message: Message) -> None:
        try:
            self._models[message["model"]] = self._loaded(message)
        except RedrafterError as error:
            # Whoever hears of it first ends first: the first machine tells its user why.
            self._wire.send({"op": "loaded", "error": str(error)})
            self._wrong = error
            return
        model = self._models[message["model"]]
        own = messages.fingerprint(model.budget.folder, model.budget.drafter_folder)
        self._wire.send({"op": "loaded", "fingerprint": own})

    def _loaded(self, message: Message) -> Followed:
        plan = Planned(
            self._link, Split(message["kind"], tuple(message["shares"])), message["quick"]
        )
        options = {name: message[name] for name in messages.load_options({})}
        path = own_folder(message["path"], self._link.rank)
        parts = parts_of(path, message["drafter"], plan=plan, text=False, **options)
        engine = Sharing(parts.target, all_drafters(parts.drafter), parts.compiled)
        engine.link = self._link
        budget = Budget(engine, parts.target, parts.folder, parts.drafter_folder)
        self._held.enter_context(wired(parts.target))
        return Followed(engine, budget)

    def _alike(self, message: Message) -> None:
        self._link.alike = message["alike"]

    def _request(self, message: Message) -> Request:
        sessions, number = self._models[message["model"]].sessions, message["session"]
        session = sessions.setdefault(number, Session())
        session.trim(message["length"])
        policy = Told(messages.shapes_of(message), self._wire)
        grammar = None
        if message["end"] is not None:
            grammar = ToldGrammar(message["end"], partial(expected, self._wire))
        return messages.to_request(message, policy, session, self._read, grammar)

    def _read(self, done: int, total: int) -> None:
        told = expected(self._wire, "read")["done"]
        if told != done:
            raise ClusterError(
                f"this machine reads a prompt from token {done} and the first one from {told}: "
                "they do not compute the same"
            )

    def _answer(self, message: Message) -> None:
        engine = self._models[message["model"]].engine
        self._answers[message["number"]] = engine.generate(self._request(message))

    def _next(self, message: Message) -> None:
        number = message["number"]
        self._same(number, message)
        with contextlib.suppress(Left):
            if (emitted := next(self._answers[number], None)) is not None:
                self._seen[number] = messages.checksum(emitted.tokens, self._seen.get(number, 0))

    def _same(self, number: int, message: Message) -> None:
        if self._seen.get(number, 0) != message["seen"]:
            raise ClusterError("this machine computes another text than the first one")

    def _close(self, message: Message) -> None:
        self._answers.pop(message["number"]).close()
        self._seen.pop(message["number"], None)

    def _fork(self, message: Message) -> None:
        sessions = self._models[message["model"]].sessions
        sessions[message["copy"]] = sessions[message["session"]].fork(message["length"])

    def _drop(self, message: Message) -> None:
        self._models[message["model"]].sessions.pop(message["session"], None)

    def _batch(self, message: Message) -> None:
        engine = self._models[message["model"]].engine
        self._batches[message["batch"]] = ToldBatch(engine, self._wire)

    def _add(self, message: Message) -> None:
        batch = self._batches[message["batch"]]
        self._rows[message["number"]] = batch.add(self._request(message))

    def _remove(self, message: Message) -> None:
        batch = self._batches[message["batch"]]
        batch.remove(self._rows.pop(message["number"]))

    def _step(self, message: Message) -> None:
        number, batch = message["batch"], self._batches[message["batch"]]
        self._same(number, message)
        with contextlib.suppress(Left):
            for _, emitted in batch.step():
                self._seen[number] = messages.checksum(emitted.tokens, self._seen.get(number, 0))
        there = {*batch.rows, *batch.waiting}
        self._rows = {n: r for n, r in self._rows.items() if r in there}

    def _probe(self, message: Message) -> None:
        probe(self._link)

    def _measure(self, message: Message) -> None:
        def told(seconds: list[float]) -> list[float]:
            return list(expected(self._wire, "seconds")["seconds"])

        with clock.agreed(told):
            self._models[message["model"]].budget.measured(message["what"], message["text"])


def follow(link: Link, wire: Wire, end: End) -> None:
    """Follow the first machine to its end; this process ends with one line where that is an error.

    Raises ClusterError.
    """
    threads.clear_at_end()
    try:
        Follower(link, wire).run()
    except Ended as ended:
        if str(ended):
            raise ClusterError(f"the first machine has ended: {ended}") from None
    except Exception as error:
        if is_lost(error):
            time.sleep(LOST)  # the wire says more, if it is the first that is lost
            end.now("the connection to another machine was lost")
        raise
