"""How much answers that run together draft: from what one pass over all their rows costs.

Rows are the currency: what a tree adds to a pass depends on how many rows the others bring. Those
draft that gain most by it, as many as pay, and nothing is tried for a look: that every other
answer would wait for.
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_redrafter.budget.automatic import Automatic, contenders
from mlx_redrafter.budget.costs import NEAR, Costs, timed_pass
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.models import Target
from mlx_redrafter.runtime import clock
from mlx_redrafter.tree.shape import TreeShape

ROWS = (16, 24, 32, 48, 64)
ROUNDS = 7
_BETTER = 1.05  # by which answering in turns has to be faster than together
# Another combination of trees is another graph, which takes as long as two steps.
_OTHER = 1.1  # by which other trees have to be faster than those there are
# Answers that draft end at different times, and fewer together are slower.
_WORTH = 1.15  # by which any drafting has to be faster than none, or it ends
_USUAL, _MORE = 4, 3  # answers for which trees are made, and how many of these at most
_RECENT, _ENOUGH = 32, 6  # timed steps that say what such steps cost
_EVERY = 16  # steps of all, after which trees are given anew


Ratios = dict[bool, deque[float]]
"""Of timed steps that drafted, or did not, the seconds over those foreseen."""


def new_ratios() -> Ratios:
    return {drafts: deque(maxlen=_RECENT) for drafts in (False, True)}


class Company:
    """Answers that run together.

    Args:
        costs: of a single answer's steps.
        wide: seconds of a pass over many rows, the smallest number among those of ``costs``; see
            `measure`.
        ratios: what is known of steps that were timed.
        shapes: all trees there are; those that are best for several answers are smaller than those
            that an answer chooses from alone.
    """

    def __init__(
        self,
        costs: Costs,
        wide: Mapping[int, float],
        ratios: Ratios | None = None,
        shapes: Sequence[TreeShape] = (),
    ) -> None:
        self._costs, self._seats = costs, list[Seat]()
        self._due, self._turns, self._all = 0, False, shapes
        self._ratios = new_ratios() if ratios is None else ratios
        # The machine may have been busier then or now: sizes that both have stand for one another.
        scale = costs.checking(min(wide)) / wide[min(wide)] if wide else 1.0
        curve = {**costs.verify, **{n: t * scale for n, t in wide.items()}}
        self._curve = sorted(curve.items())

    def seat(self, policy: Policy) -> Seat:
        """What chooses for an answer that joins, made of what would choose for it alone."""
        seat = Seat(self, policy, self._shapes(policy))
        self._seats.append(seat)
        self._due = 0
        return seat

    def _shapes(self, policy: Policy) -> Sequence[TreeShape]:
        if not isinstance(policy, Automatic) or not self._all:
            return policy.shapes

        def seconds(shape: TreeShape) -> float:
            return self.check(_USUAL * shape.nodes) / _USUAL + self.drafting(shape)

        more = contenders(self._all, policy.tokens, seconds, _MORE)
        return tuple(dict.fromkeys([*policy.shapes, *more]))

    def leave(self, seat: Seat) -> None:
        """The answer ended."""
        self._seats.remove(seat)
        self._due = 0

    @property
    def seats(self) -> list[Seat]:
        return self._seats

    def check(self, rows: int) -> float:
        """Seconds of a pass over so many rows; beyond what was measured in proportion."""
        sizes = [n for n, _ in self._curve]
        last, most = self._curve[-1]
        if rows >= last:
            return most * rows / last
        at = bisect.bisect_left(sizes, rows)
        (below, low), (above, high) = self._curve[max(at - 1, 0)], self._curve[at]
        share = (rows - below) / (above - below) if above > below else 0.0
        return low + share * (high - low)

    def drafting(self, shape: TreeShape) -> float:
        """Seconds that a shape adds beside its rows in the pass."""
        if not shape.depth:
            return 0.0
        bare = TreeShape(shape.width, shape.depth, 1 + shape.depth)
        return self._costs.table(bare) - self._costs.checking(bare.nodes)

    def in_turns(self) -> bool:
        """Are all served faster one after the other, each with the trees that it wants alone?"""
        return self._turns and len(self._seats) > 1

    def rate(self, shapes: Sequence[TreeShape]) -> float:
        """Tokens per second if every answer has one of these."""
        tokens = sum(seat.foreseen(s) for seat, s in zip(self._seats, shapes, strict=True))
        return tokens / self.seconds(shapes)

    def seconds(self, shapes: Sequence[TreeShape]) -> float:
        """Of one step of all, as steps like it took of late."""
        drafts = any(s.drafts for s in shapes)
        known = [r for r in (self._ratios[drafts], self._ratios[not drafts]) if len(r) >= _ENOUGH]
        return (statistics.median(known[0]) if known else 1.0) * self._foreseen(shapes)

    def learn(self, shapes: Sequence[TreeShape], seconds: float) -> None:
        """A step of answers with these shapes took so long."""
        if len(shapes) > 1:
            ratio = seconds / self._foreseen(shapes)
            self._ratios[any(s.drafts for s in shapes)].append(ratio)

    def _foreseen(self, shapes: Sequence[TreeShape]) -> float:
        return self.check(sum(s.nodes for s in shapes)) + sum(map(self.drafting, shapes))

    def _best(self) -> tuple[float, list[TreeShape]]:
        """The fastest trees, and their rate: one shape for all that draft, few combinations being
        few graphs."""
        plain = [seat.least for seat in self._seats]
        best, found = self.rate(plain), plain
        least = _WORTH * best
        for shape in {s: None for seat in self._seats for s in seat.shapes if s.drafts}:
            shapes = list(plain)
            able = [i for i, seat in enumerate(self._seats) if shape in seat.shapes]
            for i in sorted(able, key=lambda i: -self._seats[i].foreseen(shape)):
                shapes[i] = shape
                rate = self.rate(shapes)
                if rate > max(best, least):
                    best, found = rate, list(shapes)
        return best, found

    def plan(self) -> None:
        """Give the trees, if it is time to."""
        self._due -= 1
        if self._due > 0:
            return
        self._due = _EVERY * len(self._seats)
        now = [seat.planned for seat in self._seats]
        best, found = self._best()
        if best > _OTHER * self.rate(now) or not any(shape.drafts for shape in found):
            for seat, shape in zip(self._seats, found, strict=True):
                seat.planned = shape
        self._turns = max(seat.alone() for seat in self._seats) > _BETTER * best


class Seat:
    """A `Policy` of one answer in company."""

    def __init__(self, company: Company, policy: Policy, shapes: Sequence[TreeShape]) -> None:
        self._company, self._policy, self.shapes = company, policy, shapes
        self._position = NEAR
        self.planned = self.least

    @property
    def least(self) -> TreeShape:
        """Without a draft, where that may be chosen."""
        return min(self.shapes, key=lambda shape: shape.nodes)

    def choose(self, position: int) -> TreeShape:
        self._position = position
        if len(self._company.seats) < 2 or not isinstance(self._policy, Automatic):
            return self._policy.choose(position)
        self._company.plan()
        if self._company.in_turns():
            return self._policy.choose(position)
        return self.planned

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        self._policy.record(shape, produced, seconds, experts)

    def alone(self) -> float:
        """Tokens per second with the best shape, if there were no others."""
        if not isinstance(self._policy, Automatic):
            return 0.0
        return max(self._policy.speed(shape, self._position) for shape in self._policy.shapes)

    def foreseen(self, shape: TreeShape) -> float:
        """Tokens of a step."""
        return self._policy.foreseen(shape) if isinstance(self._policy, Automatic) else 1.0


def measure(target: Target, build: Callable[[Any], Any]) -> dict[int, float]:
    """Seconds of passes over `ROWS` rows, timed in turns; the fastest counts."""
    runs = {n: timed_pass(target, n, NEAR, build) for n in ROWS}
    found = clock.fastest_pass(runs, ROUNDS, warm=True)
    least = float("inf")
    for n in sorted(found, reverse=True):  # a pass over more tokens is never faster
        least = found[n] = min(least, found[n])
    return found
