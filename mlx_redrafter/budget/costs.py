"""What a step costs on this machine: measured once in a few seconds, then corrected while running.

    seconds(shape, P) = t(N, P) + draft levels(W, L) + what else a drafted step does

t is the bare verify pass: the target over N tokens, logits and argmax, P tokens in the cache.
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_redrafter.budget.expert_costs import ExpertCosts
from mlx_redrafter.budget.written import Written
from mlx_redrafter.cache.layer import Kept, Pass, new_caches
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.decoding.step import State, StepSpec, blank_state, joined_passes, passes
from mlx_redrafter.drafters import Ask, Drafter
from mlx_redrafter.models import Target
from mlx_redrafter.runtime import clock
from mlx_redrafter.runtime.device import fused_kernels
from mlx_redrafter.tree.shape import BEAMS, TreeShape

NODES = (1, 2, 3, 4, 5, 6, 8, 12, 16)
NODES_ON_GPU = (*NODES[:7], 10, 12, 13, 16)  # its products have steps behind 5, 10 and 12 rows
WIDTHS = (1, 2, 3, 4)
NEAR, FAR = 256, 2048  # tokens in the cache
_ROUNDS = 6
_LINEAR = 0.9  # of N times one token: nothing can be gained there
_ENOUGH = 6  # measured steps of a shape that outweigh the table
_APART = 1.25  # two shapes' corrections: the table is no longer true

BarePass = Callable[[mx.array, mx.array, list[Kept]], tuple[mx.array, list[Kept]]]


@dataclass
class Costs:
    """Seconds of everything in a step.

    Args:
        verify: t(N) at ``NEAR`` cached tokens.
        per_token: what a further cached token adds, at 1 node and at the most that was measured.
        draft: by beam width, the first draft level and every further one; empty: no drafter.
        rest: of a drafted step beyond its parts.
        distinct: experts that those passes chose, over all layers, by nodes; empty: a dense model.
    """

    verify: dict[int, float]
    per_token: tuple[float, float] = (0.0, 0.0)
    draft: dict[int, tuple[float, float]] = field(default_factory=dict)
    rest: float = 0.0
    distinct: dict[int, float] = field(default_factory=dict)
    # Of steps that were timed, greedy or sampled: the last ones' seconds over the table's; and by
    # shape the same over what all shapes took at that time, when the machine was as busy.
    _recent: dict[bool, deque[float]] = field(default_factory=dict, repr=False)
    _apart: dict[tuple[TreeShape, bool], deque[float]] = field(default_factory=dict, repr=False)
    # Of models with experts in their place, greedy or sampled.
    _experts: dict[bool, ExpertCosts] = field(default_factory=dict, repr=False, compare=False)

    def table(self, shape: TreeShape, position: int = NEAR) -> float:
        """As measured beforehand; infinite for more nodes than were worth measuring."""
        seconds = self.checking(shape.nodes, position)
        if shape.depth:
            first, further = self.draft.get(shape.width, (float("inf"),) * 2)
            seconds += first + (shape.depth - 1) * further + self.rest
        return seconds

    def seconds(self, shape: TreeShape, position: int = NEAR, sampled: bool = False) -> float:
        """The table, corrected by the steps that were timed since."""
        return self.table(shape, position) * self._correction(shape, sampled)

    def learn(
        self, shape: TreeShape, position: int, sampled: bool, seconds: float, experts: int = 0
    ) -> None:
        """A step of the running answer took so long, and its nodes chose so many experts."""
        ratio = seconds / self.table(shape, position)
        if self.distinct and experts:
            self.experts(sampled).learn(shape, experts, ratio)
            return
        self._recent.setdefault(sampled, deque(maxlen=8)).append(ratio)
        known = self._apart.setdefault((shape, sampled), deque(maxlen=32))
        known.append(ratio / self._pace(sampled))

    def experts(self, sampled: bool) -> ExpertCosts:
        """What is known of a model with experts beyond the table."""
        if sampled not in self._experts:
            self._experts[sampled] = ExpertCosts(self.verify, self.distinct)
        return self._experts[sampled]

    @property
    def drifted(self) -> bool:
        """Do the running steps contradict the table, in what they cost beside each other?"""
        if any(known.apart() > _APART for known in self._experts.values()):
            return True
        firm = [statistics.median(x) for x in self._apart.values() if len(x) >= 2 * _ENOUGH]
        return len(firm) > 1 and max(firm) > _APART * min(firm)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what was learned while running is left out."""
        return {
            "verify": {str(n): t for n, t in self.verify.items()},
            "per_token": list(self.per_token),
            "draft": {str(w): list(t) for w, t in self.draft.items()},
            "rest": self.rest,
            "distinct": {str(n): d for n, d in self.distinct.items()},
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Costs:
        """Raises KeyError, TypeError, ValueError on what ``as_dict`` did not make."""
        near, far = stored["per_token"]
        return cls(
            {int(n): float(t) for n, t in stored["verify"].items()},
            (float(near), float(far)),
            {int(w): (float(a), float(b)) for w, (a, b) in stored["draft"].items()},
            float(stored["rest"]),
            {int(n): float(d) for n, d in stored["distinct"].items()},
        )

    def checking(self, nodes: int, position: int = NEAR) -> float:
        """t(N, P) of the table; between two measured sizes in proportion."""
        known = sorted(self.verify)
        if nodes > known[-1]:
            return float("inf")
        at = bisect.bisect_left(known, nodes)
        above, below = known[at], known[max(at - 1, 0)]
        share = (nodes - below) / (above - below) if above > below else 0.0
        near = self.verify[below] + share * (self.verify[above] - self.verify[below])
        one, most = self.per_token
        slope = one + (most - one) * (nodes - 1) / max(known[-1] - 1, 1)
        return near + slope * max(position - NEAR, 0)

    def _correction(self, shape: TreeShape, sampled: bool) -> float:
        if self.distinct:
            return self.experts(sampled).correction(shape)
        own = self._apart.get((shape, sampled), ())
        apart = statistics.median(own) if len(own) >= _ENOUGH else 1.0
        return self._pace(sampled) * apart

    def _pace(self, sampled: bool) -> float:
        """What steps take at present, over the table: the mean, hiccups cut to twice the median."""
        recent = self._recent.get(sampled, ())
        if len(recent) < _ENOUGH:
            return 1.0
        most = 2 * statistics.median(recent)
        return statistics.geometric_mean([min(ratio, most) for ratio in recent])


def measure(
    target: Target,
    drafters: Sequence[Drafter],
    step_function: Callable[[StepSpec], Any],
    compiled: bool = True,
    text: Callable[[], Sequence[int]] = lambda: (),
) -> Costs:
    """Time the parts of a step: every one ``_ROUNDS`` times in turns, the fastest counts, since
    whatever else the machine does can only make it slower.

    Args:
        text: tokens of a real text, which a model with experts is asked to go on with: what its
            passes cost depends on what they read.
    """
    build = mx.compile if compiled else lambda f: f
    far = min(FAR, target.config.max_positions // 2)
    written = Written(target, text(), NEAR, build) if target.routes else None
    passes: dict[int, clock.Run] = {}
    for nodes in NODES_ON_GPU if fused_kernels() else NODES:
        passes[nodes] = (
            timed_pass(target, nodes, NEAR, build) if written is None else written.timed(nodes)
        )
        passes[nodes]()  # traces, and may compile kernels
        if nodes in (4, 8) and not fused_kernels():  # whose older ones are flat from some rows on
            few = clock.fastest_pass({1: passes[1], nodes: passes[nodes]}, 2)
            if few[nodes] > _LINEAR * nodes * few[1]:
                break
    verify = clock.fastest_pass(passes, _ROUNDS)
    least = float("inf")
    for n in sorted(verify, reverse=True):  # a pass over more tokens is never faster
        least = verify[n] = min(least, verify[n])
    ends = min(verify), max(verify)
    short = verify
    if written is not None:  # what is cached far away is not real: neither may the nearer pass be
        near = {n: timed_pass(target, n, NEAR, build) for n in ends}
        short = clock.fastest_pass(near, 3, warm=True)
    away = {n: timed_pass(target, n, far, build) for n in ends}
    long = clock.fastest_pass(away, 3, warm=True)
    per_token = [max(long[n] - short[n], 0.0) / max(far - NEAR, 1) for n in ends]
    costs = Costs(verify, (per_token[0], per_token[1]))
    if written is not None:
        costs.distinct = {n: float(written.distinct[n]) for n in sorted(verify)}
    if any(drafter.part == BEAMS for drafter in drafters):
        _measure_draft(costs, target, drafters, step_function, build, passes)
    return costs


def _measure_draft(
    costs: Costs,
    target: Target,
    drafters: Sequence[Drafter],
    step_function: Any,
    build: Any,
    passes: Mapping[int, clock.Run],
) -> None:
    widths = [w for w in WIDTHS if w <= target.config.vocab_size]
    runs = {(w, d): _draft_levels(target, drafters, w, d, build) for w in widths for d in (1, 3)}
    found = clock.fastest_pass(runs, _ROUNDS, warm=True)
    for w in widths:
        costs.draft[w] = found[w, 1], max(found[w, 3] - found[w, 1], 0.0) / 2
    shape = TreeShape(2, 2, min(5, max(costs.verify)), lookup=2)
    shape = shape.only(drafter.part for drafter in drafters)
    if shape.nodes > 2 and shape.width in costs.draft:
        # In turns with a pass: what made the machine slower since must not count as the step's.
        chosen: list[int] = []
        whole = _whole_step(target, drafters, shape, step_function, chosen)
        check = passes.get(shape.nodes) or timed_pass(target, shape.nodes, NEAR, build)
        taken = clock.fastest_pass({"whole": whole, "check": check}, _ROUNDS, True)
        slower = taken["check"] / costs.checking(shape.nodes)
        known = costs.table(shape)
        if costs.distinct:  # the step's text is no text, and its experts are others
            known *= costs.experts(False).ratio(shape.nodes, chosen[-1])
        costs.rest = max(taken["whole"] / slower - known, 0.0)


def bare_pass(target: Target) -> BarePass:
    """A pass over tokens that follow one another, to be compiled or not.

    Returns:
        run(tokens (N,) int32, position (1,) int32 of the first, the layers' caches) -> hidden
        (N, D), the caches with N more rows.
    """

    def run(
        tokens: mx.array, position: mx.array, caches: list[Kept]
    ) -> tuple[mx.array, list[Kept]]:
        run = Pass(caches, position)
        positions = position + mx.arange(tokens.shape[0], dtype=mx.int32)
        capacity = run.capacity(target.caches) or tokens.shape[0]
        slots = mx.arange(capacity, dtype=mx.int32)
        hidden, _ = target(tokens, positions, slots[None] <= positions[:, None], slots, run)
        return hidden, run.caches

    return run


def verify_pass(target: Target) -> BarePass:
    """The same with the choice after every token, (N,) int32, in the place of the hidden states."""
    bare = bare_pass(target)

    def run(
        tokens: mx.array, position: mx.array, caches: list[Kept]
    ) -> tuple[mx.array, list[Kept]]:
        hidden, caches = bare(tokens, position, caches)
        return mx.argmax(target.logits(hidden), axis=-1).astype(mx.int32), caches

    return run


def timed_pass(target: Target, nodes: int, position: int, build: Any) -> clock.Run:
    """The target over a chain of so many tokens."""
    capacity = capacity_for(position + nodes)
    caches = new_caches(target.caches, capacity, target.dtype)
    tokens, start = mx.zeros((nodes,), mx.int32), mx.array([position], mx.int32)
    given = tokens
    run = build(verify_pass(target))

    def launch() -> Any:
        nonlocal caches, given
        choices, caches = run(given, start, caches)
        given = after(tokens, choices)
        return given, caches

    return clock.launched(launch)


def after(x: mx.array, arrays: Any) -> mx.array:
    """The same for whoever needs these arrays first."""
    pairs = cast("list[tuple[str, Any]]", tree_flatten(arrays))
    known = [array for _, array in pairs if isinstance(array, mx.array)]
    (same,) = mx.depends([x], known)
    return cast(mx.array, same)


def _draft_levels(
    target: Target, drafters: Sequence[Drafter], width: int, depth: int, build: Any
) -> clock.Run:
    """What the drafters of beams propose for a shape of so many levels."""
    shape = TreeShape(width, depth, 1 + width * depth)
    asked = [drafter for drafter in drafters if drafter.part == BEAMS]
    keep = any(drafter.caches for drafter in asked)
    capacity = capacity_for(NEAR + shape.nodes) if keep else 1
    state = blank_state(target, asked, shape, NEAR, capacity, history=False)
    ask, own = Ask(state.root, state.position, None, shape, None), len(target.caches)
    caches: list[Kept] = state.caches[own:]
    waiting = state.pending

    def propose(caches: list[Kept], states: Any, root: mx.array, position: mx.array) -> Any:
        pending = (waiting[0][own:], waiting[1]) if waiting else ()
        runs = passes(asked, caches, position, pending)
        new = ask._replace(root=root, position=position)
        found = [
            drafter.propose(state, new._replace(own=run))
            for drafter, state, run in zip(asked, states, runs, strict=True)
        ]
        return found, joined_passes(asked, runs)[0]

    run = build(propose)

    root = state.root

    def launch() -> Any:
        nonlocal caches, root
        found, caches = run(caches, state.drafts, root, state.position)
        root = after(state.root, found)
        return root, caches

    return clock.launched(launch)


def _whole_step(
    target: Target,
    drafters: Sequence[Drafter],
    shape: TreeShape,
    step_function: Any,
    chosen: list[int],
) -> clock.Run:
    """chosen: of a target with experts, how many each run chose."""
    state = blank_state(target, drafters, shape, NEAR, capacity_for(NEAR + 32))
    position = state.position
    waiting = state.pending[1].shape[0] if state.pending else 0
    step = step_function(StepSpec(shape, frozenset(), (), waiting))
    emitted = position

    def launch() -> Any:
        nonlocal state, emitted
        emitted, after = step(state._replace(position=position), {})
        state = State(*after)
        return emitted, state

    steps = clock.launched(launch)

    def once() -> None:
        steps()
        if target.routes:
            chosen.append(cast(int, emitted[-1].item()))

    return once
