"""Slabs of several sequences in one array a layer: a pass over all of them attends once.

Sequences come and go without moving the others: the array has places, of which some may be empty.
What an empty place computes is not read, and what is written there lies behind every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, LayerCache
from mlx_redrafter.cache.ring import NODES, Ring
from mlx_redrafter.cache.slabs import Slab, capacity_for

MOST = 512  # slots of a stacked sequence: what is padded costs more than it saves beyond


class Stacked(NamedTuple):
    """The arrays, which travel with the steps: slabs (S, 2*Hkv, C, Dh) a layer; pending: the last
    step's rows (S, 2*Hkv, N', Dh) a layer and the slots (S, N') where they belong, or nothing."""

    slabs: list[mx.array]
    pending: tuple[list[mx.array], mx.array] | tuple[()] = ()


def capacity(needed: int) -> int:
    """Slots of every sequence where one needs so many: a tree's more than anybody's tokens take,
    for what empty places write."""
    return capacity_for(needed + NODES)


def stackable(kinds: Sequence[LayerCache], needed: int) -> bool:
    """Can a sequence of such caches that needs so many slots lie in a stack? Windows can as long as
    they are slabs."""
    room = capacity(needed)
    return room <= MOST and all(
        type(kind) is Slab or (isinstance(kind, Ring) and room <= kind.around) for kind in kinds
    )


class Stack:
    """Which sequence lies where, and the arrays while no step has them.

    Args:
        kinds: of all layers; see `stackable`.
    """

    def __init__(self, kinds: Sequence[LayerCache], dtype: mx.Dtype) -> None:
        self.kinds = kinds
        self.arrays = Stacked([kind.empty(0, dtype, 0) for kind in kinds])
        self._places: list[object | None] = []

    def __contains__(self, who: object) -> bool:
        return any(one is who for one in self._places)

    def place(self, who: object) -> int:
        """Where a sequence lies."""
        return next(i for i, one in enumerate(self._places) if one is who)

    @property
    def size(self) -> int:
        """Places, the empty ones too."""
        return len(self._places)

    def taken(self) -> Stacked:
        """The arrays, for whoever puts others back: MLX writes into what has no second owner."""
        arrays, self.arrays = self.arrays, Stacked([])
        return arrays

    def join(self, who: object, caches: Sequence[Kept], needed: int) -> None:
        """Copy a sequence's slabs (1, 2*Hkv, *, Dh) to a place, with so many slots."""
        place = self._places.index(None) if None in self._places else len(self._places)
        self.grow(needed, place + 1)
        slabs, pending = self.taken()
        at = mx.array([place], mx.int32)
        for i, own in enumerate(caches):
            own = own[:, :, : slabs[i].shape[2]]
            slabs[i] = mx.slice_update(slabs[i], own, at, axes=(0,))
        if pending:
            rows, slots = pending
            nowhere = mx.full((1, slots.shape[1]), slabs[0].shape[2] - 1, mx.int32)
            pending = rows, mx.slice_update(slots, nowhere, at, axes=(0,))
        self._places[place] = who
        self.arrays = Stacked(slabs, pending)

    def leave(self, who: object) -> list[mx.array]:
        """A sequence's slabs as its own, every accepted row in its place."""
        place = self.place(who)
        slabs, pending = self.arrays
        own = [slab[place : place + 1] for slab in slabs]
        if pending:
            rows, slots = pending
            at = slots[place][None, None, :, None]
            own = [
                mx.put_along_axis(slab, at, part[place : place + 1], axis=2)
                for slab, part in zip(own, rows, strict=True)
            ]
        own = [mx.contiguous(slab) for slab in own]
        mx.eval(own)  # or the whole array would live as long as they do
        self._places[place] = None
        if not any(one is not None for one in self._places):
            self.__init__(self.kinds, own[0].dtype)  # type: ignore[misc]
        return own

    def grow(self, needed: int, places: int = 0) -> None:
        """So many slots for each, and places for so many; what is there is copied if it lacks."""
        slabs, pending = self.arrays
        size, _, room, _ = slabs[0].shape
        want = size if places <= size else 1 << (places - 1).bit_length()
        longer = max(0, capacity(needed) - room)
        if want == size and not longer:
            return
        self.taken()
        lacking = (0, want - size)
        slabs = [mx.pad(slab, [lacking, (0, 0), (0, longer), (0, 0)]) for slab in slabs]
        if pending:
            rows, slots = pending
            rows = [mx.pad(part, [lacking, (0, 0), (0, 0), (0, 0)]) for part in rows]
            slots = mx.pad(slots, [lacking, (0, 0)], constant_values=slabs[0].shape[2] - 1)
            pending = rows, slots
        self._places += [None] * (want - size)
        self.arrays = Stacked(slabs, pending)
