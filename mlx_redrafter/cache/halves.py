"""Keys and values of many sequences, for a GPU: each half lies dense over all sequences.

Half of the heads of slabs (B, 2*Hkv, C, Dh) is not, and MLX's kernel for few queries copies all
keys and values of a layer that are not, in every pass (`kv_copy_unless` in
mlx/backend/metal/scaled_dot_product_attention.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, LayerCache, Pass
from mlx_redrafter.cache.packed import Seen
from mlx_redrafter.cache.slabs import Slab


@dataclass(frozen=True)
class Halved:
    """What a layer reads, in the place of an array (B, 2*Hkv, C, Dh)."""

    keys: mx.array  # (B, Hkv, C, Dh)
    values: mx.array

    @property
    def shape(self) -> tuple[int, int, int, int]:
        rows, heads, capacity, size = self.keys.shape
        return rows, 2 * heads, capacity, size

    def __getitem__(self, index: Any) -> Halved:
        """Some of the slots: of no other axis."""
        return Halved(self.keys[index], self.values[index])


def halves(slab: Seen | Halved) -> tuple[Any, Any]:
    """Keys and values (B, Hkv, C, Dh) of what a layer reads."""
    if isinstance(slab, Halved):
        return slab.keys, slab.values
    heads = slab.shape[1] // 2
    return slab[:, :heads], slab[:, heads:]


@dataclass(frozen=True)
class HalvedSlab(Slab):
    """Slabs (2*B, Hkv, C, Dh) of B sequences: all keys, and behind them all values."""

    def empty(self, capacity: int, dtype: mx.Dtype, rows: int = 1) -> mx.array:
        return mx.zeros((2 * rows, self.heads // 2, capacity, self.size), self.dtype or dtype)

    def extend(  # type: ignore[override]
        self, kept: mx.array, rows: mx.array, to: Pass
    ) -> tuple[mx.array, mx.array, Halved]:
        """Rows (B, 2*Hkv, n, Dh)."""
        slab, rows, _ = super().extend(kept, mx.concatenate([*halves(rows)]), to)
        count = slab.shape[0] // 2
        return slab, rows, Halved(slab[:count], slab[count:])


def halved(kinds: list[LayerCache]) -> list[LayerCache]:
    """The kinds with slabs of keys and values in this form; a latent vector has no halves."""
    return [
        HalvedSlab(kind.heads, kind.size, dtype=kind.dtype)
        if type(kind) is Slab and kind.heads % 2 == 0
        else kind
        for kind in kinds
    ]


def some(kind: LayerCache, kept: Kept, index: mx.array) -> Kept:
    """A layer's arrays of some of the sequences, by number (M,)."""
    if isinstance(kind, HalvedSlab):
        index = mx.concatenate([index, index + kept.shape[0] // 2])
    return kept[index]
