"""Key/value slabs of fixed capacity: one array per layer, written in place.

A slab is (1, 2*Hkv, C, Dh): keys in the first Hkv heads, values in the rest. MLX writes into the
old buffer when nobody else holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_redrafter.cache.layer import Pass
from mlx_redrafter.runtime.device import fused_kernels

_STEP = 128
_STEP_ON_GPU = 512
_FEW = 64  # rows of a pass that are written by their slots on a GPU: a tree, not a prompt


def capacity_for(n: int) -> int:
    """The smallest capacity >= n: steps of 128 up to 2048, then an eighth of the power below.

    A capacity is one more graph to trace (10 ms for 30 layers), but an empty slot is read by every
    pass: for a tree of 8 nodes on a CPU 128 of them cost 3 ms. A GPU's kernels skip what is masked,
    and its steps are of 512.
    """
    least = _STEP_ON_GPU if fused_kernels() else _STEP
    step = max(least, (1 << max(0, (n - 1).bit_length() - 1)) // 8)
    return max(1, -(-n // step)) * step


@dataclass(frozen=True)
class Slab:
    """Keys and values of every token, by position. A `cache.layer.LayerCache`.

    Args:
        heads: ``2*Hkv``.
        size: ``Dh``.
        in_place, ahead: see `LayerCache`.
        dtype: of the rows; None: what the model computes with.
    """

    heads: int
    size: int
    in_place: bool = True
    ahead: int = 0
    dtype: mx.Dtype | None = None
    cuts_anywhere = True  # what lies behind the cut is masked, and written again

    def empty(self, capacity: int, dtype: mx.Dtype, rows: int = 1) -> mx.array:
        """Zeros: a masked slot still enters 0 x value."""
        return mx.zeros((rows, self.heads, capacity, self.size), self.dtype or dtype)

    def grow(self, kept: mx.array, capacity: int) -> mx.array:
        """A copy with zero rows added up to the capacity; no copy if it has that already."""
        more = capacity - kept.shape[2]
        return mx.pad(kept, [(0, 0), (0, 0), (0, more), (0, 0)]) if more > 0 else kept

    def capacity(self, kept: mx.array) -> int:
        return kept.shape[2]

    def nothing(self, kept: mx.array, nodes: int) -> mx.array:
        return mx.zeros((1, self.heads, nodes, self.size), kept.dtype)

    def commit(
        self, kept: mx.array, pending: mx.array, slots: mx.array, position: mx.array
    ) -> mx.array:
        """Rows (1, 2*Hkv, N', Dh) go to their slots; those that were not accepted share one that
        nobody reads before it is written again. Only this pass's update reads the result: a buffer
        that attention in flight still reads would be copied."""
        return mx.put_along_axis(kept, slots[None, None, :, None], pending, axis=2)

    def extend(
        self, kept: mx.array, rows: mx.array, to: Pass
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Rows (1, 2*Hkv, N, Dh) to the N slots from the pass's position on."""
        rows = rows.astype(kept.dtype)
        n = rows.shape[2]
        if n <= _FEW and fused_kernels():  # one launch, and a slice from an array takes two
            slab = mx.put_along_axis(kept, to.slots(n)[None, None, :, None], rows, axis=2)
        else:
            slab = mx.slice_update(kept, rows, to.position, axes=(2,))
        return slab, rows, slab
