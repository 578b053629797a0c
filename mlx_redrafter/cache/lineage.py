"""Whom the nodes of a tree go on from, as states and short convolutions need it."""

from __future__ import annotations

from functools import cached_property

import mlx.core as mx


def proper(ancestors: mx.array) -> mx.array:
    """Without the nodes themselves."""
    return ancestors & ~mx.eye(ancestors.shape[0], dtype=mx.bool_)


def parents_of(ancestors: mx.array) -> mx.array:
    """ancestors (N, N) -> (N,) int32, the node that every node goes on from, -1 for the root."""
    above = proper(ancestors)
    depths = mx.sum(ancestors, axis=-1).astype(mx.int32)
    nearest = mx.argmax(mx.where(above, depths, mx.array(-1, mx.int32)), axis=-1)
    return mx.where(mx.any(above, axis=-1), nearest.astype(mx.int32), mx.array(-1, mx.int32))


def windows_of(parents: mx.array, stored: int) -> mx.array:
    """The rows that a convolution over stored + 1 of them reads for every node, among ``stored``
    old rows and N new ones: (N, stored + 1) int32, a node's own last."""
    n = parents.shape[0]
    before = mx.arange(-1, stored - 1, dtype=mx.int32)  # of an old row: the one before it
    up = mx.concatenate([before, parents + stored])  # -1 + stored: the last old row
    rows = [mx.arange(stored, stored + n, dtype=mx.int32)]
    for _ in range(stored):
        rows.append(mx.take(up, rows[-1]))
    return mx.stack(rows[::-1], axis=1)


class Lineage:
    """Whom the N nodes of a tree go on from, worked out once for all layers of a pass."""

    def __init__(self, ancestors: mx.array) -> None:
        self.ancestors, self.n = ancestors, ancestors.shape[0]
        self._windows: dict[int, mx.array] = {}

    @cached_property
    def above(self) -> mx.array:
        """(N, N) bool: the ancestors without the nodes themselves."""
        return proper(self.ancestors)

    @cached_property
    def parents(self) -> mx.array:
        """(N,) int32, -1 for the root."""
        return parents_of(self.ancestors)

    def windows(self, rows: mx.array) -> mx.array:
        """Rows (K-1+N, C), the first K-1 of them old -> what a convolution reads (N, K, C)."""
        if self.n == 1:
            return rows[None]
        stored = rows.shape[0] - self.n
        if stored not in self._windows:
            self._windows[stored] = windows_of(self.parents, stored)
        return rows[self._windows[stored]]
