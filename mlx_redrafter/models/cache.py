"""Key/value slabs of fixed capacity: one array per layer, written in place.

A slab is (1, 2*Hkv, C, Dh): keys in the first Hkv heads, values in the rest. Every function is a
pure expression and can be traced; MLX writes into the old buffer when nobody else holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from .config import DecoderConfig

_STEP = 128


def bucket(n: int) -> int:
    """The smallest capacity >= n: steps of 128 up to 2048, then an eighth of the power below.

    A capacity is one more graph to trace (10 ms for 30 layers), but an empty slot is read by every
    pass: for a tree of 8 nodes on a CPU 128 of them cost 3 ms.
    """
    step = max(_STEP, (1 << max(0, (n - 1).bit_length() - 1)) // 8)
    return max(1, -(-n // step)) * step


def new_cache(
    config: DecoderConfig, capacity: int, dtype: mx.Dtype, rows: int = 1
) -> list[mx.array]:
    """Zeroed slabs, one per layer, for so many sequences (decoding has one).

    Zeros matter: a masked slot still enters 0 x value.
    """
    shape = (rows, 2 * config.num_kv_heads, capacity, config.head_dim)
    return [mx.zeros(shape, dtype) for _ in range(config.num_layers)]


def grow(kv: Sequence[mx.array], capacity: int) -> list[mx.array]:
    """Copies of the slabs with zero rows added up to `capacity`; no copy if already that size."""
    return [
        slab
        if slab.shape[2] >= capacity
        else mx.pad(slab, [(0, 0), (0, 0), (0, capacity - slab.shape[2]), (0, 0)])
        for slab in kv
    ]


class Write(Protocol):
    """How one pass puts its keys and values into the slabs. Made anew for every pass.

    After the pass ``rows`` holds the pass's own rows, (1, 2*Hkv, N, Dh) per layer.
    """

    rows: list[mx.array]

    def __call__(self, layer: int, slab: mx.array, rows: mx.array) -> mx.array:
        """The slab of a layer with the pass's rows in it: keys, then values, (1, 2*Hkv, N, Dh)."""
        ...


class Append:
    """N rows to the slots offset..offset+N-1; offset (1,) int32."""

    def __init__(self, offset: mx.array) -> None:
        self.offset = offset
        self.rows: list[mx.array] = []

    def __call__(self, layer: int, slab: mx.array, rows: mx.array) -> mx.array:
        self.rows.append(rows.astype(slab.dtype))
        return mx.slice_update(slab, self.rows[-1], self.offset, axes=(2,))


class Commit:
    """What the last pass accepted goes to its place, then this pass's rows behind it.

    A slab is read by attention only, after both updates, so that MLX can write in place: a buffer
    that an unfinished operation still reads is copied instead.

    Args:
        offset: (1,) int32, the slot of this pass's first row.
        slots: (N',) int32, where each of the last pass's rows goes. Those that were not accepted
            share one slot that nobody reads before it is written again.
        pending: the last pass's rows, (1, 2*Hkv, N', Dh) per layer.
    """

    def __init__(self, offset: mx.array, slots: mx.array, pending: Sequence[mx.array]) -> None:
        self.offset, self.slots, self.pending = offset, slots, pending
        self.rows: list[mx.array] = []

    def __call__(self, layer: int, slab: mx.array, rows: mx.array) -> mx.array:
        self.rows.append(rows.astype(slab.dtype))
        slab = mx.put_along_axis(slab, self.slots[None, None, :, None], self.pending[layer], axis=2)
        return mx.slice_update(slab, self.rows[-1], self.offset, axes=(2,))
