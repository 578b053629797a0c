"""One pass through an unmodified mlx_lm module: what its layers read instead of their own caches.

mlx_lm's caches know one position and one order; these answer with a position and ancestors for
every node. They live for one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    RotatingKVCache,
)

from mlx_redrafter.cache.layer import LayerCache, Pass
from mlx_redrafter.cache.packed import Seen, plain
from mlx_redrafter.cache.recurrent import LastRows, State, TapedState
from mlx_redrafter.cache.slabs import Slab

Kinds = list[LayerCache | None]
"""What every slot of the module's caches remembers, keys and values being two; None where nothing
has claimed it yet."""


class Running:
    """A pass over N nodes.

    Args:
        kinds: see `Kinds`; what is claimed for the first time is filled in.
        caches: the pass as the caches see it.
        positions (N,), mask (N, S), key_positions (S,): see `Decoder.__call__`.
        closed: recurrences in closed form, else step by step.
        scalar: positions are given to the module as one number, where it adds them itself.
    """

    def __init__(
        self,
        kinds: Kinds,
        caches: Pass,
        positions: mx.array,
        mask: mx.array,
        key_positions: mx.array,
        closed: bool = False,
        scalar: bool = False,
    ) -> None:
        self.kinds, self.caches = kinds, caches
        self.positions, self.mask, self.key_positions = positions, mask, key_positions
        self.closed, self.n = closed, positions.shape[0]
        self.tree = caches.ancestors is not None
        self.branching = self.tree and self.n > 1
        spread = self.branching and not scalar
        self.offset = positions if spread else caches.position.reshape(())
        self.hidden: mx.array | None = None
        self.outputs: dict[int, mx.array] = {}
        self.chosen: list[mx.array] = []  # experts (1, N, K), by layer
        self.read: list[tuple[int, mx.array]] = []  # states that the module holds, by slot
        self.lineage = caches.lineage

    def window(self, size: int) -> mx.array:
        """The mask (N, S) of a sliding window; 0: of none."""
        if not size:
            return self.mask
        return self.mask & (self.positions[:, None] < self.key_positions + size)

    def slot_of(self, state: mx.array) -> int:
        """Whose state the module passes on."""
        return next(slot for slot, held in self.read if held is state)

    def slot_of_rows(self, rows: int, width: int) -> int:
        """Of the states that wait, the first that is so many rows."""
        return next(slot for slot, held in self.read if held.shape == (1, rows, width))

    def claim(self, slot: int, kind: Callable[[mx.array], LayerCache], rows: Any) -> Any:
        """Extend a slot: what its layer reads. kind: makes its kind from a state."""
        held = next(held for number, held in self.read if number == slot)
        if self.kinds[slot] is None:
            self.kinds[slot] = kind(held)
        known = self.kinds[slot]
        assert known is not None
        self.read = [(number, state) for number, state in self.read if number != slot]
        return self.caches.extend(slot, known, rows)

    def last_rows(self, slot: int, rows: mx.array) -> mx.array:
        """Of every node of a tree (N, K, C), rows (1, N, C) being their own; of a chunk these
        behind those that are kept, (1, K-1+N, C)."""
        read: mx.array = self.claim(slot, lambda kept: LastRows(kept.shape, kept.dtype), rows)
        return read

    def state(self, state: mx.array, after: mx.array) -> None:
        """after: the states after N nodes (N, ...), or the one after a chunk of a prompt."""
        self.claim(self.slot_of(state), lambda kept: State(kept.shape, kept.dtype), after)

    def taped(self, state: mx.array, rows: Any, gates: int, sharing: int = 1) -> None:
        """rows: a tape, or the state after a chunk of a prompt; the others: see `TapedState`."""
        self.claim(
            self.slot_of(state),
            lambda kept: TapedState(kept.shape, kept.dtype, gates, sharing),
            rows,
        )


class KeysValues(KVCache):
    """Stands for a cache of keys and values, with a window or without."""

    def __init__(self, run: Running, slots: Sequence[int | None], window: int) -> None:
        self.run, self.slots, self.window = run, slots, window
        self.keys: mx.array
        self.values: mx.array
        self.start_position = 0
        if window:
            self.max_size = window

    @property
    def offset(self) -> mx.array:  # type: ignore[override]
        return self.run.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = keys = self._extend(0, keys)
        self.values = values = self._extend(1, values)
        return keys, values

    def _extend(self, which: int, rows: mx.array) -> mx.array:
        """rows (1, Hkv, N, Dh), or (N, Hkv, 1, Dh) of nodes that stand for sequences."""
        run, slot = self.run, self.slots[which]
        if run.branching and rows.shape[0] == run.n:
            rows = rows.transpose(2, 1, 0, 3)
        seen = run.mask.shape[1]
        if slot is None:
            return mx.zeros((*rows.shape[:2], seen, rows.shape[3]), rows.dtype)
        kind = run.kinds[slot]
        assert kind is not None
        slab: Seen = run.caches.extend(slot, kind, rows)
        return plain(slab[:, :, :seen])

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        return self.keys, self.values

    def maybe_trim_front(self) -> None:
        """Nothing is ever in front of a slab."""

    def make_mask(
        self, n: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array:
        mask = self.run.window(window_size or self.window)
        return mask[None, None] if n == 1 else mask


class States(ArraysCache):
    """Stands for the arrays of a recurrent layer."""

    def __init__(self, run: Running, slots: Sequence[int | None], masked: bool) -> None:
        self.run, self.slots, self.masked = run, slots, masked
        self.held: dict[int, mx.array] = {}
        self.lengths = self.left_padding = None

    def __getitem__(self, index: int) -> mx.array | None:
        slot = self.slots[index]  # the end of them ends an iteration
        if slot is None:
            return None
        if index not in self.held:
            kind = self.run.kinds[slot] or State((1,), mx.float32)
            self.held[index] = self.run.caches.settled(slot, kind)
            self.run.read.append((slot, self.held[index]))
        return self.held[index]

    def __setitem__(self, index: int, value: mx.array) -> None:
        """What the module says comes after its last node is of no use in a tree."""

    def advance(self, n: int) -> None:
        """There is no padding."""

    def make_mask(self, n: int) -> mx.array | None:  # type: ignore[override]
        return mx.ones((1, n), mx.bool_) if self.masked else None


class Layout:
    """How what is remembered lies in the caches of a module.

    Args:
        caches: its own, as they are after a few tokens.
        masked: recurrent layers need a mask, which hides nothing.
        rows: makes (1, K-1, C) of the last rows that the module keeps.

    Raises:
        TypeError: a cache of another kind.
    """

    def __init__(
        self,
        caches: Sequence[Any],
        masked: bool = False,
        rows: Callable[[mx.array], mx.array] | None = None,
    ) -> None:
        self.caches, self.masked, self._rows = caches, masked, rows
        self.arrays: list[mx.array] = []  # what they hold, by slot
        self.kinds: Kinds = []
        self._slots: dict[int, list[int | None]] = {}
        for cache in caches:
            self._add(cache)

    def _add(self, cache: Any) -> None:
        if isinstance(cache, CacheList):
            for part in cache.caches:
                self._add(part)
        elif isinstance(cache, ArraysCache):
            self._slots[id(cache)] = [self._slot(array, False) for array in cache.cache]
        elif isinstance(cache, KVCache | RotatingKVCache | ChunkedKVCache | ConcatenateKVCache):
            both = (cache.keys, cache.values)
            self._slots[id(cache)] = [self._slot(array, True) for array in both]
        else:
            raise TypeError(f"it has a cache of its own, {type(cache).__name__}")

    def _slot(self, array: mx.array | None, slab: bool) -> int | None:
        """None for what the module never uses."""
        if array is None or not array.size:
            return None
        self.arrays.append(array if slab or self._rows is None else self._rows(array))
        made = Slab(array.shape[1], array.shape[3], dtype=array.dtype) if slab else None
        self.kinds.append(made)
        return len(self.arrays) - 1

    def forget(self) -> None:
        """Let go of the arrays, which nobody has computed."""
        self.arrays.clear()
        for cache in self.caches:
            for part in getattr(cache, "caches", (cache,)):
                if isinstance(part, ArraysCache):
                    part.cache = [None] * len(part.cache)
                else:
                    part.keys = part.values = None

    def stand_ins(self, run: Running) -> list[Any]:
        """Caches of the same shape for one pass."""
        return [self._stand_in(cache, run) for cache in self.caches]

    def _stand_in(self, cache: Any, run: Running) -> Any:
        if isinstance(cache, CacheList):
            return CacheList(*(self._stand_in(part, run) for part in cache.caches))
        slots = self._slots[id(cache)]
        if isinstance(cache, ArraysCache):
            return States(run, slots, self.masked)
        return KeysValues(run, slots, getattr(cache, "max_size", 0) or 0)
