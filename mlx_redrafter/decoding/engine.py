"""The token loop: prefill, steps, limits, statistics. It knows token ids only, no text."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from mlx_redrafter import checks
from mlx_redrafter.decoding.costs import Costs
from mlx_redrafter.decoding.policy import Fixed, Policy
from mlx_redrafter.decoding.sampling import Arrays, SamplingParams
from mlx_redrafter.decoding.step import (
    Bucket,
    State,
    StepFunction,
    make_state,
    make_step,
    nothing_pending,
)
from mlx_redrafter.decoding.tree import END, TreeShape
from mlx_redrafter.drafters import Drafter, seen
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, cache
from mlx_redrafter.prefill.chunks import USUAL, Chunks
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.reading import Progress, read
from mlx_redrafter.prefill.session import Session
from mlx_redrafter.prefill.sparse import SparseAttention
from mlx_redrafter.stats import DraftStats, PrefillStats

UNLIMITED = -1


def length(max_tokens: Any) -> int:
    """The most tokens of an answer, -1 for no limit; raises OptionError."""
    use = "1 or more, or -1 for no limit"
    value = checks.whole("max_tokens", max_tokens, UNLIMITED, use=use)
    return value or checks.whole("max_tokens", value, 1, use=use)


@dataclass(frozen=True)
class Emitted:
    """What one step produced: accepted drafts, then the bonus token."""

    tokens: list[int]


class Engine:
    """Runs steps of one target and drafter.

    Args:
        target: the model.
        drafter: None: plain decoding only.
        compiled: False runs the same steps uncompiled (no C++ compiler on Linux; debugging).
    """

    def __init__(self, target: Decoder, drafter: Drafter | None, compiled: bool = True) -> None:
        self.target = target
        self.drafter = drafter
        self.compiled = compiled
        self.traces = 0
        self.say: Callable[[str], None] = lambda text: None  # told what takes seconds, once
        self.costs: Costs | None = None  # of steps on this machine, once they are known
        self.chunks: Chunks | None = None  # of prompts, likewise
        self._steps: dict[Bucket, StepFunction] = {}

    def step_function(self, bucket: Bucket) -> StepFunction:
        """The compiled step of a bucket, made on first use."""
        if bucket not in self._steps:
            step = make_step(self.target, self.drafter, bucket, self._count_trace)
            self._steps[bucket] = mx.compile(step) if self.compiled else step
        return self._steps[bucket]

    def _count_trace(self) -> None:
        self.traces += 1

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        shape: TreeShape | Policy,
        max_tokens: int,
        *,
        session: Session | None = None,
        stats: DraftStats | None = None,
        prefill_step_size: int = USUAL,
        progress: Progress | None = None,
        sparse_prefill: SparsePrefill | None = None,
    ) -> Generator[Emitted, None, None]:
        """Yield the tokens after the prompt, a step at a time, until ``max_tokens`` (-1: no limit)
        or the end of the context. Closing the iterator leaves the session consistent.

        Args:
            shape: of every step, or what chooses it.
            sparse_prefill: how the prompt is read; every step attends to all of it.

        Raises:
            OptionError: empty prompt, a token outside the vocabulary, a prompt that fills the
                context, patterns of another model, a session in use or of another model.
        """
        session = session if session is not None else Session()
        stats = stats if stats is not None else DraftStats()
        if isinstance(shape, TreeShape):
            policy: Policy = Fixed(shape if self.drafter else shape.without_drafter())
        else:
            policy = shape
        room = self.check(prompt, params, max_tokens)
        arrays = params.arrays(self.target.config.vocab_size)
        with session.taken(self.target):
            # The state goes straight through: a name for it here would keep the first slabs alive,
            # and the first step would have to copy them all.
            yield from self._decode(
                self._prefill(
                    prompt, policy.shapes, params, session, stats, prefill_step_size, progress,
                    sparse_prefill,
                ),
                arrays, params, policy, room, session, stats, list(prompt),
            )  # fmt: skip

    def check(self, prompt: Sequence[int], params: SamplingParams, max_tokens: int) -> int:
        """How many tokens may be produced; raises the errors of `generate`."""
        if not prompt:
            raise OptionError("the prompt is empty: give at least one token of text")
        vocab, limit = self.target.config.vocab_size, self.target.config.max_positions
        wrong = next((t for t in prompt if not 0 <= t < vocab), None)
        if wrong is not None:
            raise OptionError(
                f"the prompt holds token {wrong}, which is outside the model's vocabulary: "
                f"use 0 to {vocab - 1}"
            )
        params.check(vocab)
        max_tokens = length(max_tokens)
        if len(prompt) >= limit:
            raise OptionError(
                f"the prompt has {len(prompt)} tokens and the model's context {limit}: "
                "shorten the prompt, or use a model with a longer context"
            )
        room = limit - len(prompt)
        return room if max_tokens == UNLIMITED else min(max_tokens, room)

    def _prefill(
        self,
        prompt: Sequence[int],
        shapes: Sequence[TreeShape],
        params: SamplingParams,
        session: Session,
        stats: DraftStats,
        step_size: int,
        progress: Progress | None,
        options: SparsePrefill | None,
    ) -> State:
        """Read what the session lacks of all but the last prompt token, which is the first root."""
        start = time.perf_counter()
        sparse = None
        if options is not None and options.mode != "off":
            stats.sparse_prefill = PrefillStats(options.mode)
            sparse = SparseAttention(options, self.target.config, stats.sparse_prefill)
        session.keep_shared(prompt, sparse.options.tag if sparse is not None else "")
        stats.prefill_tokens += len(prompt) - len(session.tokens)
        needed = cache.bucket(len(prompt) + 2 * max(shape.nodes for shape in shapes))
        if not session.kv:
            session.kv = cache.new_cache(self.target.config, needed, self.target.dtype)
        elif session.kv[0].shape[2] < needed:
            session.kv = cache.grow(session.kv, needed)
        layers = self.drafter.context_layers if self.drafter is not None else ()
        hidden, inner = read(
            self.target, prompt, session, step_size,
            layers=layers, sparse=sparse, progress=progress,
        )  # fmt: skip
        history = None
        if params.windows or any(shape.lookup for shape in shapes):
            room = session.kv[0].shape[2] - len(prompt)
            history = mx.array([*prompt, *[0] * room], mx.int32)
        stats.prefill_seconds += time.perf_counter() - start
        root, position = mx.array([prompt[-1]], mx.int32), mx.array([len(prompt) - 1], mx.int32)
        read_last = None if self.drafter is None else seen(hidden, inner)
        return make_state(root, read_last, position, session.kv, history)

    def _decode(
        self,
        state: State,
        arrays: Arrays,
        params: SamplingParams,
        policy: Policy,
        room: int,
        session: Session,
        stats: DraftStats,
        known: list[int],
    ) -> Generator[Emitted, None, None]:
        """Steps, one in flight ahead of the one whose tokens are being read.

        ``known`` holds the prompt and every token produced so far.
        """
        most = max(shape.longest for shape in policy.shapes) + 1  # tokens that a step can produce
        widest = max(shape.nodes for shape in policy.shapes)
        final = len(known) + room
        in_place = len(known) - 1  # tokens whose rows are in the slab where they belong

        def launch(furthest: int) -> tuple[TreeShape, mx.array]:
            """Start a step whose root is at position ``furthest`` at most."""
            nonlocal state
            session.kv = []  # the only reference to a slab must be the step's, or it is copied
            shape = policy.choose(len(known))
            needed = furthest + most + widest
            if state["kv"][0].shape[2] < needed:
                state = _grown(state, cache.bucket(needed))
            if "pending" not in state and not shape.one_path and len(policy.shapes) == 1:
                state["pending"] = nothing_pending(state["kv"], shape)
            pending = state["pending"][0][0].shape[2] if "pending" in state else 0
            bucket = Bucket(shape, params.features, params.windows, pending)
            text, state = self.step_function(bucket)(state, arrays)
            mx.async_eval(text, state)
            return shape, text

        mark = read = time.perf_counter()
        traces = self.traces
        try:
            in_flight = launch(len(known) - 1)
            while True:
                following = launch(len(known) - 1 + most) if len(known) + 1 < final else None
                shape, text = in_flight
                tokens = [t for t in cast(list[int], text.tolist())[1:] if t != END]
                now = time.perf_counter()
                stats.decode_seconds += now - mark
                in_place = len(known)
                tokens = tokens[: final - len(known)]
                stats.record(len(tokens), shape.nodes - 1, str(shape))
                # A step that was traced first, or waited for the reader, tells nothing.
                timed = self.traces == traces and now - mark > (now - read) / 2
                policy.record(shape, len(tokens), now - read if timed else None)
                read, traces = now, self.traces
                known.extend(tokens)
                if following is not None or shape.one_path:
                    in_place = len(known) - 1
                yield Emitted(tokens)
                mark = time.perf_counter()
                stats.host_seconds += mark - now
                if following is None or len(known) >= final:
                    return
                in_flight = following
        finally:
            # A step launched ahead has put the rows that were accepted before it into place, and
            # its own behind them; without one, the last tree's rows are still in tree order.
            session.kv = state["kv"]
            session.tokens[:] = known[:in_place]


def _grown(state: State, capacity: int) -> State:
    """The same state with more room in its slabs (and its history)."""
    state = {**state, "kv": cache.grow(state["kv"], capacity)}
    if "history" in state:
        more = capacity - state["history"].shape[0]
        state["history"] = mx.pad(state["history"], (0, more))
    return state
