"""Key/value slabs of which every row is quantised, alone: 8 or 4 bits a number instead of 16 or 32.

Groups lie along a row, so that a row is the same to the bit whatever is written beside it, and
moves as it is: a draft tree's rows are those of single steps, as in a plain slab.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_redrafter.cache.layer import LayerCache, Pass
from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import checks
from mlx_redrafter.runtime.device import fused_kernels

BITS, GROUPS, GROUP = (8, 4), (32, 64, 128), 64

Parts = tuple[mx.array, mx.array, mx.array]
"""Words (1, 2*Hkv, C, Dh*bits/32) uint32, and scales and biases (1, 2*Hkv, C, Dh/group)."""


@dataclass(frozen=True)
class Packing:
    """How rows are quantised, as `mx.quantize` does it.

    Args:
        bits: of a number: 8 or 4.
        group_size: numbers of a row that share a scale and a bias: 32, 64 or 128.

    Raises:
        OptionError: other numbers.
    """

    bits: int
    group_size: int = GROUP

    def __post_init__(self) -> None:
        for name, known in (("bits", BITS), ("group_size", GROUPS)):
            use = ", ".join(map(str, known[:-1])) + f" or {known[-1]}"
            value = checks.whole(f"kv_{name}", getattr(self, name), min(known), max(known), use)
            if value not in known:
                raise OptionError(f"kv_{name} {value} is not possible: use {use}")
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Packed:
    """Quantised rows as attention reads them, in the place of an array (1, 2*Hkv, C, Dh)."""

    parts: Parts
    packing: Packing

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is packed."""
        *others, groups = self.parts[1].shape
        return *others, groups * self.packing.group_size

    def __getitem__(self, index: Any) -> Packed:
        """Some of the rows; the index leaves the last axis alone."""
        return Packed(_each(lambda part: part[index], self.parts), self.packing)

    def times(self, x: mx.array, transpose: bool) -> mx.array:
        """x @ these rows, or their transpose, of every head, in float arithmetic of x."""
        words, scales, biases = self.parts
        bits, group_size = self.packing.bits, self.packing.group_size
        return mx.quantized_matmul(x, words, scales, biases, transpose, group_size, bits)

    def plain(self) -> mx.array:
        """What was packed, but for rounding."""
        words, scales, biases = self.parts
        if fused_kernels():
            return mx.dequantize(words, scales, biases, self.packing.group_size, self.packing.bits)
        plain: mx.array = _unpack(self.packing.bits)(words, scales, biases)
        return plain


@functools.cache
def _unpack(bits: int) -> Callable[..., mx.array]:
    """`mx.dequantize`, to the bit: on a CPU an eighth of its time for 4 bits, as one kernel."""

    def unpack(words: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        numbers = words.view(mx.uint8)
        if bits == 4:
            numbers = mx.stack([numbers & 15, numbers >> 4], axis=-1)
        rows = numbers.astype(scales.dtype).reshape(*scales.shape, -1)
        return (rows * scales[..., None] + biases[..., None]).reshape(*scales.shape[:-1], -1)

    return mx.compile(unpack)


Seen = mx.array | Packed
"""What a layer reads of its keys and values."""


def plain(seen: Seen) -> mx.array:
    """What a layer reads, as an array, for attention that knows of nothing else."""
    return seen.plain() if isinstance(seen, Packed) else seen


@dataclass(frozen=True)
class PackedSlab:
    """A slab in quantised form: words, scales and biases. A `cache.layer.LayerCache`."""

    slab: Slab
    packing: Packing
    cuts_anywhere = True

    @property
    def in_place(self) -> bool:
        return self.slab.in_place

    @property
    def ahead(self) -> int:
        return self.slab.ahead

    def empty(self, capacity: int, dtype: mx.Dtype, rows: int = 1) -> Parts:
        """Zeros: what they stand for is 0 too."""
        plain = self.slab.empty(capacity, dtype, rows)
        words = mx.zeros((*plain.shape[:3], self.slab.size * self.packing.bits // 32), mx.uint32)
        groups = self.slab.size // self.packing.group_size
        scales = mx.zeros((*plain.shape[:3], groups), plain.dtype)
        return words, scales, mx.zeros_like(scales)

    def grow(self, kept: Parts, capacity: int) -> Parts:
        return _each(lambda part: self.slab.grow(part, capacity), kept)

    def capacity(self, kept: Parts) -> int | None:
        return self.slab.capacity(kept[0])

    def nothing(self, kept: Parts, nodes: int) -> Parts:
        return self.empty(nodes, kept[1].dtype)

    def commit(self, kept: Parts, pending: Parts, slots: mx.array, position: mx.array) -> Parts:
        return _each(lambda old, new: self.slab.commit(old, new, slots, position), kept, pending)

    def extend(self, kept: Parts, rows: mx.array, to: Pass) -> tuple[Parts, Parts, Packed]:
        """Rows (1, 2*Hkv, N, Dh), not yet quantised, to the slots from the pass's position on."""
        words, scales, biases = mx.quantize(
            rows.astype(kept[1].dtype), self.packing.group_size, self.packing.bits
        )
        new = (words, scales, biases)
        found = [self.slab.extend(old, rows, to) for old, rows in zip(kept, new, strict=True)]
        (words, _, w), (scales, _, s), (biases, _, b) = found
        return (words, scales, biases), new, Packed((w, s, b), self.packing)


def _each(change: Callable[..., mx.array], *those: Parts) -> Parts:
    words, scales, biases = map(change, *those)
    return words, scales, biases


def packed(kinds: Sequence[LayerCache], packing: Packing) -> list[LayerCache]:
    """The kinds with slabs of keys and values in quantised form; others stay as they are.

    Raises:
        OptionError: rows that do not divide into groups.
    """
    sizes = {kind.size for kind in kinds if isinstance(kind, Slab)}
    if wrong := sorted(size for size in sizes if size % packing.group_size):
        fits = [group for group in GROUPS if not any(size % group for size in sizes)]
        use = f"give a kv group size of {fits[-1]}" if fits else "leave out kv bits"
        raise OptionError(
            f"this model keeps rows of {wrong[0]} numbers, which cannot be quantised in groups of "
            f"{packing.group_size}: {use}"
        )
    return [PackedSlab(kind, packing) if isinstance(kind, Slab) else kind for kind in kinds]
