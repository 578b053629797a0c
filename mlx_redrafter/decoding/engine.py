"""The token loop: prefill, steps, limits, statistics. It knows token ids only, no text."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, LayerCache, capacity_of, grown
from mlx_redrafter.cache.ring import check_nodes
from mlx_redrafter.cache.session import UNKNOWN
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.decoding.policy import Fixed, Policy
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.step import (
    State,
    StepFunction,
    StepSpec,
    absorbing,
    all_caches,
    make_step,
    nothing_pending,
    read_layers,
)
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.models import Target
from mlx_redrafter.prefill.reading import read
from mlx_redrafter.prefill.sparse import SparseAttention
from mlx_redrafter.stats import PrefillStats
from mlx_redrafter.tree.nodes import END
from mlx_redrafter.tree.shape import TreeShape

_PATIENCE = 32  # steps that keep the rows of drafters whom nobody asks


@dataclass(frozen=True)
class Emitted:
    """What one step produced: accepted drafts, then the bonus token."""

    tokens: list[int]


class Engine:
    """Runs steps of one target and its drafters.

    Args:
        target: the model.
        drafters: what proposes; none: plain decoding only.
        compiled: False runs the same steps uncompiled (no C++ compiler on Linux; debugging).
    """

    def __init__(
        self, target: Target, drafters: Sequence[Drafter] = (), compiled: bool = True
    ) -> None:
        self.target = target
        self.drafters = tuple(drafters)
        self.kinds = all_caches(target, drafters)
        self.keeping = [drafter for drafter in drafters if drafter.caches]
        self.compiled = compiled
        self.traces = 0
        self.say: Callable[[str], None] = lambda text: None  # told what takes seconds, once
        self._steps: dict[StepSpec, StepFunction] = {}

    def step_function(self, spec: StepSpec) -> StepFunction:
        """The compiled step of a bucket, made on first use."""
        if spec not in self._steps:
            step = make_step(self.target, self.taking_part(spec.awake), spec, self._count_trace)
            self._steps[spec] = mx.compile(step) if self.compiled else step
        return self._steps[spec]

    def taking_part(self, awake: bool) -> tuple[Drafter, ...]:
        """The drafters: all, or those that keep no rows."""
        return tuple(drafter for drafter in self.drafters if awake or not drafter.caches)

    def _awake(self, policy: Policy) -> bool:
        """May a drafter that keeps rows be asked? Where none is, its rows are not made either."""
        parts = {part for shape in policy.shapes for part in shape.parts}
        return not self.keeping or any(drafter.part in parts for drafter in self.keeping)

    def _count_trace(self) -> None:
        self.traces += 1

    def generate(self, request: Request) -> Generator[Emitted, None, None]:
        """Yield the tokens after the prompt, a step at a time, until ``max_tokens`` (-1: no limit)
        or the end of the context. Closing the iterator leaves the session consistent.

        Raises:
            OptionError: what `Request.room` refuses, patterns of another model, a session in use
                or of another model, a tree that is too large for the windows' rings.
        """
        room = request.room(self.target.config)
        policy = self._policy(request.shape)
        awake = self._awake(policy)
        check_nodes(self.kinds, max(shape.nodes for shape in policy.shapes))
        answer = _Answer(self, request, policy, room, awake)
        with request.session.taken(self.target, self.keeping):
            # The state goes straight through: a name for it here would keep the first slabs alive,
            # and the first step would have to copy them all.
            yield from answer.steps(self._prefill(request, policy.shapes, awake))

    def _policy(self, shape: TreeShape | Policy) -> Policy:
        if not isinstance(shape, TreeShape):
            return shape
        return Fixed(shape.only(drafter.part for drafter in self.drafters))

    def _prefill(self, request: Request, shapes: Sequence[TreeShape], awake: bool) -> State:
        """Read what the session lacks of all but the last prompt token, which is the first root."""
        start = time.perf_counter()
        prompt, session, stats = request.prompt, request.session, request.stats
        drafters = self.taking_part(awake)
        sparse, options = None, request.sparse_prefill
        if options is not None and options.mode != "off":
            stats.sparse_prefill = PrefillStats(options.mode)
            sparse = SparseAttention(options, self.target.config, stats.sparse_prefill)
        session.keep_shared(prompt, sparse.options.tag if sparse is not None else "", awake)
        stats.prefill_tokens += len(prompt) - len(session.tokens)
        needed = capacity_for(len(prompt) + 2 * max(shape.nodes for shape in shapes))
        session.open(self.kinds, needed, self.target.dtype)
        last = read(
            self.target, prompt, session, request.step_size,
            layers=read_layers(drafters), absorb=absorbing(drafters), sparse=sparse,
            progress=request.progress,
        )  # fmt: skip
        history: mx.array | tuple[()] = ()
        if request.sampling.windows or any(shape.lookup for shape in shapes):
            room = capacity_of(session.kinds, session.caches) or needed
            history = mx.array([*prompt, *[0] * (room - len(prompt))], mx.int32)
        stats.prefill_seconds += time.perf_counter() - start
        root, position = mx.array([prompt[-1]], mx.int32), mx.array([len(prompt) - 1], mx.int32)
        drafts = tuple(drafter.begin(last) for drafter in drafters)
        return State(root, position, session.take(), drafts, history)


class _Answer:
    """One answer's steps, one in flight ahead of the one whose tokens are being read.

    ``known`` holds the prompt and every token produced so far.
    """

    def __init__(
        self, engine: Engine, request: Request, policy: Policy, room: int, awake: bool
    ) -> None:
        self.engine, self.request, self.policy = engine, request, policy
        self.awake, self.unasked = awake, 0
        self.asleep: list[Kept] = []  # caches of drafters that do not take part
        self.covered: int | None = None  # tokens that these have rows of
        self.arrays = request.sampling.arrays(engine.target.config.vocab_size)
        self.known = list(request.prompt)
        self.final = len(self.known) + room
        self.longest = max(shape.longest for shape in policy.shapes) + 1  # tokens of a step
        self.widest = max(shape.nodes for shape in policy.shapes)

    def steps(self, state: State) -> Generator[Emitted, None, None]:
        stats, policy, engine, known = self.request.stats, self.policy, self.engine, self.known
        self.state = state
        del state
        if not self.awake:
            self._let_go(self.request.session.covered)
        # Tokens whose rows are in the slabs where they belong, and those that are committed.
        in_place, stand = len(known) - 1, len(known) - 1
        mark = read = time.perf_counter()
        traces = engine.traces
        try:
            in_flight = self._launch(len(known) - 1)
            while True:
                ahead = len(known) + 1 < self.final
                following = self._launch(len(known) - 1 + self.longest) if ahead else None
                stand = UNKNOWN if ahead else stand
                shape, text = in_flight
                numbers = cast(list[int], text.tolist())
                experts = engine.target.routes
                if experts and shape.drafts:
                    experts = numbers.pop()
                tokens = [t for t in numbers[1:] if t != END]
                now = time.perf_counter()
                stats.decode_seconds += now - mark
                in_place = len(known) - self.behind
                stand = len(known) + len(tokens) - 1 if ahead else stand
                tokens = tokens[: self.final - len(known)]
                stats.record(len(tokens), shape.nodes - 1, str(shape))
                # A step that was traced first, or waited for the reader, tells nothing.
                timed = engine.traces == traces and now - mark > (now - read) / 2
                policy.record(shape, len(tokens), now - read if timed else None, experts)
                read, traces = now, engine.traces
                known.extend(tokens)
                if following is not None or (shape.one_path and not self.behind):
                    in_place = len(known) - 1
                yield Emitted(tokens)
                mark = time.perf_counter()
                stats.host_seconds += mark - now
                if following is None or len(known) >= self.final:
                    return
                in_flight = following
        finally:
            # A step launched ahead has put the rows that were accepted before it into place, and
            # its own behind them; without one, the last tree's rows are still in tree order, and
            # what drafters keep of its root waits with them.
            caches = [*self.state.caches, *self.asleep]
            ended = len(known) + self.longest + self.widest
            self.request.session.holds(known[:in_place], caches, stand, self.covered, ended)

    def _launch(self, furthest: int) -> tuple[TreeShape, mx.array]:
        """Start a step whose root is at position ``furthest`` at most."""
        shape = self._shape()
        self._grow(furthest + self.longest + self.widest)
        pending = self.state.pending
        if not pending and len(self.policy.shapes) == 1:
            pending = nothing_pending(self.kinds, self.state.caches, shape)
            self.state = self.state._replace(pending=pending)
        waiting = pending[1].shape[0] if pending else 0
        sampling = self.request.sampling
        spec = StepSpec(shape, sampling.features, sampling.windows, waiting, self.awake)
        text, after = self.engine.step_function(spec)(self.state, self.arrays)
        self.state = State(*after)
        mx.async_eval(text, self.state)
        return shape, text

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
        room, history = capacity_of(self.kinds, self.state.caches), self.state.history
        if room is not None and room < needed:
            caches = grown(self.kinds, self.state.caches, capacity_for(needed))
            self.state = self.state._replace(caches=caches)
        if not isinstance(history, tuple) and history.shape[0] < needed:
            more = capacity_for(needed) - history.shape[0]
            self.state = self.state._replace(history=mx.pad(history, (0, more)))
