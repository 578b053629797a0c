"""Slabs of several sequences in one array a layer: a pass over all of them attends once.

Sequences come and go without moving the others: the array has places, of which some may be empty.
What an empty place computes is not read, and what is written there lies behind every token. All in
a stack have room for as many tokens; there is one of every power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, LayerCache
from mlx_redrafter.cache.ring import Ring
from mlx_redrafter.cache.slabs import Slab

NODES = 16  # of the largest tree; so many slots of every place are for what nobody reads
_LEAST, _MOST = 128, 1024  # slots: beyond, the attention of a sequence is work enough by itself


class Stacked(NamedTuple):
    """The arrays, which travel with the steps: slabs (2, S, Hkv, C, Dh) a layer, keys and values
    dense over all places, or (1, S, 1, C, W) of latent vectors; pending: the last step's rows
    (2, S, Hkv, N', Dh) a layer and the slots (S, N') where they belong, or nothing."""

    slabs: list[mx.array]
    pending: tuple[list[mx.array], mx.array] | tuple[()] = ()


def capacity(kinds: Sequence[LayerCache], needed: int, nodes: int) -> int | None:
    """Slots of the stack for a sequence of such caches that needs so many, and has trees of so many
    nodes; None: it cannot lie in one. Windows can as long as they are slabs."""
    room = max(_LEAST, 1 << (needed + NODES - 1).bit_length())
    fits = nodes <= NODES and room <= _MOST
    return room if fits and all(_takes(kind, room) for kind in kinds) else None


def _takes(kind: LayerCache, room: int) -> bool:
    return type(kind) is Slab or (isinstance(kind, Ring) and room <= kind.around)


class Stack:
    """Which sequence lies where, and the arrays while no step has them.

    Args:
        kinds: of all layers.
        capacity: of every sequence; see :func:`capacity`.
    """

    def __init__(self, kinds: Sequence[LayerCache], capacity: int, dtype: mx.Dtype) -> None:
        self.capacity = capacity
        self.arrays = Stacked([parted(kind.empty(capacity, dtype, 0)) for kind in kinds])
        self._places: list[object | None] = []

    def __contains__(self, who: object) -> bool:
        return any(one is who for one in self._places)

    def __len__(self) -> int:
        """Places, the empty ones too."""
        return len(self._places)

    @property
    def empty(self) -> bool:
        """Does nobody lie in it?"""
        return all(one is None for one in self._places)

    def place(self, who: object) -> int:
        """Where a sequence lies."""
        return next(i for i, one in enumerate(self._places) if one is who)

    def taken(self) -> Stacked:
        """The arrays, for whoever puts others back: MLX writes into what has no second owner."""
        arrays, self.arrays = self.arrays, Stacked([])
        return arrays

    def join(self, who: object, caches: Sequence[Kept]) -> None:
        """Copy a sequence's slabs (1, 2*Hkv, *, Dh) to a place."""
        if None not in self._places:
            self._add(max(1, len(self)))
        place = self._places.index(None)
        slabs, pending = self.taken()
        at = mx.array([place], mx.int32)
        for i, own in enumerate(caches):
            own = parted(own[:, :, : self.capacity])
            slabs[i] = mx.slice_update(slabs[i], own, at, axes=(1,))
        if pending:
            rows, slots = pending
            nowhere = mx.full((1, slots.shape[1]), self.capacity - 1, mx.int32)
            pending = rows, mx.slice_update(slots, nowhere, at, axes=(0,))
        self._places[place] = who
        self.arrays = Stacked(slabs, pending)

    def leave(self, who: object) -> list[mx.array]:
        """A sequence's slabs as its own, every accepted row in its place."""
        place = self.place(who)
        slabs, pending = self.arrays
        own = [slab[:, place : place + 1] for slab in slabs]
        if pending:
            rows, slots = pending
            at = by_slot(slots[place : place + 1])
            own = [
                mx.put_along_axis(slab, at, part[:, place : place + 1], axis=3)
                for slab, part in zip(own, rows, strict=True)
            ]
        own = [mx.contiguous(slab).reshape(1, -1, *slab.shape[3:]) for slab in own]
        mx.eval(own)  # or the whole array would live as long as they do
        self._places[place] = None
        self._close_up()
        return own

    def _close_up(self) -> None:
        """Half of the places, if that is enough."""
        left = [i for i, one in enumerate(self._places) if one is not None]
        if not left or 2 * len(left) > len(self):
            return
        at = mx.array(left, mx.int32)
        slabs, pending = self.taken()
        slabs = [mx.take(slab, at, axis=1) for slab in slabs]
        if pending:
            rows, slots = pending
            pending = [mx.take(part, at, axis=1) for part in rows], mx.take(slots, at, axis=0)
        self._places = [self._places[i] for i in left]
        self.arrays = Stacked(slabs, pending)

    def _add(self, places: int) -> None:
        """So many more places; what is there is copied."""
        slabs, pending = self.taken()
        more = [(0, 0), (0, places), (0, 0), (0, 0), (0, 0)]
        slabs = [mx.pad(slab, more) for slab in slabs]
        if pending:
            rows, slots = pending
            rows = [mx.pad(part, more) for part in rows]
            slots = mx.pad(slots, [(0, places), (0, 0)], constant_values=self.capacity - 1)
            pending = rows, slots
        self._places += [None] * places
        self.arrays = Stacked(slabs, pending)


def parted(slabs: mx.array) -> mx.array:
    """Slabs or rows (S, 2*Hkv, C, Dh) as they lie in a stack: a GPU's attention would copy halves
    that are not dense over all sequences (`cache.halves`)."""
    size, heads, capacity, width = slabs.shape
    parts = 1 + (heads % 2 == 0)
    return slabs.reshape(size, parts, heads // parts, capacity, width).swapaxes(0, 1)


def by_slot(slots: mx.array) -> mx.array:
    """(S, N) -> as `mx.put_along_axis` takes it for (2, S, Hkv, C, Dh)."""
    return slots[None, :, None, :, None]
