"""A pass over several sequences whose slabs are a stack: every layer attends once for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_redrafter.cache.halves import Halved
from mlx_redrafter.cache.stack import Stacked, by_slot, parted
from mlx_redrafter.tree.nodes import DraftTree, integers


class Seating(NamedTuple):
    """Where sequences lie: order (S,) int32, the sequence in every place, -1 where this pass has
    none; places (B,) int32, the place of every sequence."""

    order: mx.array
    places: mx.array


class StackPass:
    """Trees of B sequences in a stack of S places. Seen by itself every tree has as many nodes as
    the largest, N; the rows of a pass are its own nodes, one sequence behind the other.

    Args:
        stacked: the arrays.
        trees: of the sequences.
        positions: (1,) int32 of each, its root's.
    """

    def __init__(
        self,
        stacked: Stacked,
        seating: Seating,
        trees: Sequence[DraftTree],
        positions: Sequence[mx.array],
    ) -> None:
        slabs, self._pending = stacked
        self._before, self._after = dict(enumerate(slabs)), dict[int, mx.array]()
        self._new: dict[int, mx.array] = {}
        self.capacity = slabs[0].shape[3]
        sizes = [tree.tokens.shape[0] for tree in trees]
        self.sequences, self.rows, self.nodes = len(sizes), sum(sizes), max(sizes)
        self._whose = mx.maximum(seating.order, 0)
        self._there = (seating.order >= 0).reshape(-1, 1)
        starts = np.cumsum([0, *sizes[:-1]])
        nodes = np.minimum(np.arange(self.nodes), np.array(sizes)[:, None] - 1)
        self._index = self._placed(mx.array((starts[:, None] + nodes).astype(np.int32)))
        own = mx.take(seating.places, integers(np.repeat(np.arange(len(sizes)), sizes)))
        within = integers(np.concatenate([np.arange(size) for size in sizes]))
        self._back = own * self.nodes + within
        roots = self._placed(mx.concatenate(list(positions)).reshape(-1, 1))
        self._roots = mx.where(self._there, roots, self.capacity - self.nodes)
        depths = mx.concatenate([tree.depths for tree in trees])
        self._positions = self._roots + mx.take(depths, self._index)  # (S, N)
        self._ancestors = self._placed(mx.stack([self._padded(t.ancestors) for t in trees]))

    def _placed(self, x: mx.array) -> mx.array:
        """(B, *) by sequence -> (S, *) by place."""
        return mx.take(x, self._whose, axis=0)

    def _padded(self, square: mx.array) -> mx.array:
        more = self.nodes - square.shape[0]
        return mx.pad(square, [(0, more), (0, more)]) if more else square

    def gathered(self, x: mx.array, axis: int) -> mx.array:
        """Rows of the pass -> by place and node, S*N of them."""
        return mx.take(x, self._index.reshape(-1), axis=axis)

    def scattered(self, x: mx.array) -> mx.array:
        """Back: (S*N, *) -> the rows of the pass."""
        return mx.take(x, self._back, axis=0)

    @property
    def positions(self) -> mx.array:
        """(S*N,) int32."""
        return self._positions.reshape(-1)

    def _slots(self) -> mx.array:
        """Where nodes are written: (S, N) int32, from the roots on."""
        return self._roots + integers(range(self.nodes))

    def mask(self, window: int) -> mx.array:
        """(S*N, C), what every node sees, within a window if it is not 0."""
        slots = integers(range(self.capacity))
        size = self._roots.shape[0]
        seen = (slots < self._roots)[:, None]
        held = slots
        if window:
            held = mx.broadcast_to(slots, (size, self.capacity))
            held = mx.put_along_axis(held, self._slots(), self._positions, axis=1)[:, None]
        seen = mx.broadcast_to(seen, (size, self.nodes, self.capacity))
        own = mx.broadcast_to(self._slots()[:, None], (size, self.nodes, self.nodes))
        seen = mx.put_along_axis(seen, own, self._ancestors, axis=2)
        if window:
            seen = seen & (self._positions[:, :, None] < held + window)
        return seen.reshape(-1, self.capacity)

    def extend(self, layer: int, rows: mx.array) -> mx.array | Halved:
        """Put the step before into place, and add rows (1, 2*Hkv, S*N, Dh): what is read."""
        slab = self._before.pop(layer)
        if self._pending:
            slab = mx.put_along_axis(slab, by_slot(self._pending[1]), self._pending[0][layer], 3)
        size = self._roots.shape[0]
        new = rows.reshape(rows.shape[1], size, self.nodes, -1).swapaxes(0, 1).astype(slab.dtype)
        self._new[layer] = parted(new)
        slab = mx.put_along_axis(slab, by_slot(self._slots()), self._new[layer], 3)
        self._after[layer] = slab
        return Halved(slab[0], slab[1]) if slab.shape[0] == 2 else slab[0]

    def settled(self, slots: Sequence[mx.array] | None) -> Stacked:
        """The arrays after the pass. slots: by sequence (n,) int32, where its nodes belong; None:
        all stand there."""
        slabs = [self._after[layer] for layer in sorted(self._after)]
        if slots is None:
            return Stacked(slabs)
        nowhere = self.capacity - 1
        padded = [
            mx.pad(own, (0, self.nodes - own.shape[0]), constant_values=nowhere) for own in slots
        ]
        at = mx.where(self._there, self._placed(mx.stack(padded)), nowhere)
        return Stacked(slabs, ([self._new[layer] for layer in sorted(self._new)], at))
