"""Keys and values of a layer with a sliding window: no more of them than the window needs.

Until it holds ``R`` tokens it is a slab. From there on a position has one slot, ``position % R``,
and a token's place depends on nothing else: drafted or plain, the keys of a window are added in one
order, to the bit. A draft tree's nodes lie behind the root's slot in the order of the tree; those
at positions from the next multiple of R on lie at the ring's beginning, as they will once they
are accepted, and room behind the ring takes those that do not reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_redrafter.cache.layer import LayerCache, Pass
from mlx_redrafter.cache.packed import PackedSlab
from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.errors import OptionError

NODES = 64  # of the largest tree
SPARE = 256  # tokens that are kept beyond the window: a tree's nodes, and for a session to be cut


@dataclass(frozen=True)
class Ring(Slab):
    """A slab that becomes a ring of R + `NODES` slots. A `cache.layer.LayerCache`, which a session
    cuts anywhere as long as that leaves it `intact`.

    Args:
        window: tokens that a token sees, itself included.
    """

    window: int = 0

    @property
    def around(self) -> int:
        """``R``: positions that have slots of their own."""
        return self.window + SPARE

    def _slots(self, capacity: int) -> int:
        return capacity if capacity <= self.around else self.around + NODES

    def empty(self, capacity: int, dtype: mx.Dtype, rows: int = 1) -> mx.array:
        return super().empty(self._slots(capacity), dtype, rows)

    def grow(self, kept: mx.array, capacity: int) -> mx.array:
        return super().grow(kept, self._slots(capacity))

    def capacity(self, kept: mx.array) -> int | None:  # type: ignore[override]
        return None if self.closed(kept) else kept.shape[2]

    def closed(self, kept: mx.array) -> bool:
        """Is it a ring by now?"""
        return kept.shape[2] > self.around

    def commit(
        self, kept: mx.array, pending: mx.array, slots: mx.array, position: mx.array
    ) -> mx.array:
        """Accepted rows go to the slots of their positions, all others to the last, which nobody
        ever reads."""
        if self.closed(kept):
            last = mx.array(kept.shape[2] - 1, mx.int32)
            slots = mx.where(slots < position, slots % self.around, last)
        return super().commit(kept, pending, slots, position)

    def extend(
        self, kept: mx.array, rows: mx.array, to: Pass
    ) -> tuple[mx.array, mx.array, mx.array]:
        """What is read is the ring, or (a chunk of a prompt) the window before it and its rows."""
        if not self.closed(kept):
            return super().extend(kept, rows, to)
        rows, n = rows.astype(kept.dtype), rows.shape[2]
        if not _long(n, to):
            ring = _put(kept, self._own_slots(n, to), rows)
            return ring, rows, ring
        before = (to.position - self.window + _count(self.window) + self.around) % self.around
        seen = mx.concatenate([mx.take(kept, before, axis=2), rows], axis=2)
        last = min(n, self.around)
        slots = (to.position + (n - last) + _count(last)) % self.around
        return _put(kept, slots, rows[:, :, n - last :]), rows, seen

    def _own_slots(self, n: int, to: Pass) -> mx.array:
        """Where a pass's n nodes lie, (n,) int32."""
        assert n <= NODES, "the engine refuses larger trees"
        first, node = to.position % self.around, _count(n)
        depths = node if to.ancestors is None else mx.sum(to.ancestors, axis=-1) - 1
        # A filler may say that it is deeper than its number: no node that counts does.
        round_it = mx.minimum(depths, node) >= self.around - first
        return first + node - mx.where(round_it, self.around, 0).astype(mx.int32)

    def mask(self, positions: mx.array, to: Pass) -> mx.array:
        """positions (N,) int32 -> (N, S), which of the S rows that `extend` gives every node sees,
        of a ring."""
        n, least = positions.shape[0], positions[:, None] - self.window
        if _long(n, to):
            held = to.position - self.window + _count(self.window + n)
            return (held >= 0) & (held > least) & (held <= positions[:, None])
        slots, before = _count(self.around + NODES), to.position - 1
        held = before - (before - slots + 2 * self.around) % self.around  # the last one there
        seen = (slots < self.around) & (held >= 0) & (held > least)
        above = mx.array(np.tri(n, dtype=bool)) if to.ancestors is None else to.ancestors
        own = mx.broadcast_to(self._own_slots(n, to), (n, n))
        return mx.put_along_axis(seen, own, above & (positions > least), axis=1)

    def intact(self, furthest: int, length: int) -> bool:
        """Is all that a token at position ``length`` sees in the ring, where tokens and nodes were
        written up to position ``furthest``?"""
        return max(0, length - self.window + 1) >= furthest - self.around


def ring_of(kind: LayerCache) -> Ring | None:
    """A layer's ring, quantised or not."""
    kind = kind.slab if isinstance(kind, PackedSlab) else kind
    return kind if isinstance(kind, Ring) else None


def check_nodes(kinds: Sequence[LayerCache], nodes: int) -> None:
    """Raise OptionError for a tree that is too large for a ring."""
    if nodes > NODES and any(map(ring_of, kinds)):
        raise OptionError(
            f"{nodes} nodes are not possible with this model's sliding windows: use 1 to {NODES}"
        )


def whole(kinds: Sequence[LayerCache]) -> list[LayerCache]:
    """The kinds with all tokens of a window's layer kept, for whom no ring is made."""
    return [
        Slab(kind.heads, kind.size, dtype=kind.dtype) if isinstance(kind, Ring) else kind
        for kind in kinds
    ]


def _long(n: int, to: Pass) -> bool:
    """Is it a chunk of a prompt that would write over what its own tokens see?"""
    return to.ancestors is None and n > NODES


def _put(kept: mx.array, slots: mx.array, rows: mx.array) -> mx.array:
    return mx.put_along_axis(kept, slots[None, None, :, None], rows, axis=2)


def _count(n: int) -> mx.array:
    """A constant (n,) int32 of the graph: mx.arange would be computed anew in every step."""
    return mx.array(np.arange(n, dtype=np.int32))
