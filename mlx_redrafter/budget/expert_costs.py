"""What a pass over a mixture of experts costs: rows that differ read more of the weights.

    seconds of a pass over N nodes = a + b x N x k + c x distinct experts

N x k pairs of a row and an expert and the experts that are read at all are counted over all layers
(docs/decisions.md says which kernels make which of the two expensive). The table of a machine
(`Costs`) is measured on the model's own text; this says how far passes are from it now.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mlx_redrafter.tree.shape import TreeShape

_NOISE = 0.1  # of a step's seconds, that says nothing
_TABLE_NOISE = 0.05
_PACE = 0.03  # by which all costs grow or shrink together from step to step: a busy machine
_DRIFT = 0.003  # by which each does alone
_UNSURE = 0.3, 0.1  # of the table's pace and of its coefficients, when the first step runs
_RATE = 0.2  # what a step weighs in the mean of its shape's experts
_CLEAR = 12  # steps after which the table may be said to be wrong


class ExpertCosts:
    """The cost of passes beside the table's, learned step by step.

    Recursive least squares for (a, b, c) whose forgetting knows what changes: all three together
    with the machine's pace, each alone hardly (a Kalman filter, whose process noise lies along the
    coefficients themselves).

    Args:
        verify: the table's seconds by nodes; 1 among them.
        distinct: the experts that those passes chose, by nodes.
    """

    def __init__(self, verify: Mapping[int, float], distinct: Mapping[int, float]) -> None:
        self._distinct = dict(distinct)
        # In passes over one node, of which each part is a share.
        self._parts = np.array([0.5, 0.25, 0.25])
        self._spread = np.diag(self._parts**2)
        for n in sorted(distinct):
            self._fit(self._row(n, distinct[n]), verify[n] / verify[1], _TABLE_NOISE)
        self._table = self._parts.copy()
        pace, own = _UNSURE
        self._spread += pace**2 * np.outer(self._table, self._table)
        self._spread += own**2 * np.eye(3)
        self._means: dict[TreeShape, float] = {}
        self._excess = 0.0  # distinct experts of a further node, beyond the table's
        self._timed: dict[int, int] = {}  # steps by nodes

    @property
    def compared(self) -> bool:
        """Was a plain step timed?"""
        return 1 in self._timed

    def expected(self, shape: TreeShape) -> float:
        """The experts that a step of a shape will choose: as many as its last ones, or as the
        table's pass over so many nodes, corrected by what other shapes' steps had more."""
        known = self._means.get(shape)
        if known is not None:
            return known
        more = self._excess * (shape.nodes - 1)
        return float(np.clip(self._measured(shape.nodes) + more, *self._bounds(shape.nodes)))

    def correction(self, shape: TreeShape) -> float:
        """The seconds of a step at present over the table's."""
        return self.ratio(shape.nodes, self.expected(shape))

    def ratio(self, nodes: int, distinct: float) -> float:
        """The same of a pass over nodes that choose so many experts."""
        return float(self._row(nodes, distinct) @ self._parts) / self._of_table(nodes)

    def learn(self, shape: TreeShape, distinct: float, ratio: float) -> None:
        """A step chose so many experts and took so many times the table's seconds."""
        nodes = shape.nodes
        before = self.expected(shape)
        self._means[shape] = before + _RATE * (distinct - before)
        if nodes > 1:
            more = (distinct - self._measured(nodes)) / (nodes - 1)
            self._excess += _RATE * (more - self._excess)
        self._timed[nodes] = self._timed.get(nodes, 0) + 1
        self._spread += _PACE**2 * np.outer(self._parts, self._parts)
        self._spread += _DRIFT**2 * np.eye(3)
        self._fit(self._row(nodes, distinct), ratio * self._of_table(nodes), _NOISE)

    def apart(self) -> float:
        """How much the table's sizes differ in what they cost now over what they did: 1: they stand
        to each other as they did."""
        sizes = [n for n, steps in self._timed.items() if steps >= _CLEAR]
        found = [self.ratio(n, self._measured(n)) for n in sizes]
        return max(found) / min(found) if found else 1.0

    def _fit(self, row: np.ndarray, seen: float, noise: float) -> None:
        """One observation; a hiccup counts as twice what was foreseen."""
        foreseen = float(row @ self._parts)
        away = self._spread @ row
        gain = away / (row @ away + (noise * foreseen) ** 2)
        self._parts = (self._parts + gain * (min(seen, 2 * foreseen) - foreseen)).clip(0)
        self._spread = self._spread - np.outer(gain, away)

    def _row(self, nodes: int, distinct: float) -> np.ndarray:
        """1, pairs and distinct experts, both over those of one node."""
        return np.array([1.0, nodes, distinct / self._distinct[1]])

    def _of_table(self, nodes: int) -> float:
        return float(self._row(nodes, self._measured(nodes)) @ self._table)

    def _measured(self, nodes: int) -> float:
        """Distinct experts of the table's pass; between two sizes in proportion."""
        sizes = sorted(self._distinct)
        return float(np.interp(nodes, sizes, [self._distinct[n] for n in sizes]))

    def _bounds(self, nodes: int) -> tuple[float, float]:
        return self._distinct[1], nodes * self._distinct[1]
