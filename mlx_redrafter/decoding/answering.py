"""One answer's steps, one in flight ahead of the one whose tokens are being read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, LayerCache, capacity_of, grown
from mlx_redrafter.cache.session import UNKNOWN
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.decoding.grammar import MOST_FORCED, Again, Chosen, Held
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.step import State, StepSpec, nothing_pending, waits
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.models import Target
from mlx_redrafter.runtime.clock import Laps
from mlx_redrafter.runtime.device import release
from mlx_redrafter.tree import told
from mlx_redrafter.tree.nodes import END, DraftTree
from mlx_redrafter.tree.shape import TreeShape

_PATIENCE = 32  # steps that keep the rows of drafters whom nobody asks


class Runner(Protocol):
    """What runs the steps; see `Engine`."""

    traces: int

    @property
    def target(self) -> Target: ...

    @property
    def drafters(self) -> Sequence[Drafter]: ...

    @property
    def keeping(self) -> Sequence[Drafter]:
        """Drafters that keep rows by position."""
        ...

    @property
    def kinds(self) -> Sequence[LayerCache]:
        """What all layers remember."""
        ...

    def taking_part(self, awake: bool) -> Sequence[Drafter]:
        """The drafters: all, or those that keep no rows."""
        ...

    def again(self, spec: StepSpec) -> Again:
        """What makes a choice of such a step again."""
        ...


class InFlight(NamedTuple):
    """A step that was started; counted: behind its text stands a number of experts; grown: its
    caches are larger than those of the step before; fresh: its graph was made for it; together:
    of how many answers it is."""

    spec: StepSpec
    text: mx.array
    counted: bool
    grown: bool
    fresh: bool
    together: int

    @property
    def shape(self) -> TreeShape:
        return self.spec.shape


class Answering:
    """What is known of an answer while its steps run. Whoever runs them calls `start`, then for
    every step `prepare` and `launched`, and `read` for the oldest that was launched, which may be
    one behind; `close` in any case.

    ``known`` holds the prompt and every token produced so far.

    Args:
        policy: what chooses the shape of a step.
        room: the most tokens.
        awake: do drafters that keep rows take part?
    """

    state: State
    held: Held  # of a step whose choices can be made again, the one in flight

    def __init__(
        self, engine: Runner, request: Request, policy: Policy, room: int, awake: bool
    ) -> None:
        self.engine, self.request, self.policy = engine, request, policy
        self.awake, self.unasked = awake, 0
        self.asleep: list[Kept] = []  # caches of drafters that do not take part
        self.covered: int | None = None  # tokens that these have rows of
        self.sampling = request.sampling.arrays(engine.target.config.vocab_size)
        self.arrays = self.sampling  # of the next step
        self.known = list(request.prompt)
        # As letters, behind the first root: an answer goes on with it from a token that is there.
        self.prediction = "".join(map(chr, [*request.prompt[-1:], *request.prediction]))
        self.final = len(self.known) + room
        self.longest = max(shape.longest for shape in policy.shapes) + 1  # tokens of a step
        self.widest = max(shape.nodes for shape in policy.shapes)
        self.place = request.grammar.begin() if request.grammar is not None else None
        self.forced: list[int] = []  # what certainly follows
        if self.place is not None:
            self.longest = max(self.longest, MOST_FORCED + 1)
            self.widest = max(self.widest, MOST_FORCED + 1)
            self.forced = self.place.forced(MOST_FORCED)
        self.in_flight: deque[InFlight] = deque()
        # Tokens whose rows are in the slabs where they belong, and those that are committed.
        self.in_place = self.stand = len(self.known) - 1
        self.done = self.ended = False  # ended: by its grammar
        self._grew = False
        self.tree: told.ToldTree | None = None  # of the step that was read last
        self._mark, self._laps = 0.0, Laps()
        self._traces = 0

    def start(self, state: State) -> None:
        """The prompt was read."""
        self.state = state
        if not self.awake:
            self._let_go(self.request.session.covered)
        self._mark = time.perf_counter()
        self._laps.forget()
        self._traces = self.engine.traces

    @property
    def goes_on(self) -> bool:
        """Will there be a step behind the one in flight, whatever comes of that?"""
        return self.place is None and len(self.known) + 1 < self.final

    @property
    def needed(self) -> int:
        """Slots that the next step needs."""
        furthest = len(self.known) - 1 + (self.longest if self.in_flight else 0)
        return furthest + self.longest + self.widest

    def prepare(self) -> StepSpec:
        """The bucket of the next step, for which the state has room afterwards."""
        given = [token for token in self.forced if self.place and token != self.place.end]
        shape, stacked = _row_of(len(given)) if given else self._shape(), not self.state.caches
        self.arrays = {**self.sampling, "given": mx.array(given)} if given else self.sampling
        self._grow(self.needed)
        pending = self.state.pending
        if not pending and len(self.policy.shapes) == 1 and not stacked:
            pending = nothing_pending(self.kinds, self.state.caches, shape)
            self.state = self.state._replace(pending=pending)
        waiting = pending[1].shape[0] if pending else 0
        return self.spec(shape, waiting, bool(given))

    def spec(self, shape: TreeShape, waiting: int, given: bool = False) -> StepSpec:
        """The bucket of a step of this shape, with so many nodes of the one before waiting. given:
        see `StepSpec`."""
        request = self.request
        return StepSpec(
            shape, request.sampling.features, request.sampling.windows, waiting, self.awake,
            held=self.place is not None, given=given, margins=request.margins and not given,
            told=request.trees,
        )  # fmt: skip

    def launched(
        self,
        spec: StepSpec,
        text: mx.array,
        state: State,
        counted: bool = False,
        together: int = 1,
    ) -> None:
        """A step of the prepared bucket was started.

        Args:
            counted: behind the text of one that drafts stands how many experts its nodes chose.
            together: answers that it is a step of.
        """
        self.stand = UNKNOWN if self.in_flight else len(self.known) - 1
        if state.held:
            held = Held(*state.held)
            self.held = held._replace(tree=DraftTree(*held.tree))
        self.state = state._replace(held=())
        counted = counted and spec.shape.drafts
        fresh = self.engine.traces != self._traces
        self.in_flight.append(InFlight(spec, text, counted, self._grew, fresh, together))
        self._grew, self._traces = False, self.engine.traces
        if fresh:
            self._laps.forget()  # the step in flight ended unseen meanwhile

    def read(self) -> list[int]:
        """Wait for the oldest step: its tokens, accepted drafts and the bonus."""
        spec, text, counted, grown, fresh, together = self.in_flight.popleft()
        request, known, ahead = self.request, self.known, bool(self.in_flight)
        stats, shape = request.stats, spec.shape
        numbers = cast(list[int], text.tolist())
        if grown:
            release()
        experts = numbers.pop() if counted else self.engine.target.routes
        if spec.margins:
            stats.near_ties = (stats.near_ties or 0) + numbers.pop()
        size = shape.longest + 2
        tokens, closing, redone = [t for t in numbers[1:size] if t != END], list[int](), False
        if self.place is not None:
            tokens, closing, redone = self._legal(spec, tokens)
        if spec.told:
            self.tree = told.read(numbers[size:], [numbers[0], *tokens]) if tokens else None
        now = time.perf_counter()
        stats.decode_seconds += now - self._mark
        self.in_place = len(known) - self.behind
        if ahead:
            self.stand = len(known) + len(tokens) - 1
        tokens = tokens[: self.final - len(known)]
        if request.prediction:
            found = _going_on([known[-1], *tokens], self.prediction)
            stats.foretold += found
            stats.predicted += min(found, max(0, len(tokens) - 1))
        behind = self.in_flight[-1].together if ahead else 0
        seconds = self._laps.ended(self._mark, now, behind)
        if not spec.given:
            alone = together == 1 and not fresh
            self.policy.record(shape, len(tokens), seconds if alone else None, experts)
        self._mark = now
        if redone:
            self._laps.forget()
        known.extend(tokens)
        if ahead or (shape.one_path and not self.behind):
            self.in_place = len(known) - 1
        closing = closing[: self.final - len(known)]
        known.extend(closing)
        tokens += closing
        label = f"{shape.lookup} certain" if spec.given else str(shape)
        stats.record(len(tokens), max(shape.nodes, len(tokens)) - 1, label)
        self.done = self.ended or len(known) >= self.final
        return tokens

    def _legal(self, spec: StepSpec, tokens: list[int]) -> tuple[list[int], list[int], bool]:
        """What the grammar makes of a step: its legal tokens, those that nothing but the end can
        follow them with, and was a choice made again?"""
        place = self.place
        assert place is not None
        taken, redone = place.take(tokens), False
        self.forced = place.forced(MOST_FORCED)
        ends = place.over or place.end in self.forced
        if taken < len(tokens) and not ends:
            token, redone = self._choose_again(spec, taken), True
            legal = place.take([token])
            assert legal == 1, "a choice among the legal tokens is legal"
            tokens[taken], taken = token, taken + 1
            self.forced = place.forced(MOST_FORCED)
        closing = self.forced if place.end in self.forced else []
        self.ended = place.over or bool(closing)
        return tokens[:taken], closing, redone

    def _choose_again(self, spec: StepSpec, depth: int) -> int:
        """The step that was read goes on from the node at a depth of its path, with a token that is
        legal there."""
        state, held, own = self.state, self.held, len(self.engine.target.caches)
        assert self.place is not None
        bits, at = mx.array(self.place.mask()), mx.array([depth], mx.int32)
        again = self.engine.again(spec)(held, state.history, self.sampling, bits, at)
        chosen = Chosen(*again)
        history, pending = state.history, state.pending
        if not isinstance(history, tuple):
            history = mx.slice_update(history, chosen.text, held.position, (0,))
        if pending:  # accepted is what has a slot before the new root: those stand
            waiting = [waits(kind, spec.shape) for kind in self.kinds[own:]]
            left = [r if w else () for r, w in zip(chosen.rows, waiting, strict=True)]
            pending = [*pending[0][:own], *left], pending[1]
        self.state = state._replace(
            root=chosen.token, position=held.position + chosen.produced, drafts=chosen.drafts,
            history=history, pending=pending,
        )  # fmt: skip
        return cast(int, chosen.token.item())

    def resumed(self) -> None:
        """Whoever got the tokens is back: what it took is not the decoding's."""
        now = time.perf_counter()
        self.request.stats.host_seconds += now - self._mark
        self._mark = now

    def close(self) -> None:
        """Give the session what there is of the answer."""
        # A step launched ahead has put the rows that were accepted before it into place, and
        # its own behind them; without one, the last tree's rows are still in tree order, and
        # what drafters keep of its root waits with them.
        caches = [*self.state.caches, *self.asleep]
        tokens, ended = self.known[: self.in_place], len(self.known) + self.longest + self.widest
        self.request.session.holds(tokens, caches, self.stand, self.covered, ended)

    @property
    def kinds(self) -> Sequence[LayerCache]:
        """What the state's caches are."""
        return self.engine.kinds if self.awake else self.engine.target.caches

    @property
    def behind(self) -> bool:
        """Do rows of the last step wait, whatever its shape?"""
        return self.awake and bool(self.engine.keeping)

    def _shape(self) -> TreeShape:
        """Of the next step. Drafters that keep rows are let go of where nobody asks them any more:
        a step that does not draft must cost what plain decoding costs."""
        shape = self.policy.choose(len(self.known))
        if self.behind:
            asked = any(drafter.part in shape.parts for drafter in self.engine.keeping)
            self.unasked = 0 if asked else self.unasked + 1
            if self.unasked > _PATIENCE:
                pairs = zip(self.engine.drafters, self.state.drafts, strict=True)
                drafts = tuple(kept for drafter, kept in pairs if not drafter.caches)
                self.state = self.state._replace(drafts=drafts)
                self._let_go(len(self.known) - 1)
        return shape if self.awake else shape.only(d.part for d in self.engine.taking_part(False))

    def _let_go(self, covered: int) -> None:
        """Put aside what drafters keep; it is there for so many tokens."""
        own, state = len(self.engine.target.caches), self.state
        self.asleep, self.covered, self.awake = state.caches[own:], covered, False
        pending = (state.pending[0][:own], state.pending[1]) if state.pending else ()
        self.state = state._replace(caches=state.caches[:own], pending=pending)

    def _grow(self, needed: int) -> None:
        """More room in the caches and the history, where a step could need it."""
        caches, history = self.state.caches, self.state.history
        room = capacity_of(self.kinds, caches) if caches else None
        if room is not None and room < needed:
            caches = grown(self.kinds, caches, capacity_for(needed))
            self.state, self._grew = self.state._replace(caches=caches), True
        if not isinstance(history, tuple) and history.shape[0] < needed:
            more = capacity_for(needed) - history.shape[0]
            self.state = self.state._replace(history=mx.pad(history, (0, more)))


def _going_on(tokens: Sequence[int], text: str) -> int:
    """How many of the tokens behind the first one stand there in a text too, in a row."""
    letters = "".join(map(chr, tokens))
    return next((n for n in range(len(tokens) - 1, 0, -1) if letters[: n + 1] in text), 0)


def _row_of(tokens: int) -> TreeShape:
    """The shape of a step whose drafts, so many, are known."""
    return TreeShape(1, 0, 1 + tokens, lookup=tokens)
