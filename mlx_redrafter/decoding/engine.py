"""The token loop: prefill, steps, limits, statistics. It knows token ids only, no text."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import mlx.core as mx

from mlx_redrafter.cache.layer import capacity_of
from mlx_redrafter.cache.ring import check_nodes
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.decoding.answering import Answering
from mlx_redrafter.decoding.grammar import Again, again
from mlx_redrafter.decoding.graphs import Graphs
from mlx_redrafter.decoding.policy import Fixed, Policy
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.rows import RowsStep, make_rows_step
from mlx_redrafter.decoding.step import (
    State,
    StepFunction,
    StepSpec,
    absorbing,
    all_caches,
    make_step,
    read_layers,
)
from mlx_redrafter.decoding.warming import warming
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.drafters.lookup import foretold
from mlx_redrafter.models import Target
from mlx_redrafter.prefill.reading import reading
from mlx_redrafter.prefill.sparse import SparseAttention
from mlx_redrafter.runtime.blas import rows_alone
from mlx_redrafter.runtime.device import release
from mlx_redrafter.stats import PrefillStats
from mlx_redrafter.tree.shape import TEXT, TreeShape
from mlx_redrafter.tree.told import ToldTree


@dataclass(frozen=True)
class Emitted:
    """What one step produced: accepted drafts, then the bonus token. tree: if the request wants
    trees."""

    tokens: list[int]
    tree: ToldTree | None = None

    def each(self) -> Iterator[tuple[int, bool, ToldTree | None]]:
        """Every token, was it drafted, and with the first one the tree."""
        for i, token in enumerate(self.tokens):
            yield token, i < len(self.tokens) - 1, None if i else self.tree


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
        self.warm: set[StepSpec] = set()  # buckets whose kernels are compiled; see `warming`
        self._graphs = Graphs()

    def step_function(self, spec: StepSpec) -> StepFunction:
        """The compiled step of a bucket, made on first use."""

        def make(on_trace: Callable[[], None]) -> StepFunction:
            return make_step(self.target, self.taking_part(spec.awake), spec, on_trace)

        return cast(StepFunction, self._made(spec, make))

    def again(self, spec: StepSpec) -> Again:
        """What makes a choice of such a step again, made on first use."""
        spec = replace(spec, pending=0, given=False)

        def make(_: Callable[[], None]) -> Again:
            drafters = self.taking_part(spec.awake)
            chosen: Again = partial(again, drafters, spec.windows, read_layers(drafters))
            return mx.compile(chosen) if self.compiled else chosen

        return cast(Again, self._graphs.get(("again", spec), make))

    def rows_step(self, specs: tuple[StepSpec, ...], stacked: tuple[int, ...] = ()) -> RowsStep:
        """The compiled step of several answers with these buckets, made on first use. stacked: see
        `make_rows_step`."""

        def make(on_trace: Callable[[], None]) -> RowsStep:
            members = [(self.taking_part(spec.awake), spec) for spec in specs]
            return make_rows_step(self.target, members, stacked, on_trace)

        return cast(RowsStep, self._made((stacked, specs), make))

    def _made(self, key: Hashable, make: Callable[[Callable[[], None]], Any]) -> Any:
        """A step, compiled if steps are."""

        def compiled(traced: Callable[[], None]) -> Any:
            def count() -> None:
                self.count_trace()
                if self.compiled:  # otherwise nothing is kept of a trace
                    traced()

            step = make(count)
            return mx.compile(step) if self.compiled else step

        return self._graphs.get(key, compiled)

    @property
    def same_bits(self) -> bool:
        """Is a drafted text plain decoding's to the last bit? Else rounding may choose otherwise
        between tokens that are nearly alike."""
        return self.target.dtype == mx.float32 and rows_alone()

    def count_trace(self) -> None:
        self.traces += 1

    def taking_part(self, awake: bool) -> tuple[Drafter, ...]:
        """The drafters: all, or those that keep no rows."""
        return tuple(drafter for drafter in self.drafters if awake or not drafter.caches)

    def _awake(self, policy: Policy) -> bool:
        """May a drafter that keeps rows be asked? Where none is, its rows are not made either."""
        parts = {part for shape in policy.shapes for part in shape.parts}
        return not self.keeping or any(drafter.part in parts for drafter in self.keeping)

    def generate(self, request: Request) -> Generator[Emitted, None, None]:
        """Yield the tokens after the prompt, a step at a time, until ``max_tokens`` (-1: no limit)
        or the end of the context. Closing the iterator leaves the session consistent.

        Raises:
            OptionError: what `Request.room` refuses, patterns of another model, a session in use
                or of another model, a tree that is too large for the windows' rings.
        """
        answer = self.answering(request)
        with request.session.taken(self.target, self.keeping):
            for _ in self.opening(answer):
                pass
            try:
                while not answer.done:
                    if not answer.in_flight:
                        self._launch(answer)
                    if answer.goes_on:
                        self._launch(answer)
                    yield Emitted(answer.read(), answer.tree)
                    answer.resumed()
            finally:
                answer.close()

    def answering(self, request: Request) -> Answering:
        """A request's answer, not begun; raises OptionError as `generate` does."""
        room, policy = request.room(self.target.config), self.policy(request.shape)
        answer = Answering(self, request, policy, room, self._awake(policy))
        check_nodes(self.kinds, answer.widest)
        return answer

    def _launch(self, answer: Answering) -> None:
        """Start an answer's next step."""
        spec = answer.prepare()
        text, after = self.step_function(spec)(answer.state, answer.arrays)
        answer.launched(spec, text, State(*after), counted=bool(self.target.routes))
        mx.async_eval(text, answer.state)

    def policy(self, shape: TreeShape | Policy) -> Policy:
        if not isinstance(shape, TreeShape):
            return shape
        return Fixed(shape.only(drafter.part for drafter in self.drafters))

    def keep(self, session: Session, prompt: Sequence[int], tag: str, awake: bool) -> None:
        """Forget what of a session does not serve a request; see `Session.keep_shared`."""
        session.keep_shared(prompt, tag, awake)

    def opening(self, answer: Answering) -> Iterator[None]:
        """Read what the session lacks of all but the last prompt token, which is the first root,
        in parts, and start the answer. What happens between the parts is not its time."""
        parts, stats = self._parts(answer), answer.request.stats
        while True:
            start = time.perf_counter()
            try:
                next(parts)
            except StopIteration:
                return
            finally:
                stats.prefill_seconds += time.perf_counter() - start
            yield

    def _parts(self, answer: Answering) -> Iterator[None]:
        request = answer.request
        prompt, session, stats = request.prompt, request.session, request.stats
        drafters = self.taking_part(answer.awake)
        sparse, options = None, request.sparse_prefill
        if options is not None and options.mode != "off":
            stats.sparse_prefill = PrefillStats(options.mode)
            sparse = SparseAttention(options, self.target.config, stats.sparse_prefill)
        tag = sparse.options.tag if sparse is not None else ""
        self.keep(session, prompt, tag, answer.awake)
        stats.prefill_tokens += len(prompt) - len(session.tokens)
        needed = capacity_for(len(prompt) + 2 * answer.widest)
        session.open(self.kinds, needed, self.target.dtype)
        beside = warming(self, answer, needed)
        last = yield from reading(
            self.target, prompt, session, request.step_size,
            layers=read_layers(drafters), absorb=absorbing(drafters), sparse=sparse,
            progress=request.progress, beside=beside,
        )  # fmt: skip
        yield from beside
        history: mx.array | tuple[()] = ()
        looked_up = any(shape.lookup for shape in answer.policy.shapes)
        if request.sampling.windows or looked_up:
            room = capacity_of(session.kinds, session.caches) or needed
            history = mx.array([*prompt, *[0] * (room - len(prompt))], mx.int32)
        release()
        root, position = mx.array([prompt[-1]], mx.int32), mx.array([len(prompt) - 1], mx.int32)
        drafts = tuple(drafter.begin(last) for drafter in drafters)
        if request.prediction and looked_up:
            text = foretold(prompt, request.prediction)
            pairs = zip(drafters, drafts, strict=True)
            drafts = tuple(text if drafter.part == TEXT else own for drafter, own in pairs)
        # A name for the state would keep the first slabs alive, and the first step would have to
        # copy them all.
        answer.start(State(root, position, session.take(), drafts, history))
