"""x (M, K) times affine weights (N, K) in 4 or 8 bits, for few rows: which products there are
kernels for, and their launches.

`fast` fills 8x8 matrices: a weight is read once for up to 16 rows. `exact` gives every row the bits
that it has alone, in the order of MLX's kernel for a single row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from .source import Kernel, Launch

_INPUTS = ("x", "w", "scales", "biases")
FAST = Kernel("fast", _INPUTS, ("y",))
EXACT = Kernel("exact", _INPUTS, ("y",))

BITS, GROUPS = (4, 8), (32, 64, 128)
DTYPES = (mx.float16, mx.bfloat16)
FAST_ROWS = range(5, 17)  # of fewer MLX's own kernels read the weights once as well
EXACT_ROWS = range(2, 65)  # beyond, MLX's tiles of rows are meant for a prompt
_COLUMNS, _THREADS = 32, 256  # of a group of `fast`
_TILE = 8


class Weights(NamedTuple):
    """A quantised matrix: w (N, K * bits / 32) words, scales and biases (N, K / group)."""

    w: mx.array
    scales: mx.array
    biases: mx.array


class Shape(NamedTuple):
    """What a product depends on besides its rows; dtype is that of what is multiplied."""

    outputs: int
    inputs: int
    bits: int
    group: int
    dtype: mx.Dtype


class Order(NamedTuple):
    """How `exact` adds up a row.

    Args:
        packs: words that a lane takes at a time.
        once: products are joined with the sums behind them.
    """

    packs: int
    once: bool


def possible(shape: Shape) -> bool:
    """Is there a kernel for such weights?"""
    outputs, inputs, bits, group, dtype = shape
    fits = bits in BITS and group in GROUPS and inputs % group == 0
    # Fewer than 8 scales are handed over as constants, which the text does not expect.
    return fits and dtype in DTYPES and outputs * (inputs // group) >= 8


def fast(x: mx.array, weights: Weights, bits: int) -> Launch:
    """x (M, K) -> y (M, N)."""
    rows, outputs = x.shape[0], weights.w.shape[0]
    tiles = min(2, -(-rows // _TILE))
    grid = (-(-outputs // _COLUMNS) * _THREADS, -(-rows // (tiles * _TILE)), 1)
    constants = {"T": x.dtype, "BITS": bits, "TILES": tiles}
    return _launch(FAST, x, weights, constants, grid, _THREADS)


def exact(x: mx.array, weights: Weights, bits: int, order: Order) -> Launch:
    """x (M, K) -> y (M, N)."""
    rows, outputs = x.shape[0], weights.w.shape[0]
    together = next(n for n in (1, 2, 4, 8) if n >= min(rows, _TILE))
    grid = (-(-outputs // 8) * 64, -(-rows // together), 1)
    own = {"ROWS": together, "PACKS": order.packs, "ONCE": order.once}
    return _launch(EXACT, x, weights, {"T": x.dtype, "BITS": bits, **own}, grid, 64)


def orders(shape: Shape) -> list[Order]:
    """Those in which MLX may add up a single row, the likeliest first."""
    block = 512 if shape.bits == 4 else 256
    packs = 2 if shape.inputs % block == 0 and shape.outputs % 8 == 0 else 1
    return [Order(n, once) for n in (packs, 3 - packs) for once in (True, False)]


def _launch(
    kernel: Kernel,
    x: mx.array,
    weights: Weights,
    constants: dict[str, Any],
    grid: tuple[int, int, int],
    threads: int,
) -> Launch:
    shape = (x.shape[0], weights.w.shape[0])
    return Launch(kernel, [x, *weights], constants, grid, (threads, 1, 1), [shape], [x.dtype])
