"""How much answers that run together draft: from what one pass over all their rows costs.

Rows are the currency: what a tree adds to a pass depends on how many rows the others bring. Every
answer chooses, in its turn, what is best for all at what the others chose last.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from typing import Any

from mlx_redrafter.budget.automatic import Automatic
from mlx_redrafter.budget.costs import NEAR, Costs, timed_pass
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.models import Decoder
from mlx_redrafter.runtime import clock
from mlx_redrafter.tree.shape import TreeShape

ROWS = (16, 24, 32, 48, 64)
_ROUNDS = 3
_BETTER = 1.05  # by which answering in turns has to be faster than together


class Company:
    """Answers that run together.

    Args:
        costs: of a single answer's steps.
        wide: seconds of a pass over many rows, the smallest number among those of ``costs``; see
            `measure`.
    """

    def __init__(self, costs: Costs, wide: Mapping[int, float]) -> None:
        self._costs, self._seats = costs, list[Seat]()
        # The machine may have been busier then or now: sizes that both have stand for one another.
        scale = costs.checking(min(wide)) / wide[min(wide)] if wide else 1.0
        curve = {**costs.verify, **{n: t * scale for n, t in wide.items()}}
        self._curve = sorted(curve.items())

    def seat(self, policy: Policy) -> Seat:
        """What chooses for an answer that joins, made of what would choose for it alone."""
        seat = Seat(self, policy)
        self._seats.append(seat)
        return seat

    def leave(self, seat: Seat) -> None:
        """The answer ended."""
        self._seats.remove(seat)

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
        if len(self._seats) < 2:
            return False
        shapes = [seat.shape for seat in self._seats]
        drafted = sum(seat.tokens for seat in self._seats) / (
            self.check(sum(shape.nodes for shape in shapes)) + sum(map(self.drafting, shapes))
        )
        together = max(drafted, len(shapes) / self.check(len(shapes)))
        return max(seat.alone() for seat in self._seats) > _BETTER * together


class Seat:
    """A `Policy` of one answer in company."""

    def __init__(self, company: Company, policy: Policy) -> None:
        self._company, self._policy = company, policy
        self.shape, self.tokens, self._position = TreeShape.plain(), 1.0, NEAR
        if isinstance(policy, Automatic):
            self._alone = policy.seconds
            policy.seconds, policy.others = self._seconds, self._others

    @property
    def shapes(self) -> Any:
        return self._policy.shapes

    def choose(self, position: int) -> TreeShape:
        self._position = position
        self.shape = self._policy.choose(position)
        self.tokens = self._foreseen(self.shape)
        return self.shape

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        self._policy.record(shape, produced, seconds, experts)

    def alone(self) -> float:
        """Tokens per second with the best shape, if there were no others."""
        if not isinstance(self._policy, Automatic):
            return 0.0
        rates = (self._foreseen(s) / self._alone(s, self._position) for s in self.shapes)
        return max(rates)

    def _foreseen(self, shape: TreeShape) -> float:
        return self._policy.foreseen(shape) if isinstance(self._policy, Automatic) else 1.0

    def _others(self) -> float:
        """Tokens that the others' next steps are expected to give."""
        return sum(seat.tokens for seat in self._company.seats if seat is not self)

    def _seconds(self, shape: TreeShape, position: int) -> float:
        """Of a step of all, if this answer takes this shape."""
        others = [seat.shape for seat in self._company.seats if seat is not self]
        if not others:
            return self._alone(shape, position)
        company, shapes = self._company, [shape, *others]
        rows = sum(one.nodes for one in shapes)
        return company.check(rows) + sum(map(company.drafting, shapes))


def measure(target: Decoder, build: Callable[[Any], Any]) -> dict[int, float]:
    """Seconds of passes over `ROWS` rows, timed in turns; the fastest counts."""
    runs = {n: timed_pass(target, n, NEAR, build) for n in ROWS}
    found = clock.fastest(runs, _ROUNDS, warm=True)
    least = float("inf")
    for n in sorted(found, reverse=True):  # a pass over more tokens is never faster
        least = found[n] = min(least, found[n])
    return found
