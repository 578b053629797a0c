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

    def __call__(self, layer: int, slab: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """The slab of a layer with k and v, each (1, Hkv, N, Dh), in it."""
        ...


class Append:
    """N rows to the slots offset..offset+N-1; offset (1,) int32."""

    def __init__(self, offset: mx.array) -> None:
        self.offset = offset
        self.rows: list[mx.array] = []

    def __call__(self, layer: int, slab: mx.array, k: mx.array, v: mx.array) -> mx.array:
        # One update of the joined rows: two would need another start index per layer and, on
        # Metal, two more dispatches, against one small concatenation.
        new = mx.concatenate([k, v], axis=1).astype(slab.dtype)
        self.rows.append(new)
        return mx.slice_update(slab, new, self.offset, axes=(2,))


class Commit:
    """What the last pass accepted, and this pass's rows behind it, in one update of each slab.

    A slab is read by attention only and written once per pass, so that MLX can write in place: a
    buffer that an unfinished operation still reads is copied instead.

    Args:
        offset: (1,) int32, the slot of the last pass's first row.
        picks: (K,) int32, which rows go to offset..offset+K-1: below N' the last pass's, from N'
            on this pass's.
        pending: the last pass's rows, (1, 2*Hkv, N', Dh) per layer.
    """

    def __init__(self, offset: mx.array, picks: mx.array, pending: Sequence[mx.array]) -> None:
        self.offset, self.picks, self.pending = offset, picks, pending
        self.rows: list[mx.array] = []

    def __call__(self, layer: int, slab: mx.array, k: mx.array, v: mx.array) -> mx.array:
        new = mx.concatenate([k, v], axis=1).astype(slab.dtype)
        self.rows.append(new)
        both = mx.concatenate([self.pending[layer], new], axis=2)
        return mx.slice_update(slab, mx.take(both, self.picks, axis=2), self.offset, axes=(2,))
