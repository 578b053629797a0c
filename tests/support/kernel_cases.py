"""Products for the kernels of mlx_redrafter.kernels, and what they should give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from emulated import values

from mlx_redrafter.kernels import products
from mlx_redrafter.kernels.products import Order, Weights
from mlx_redrafter.kernels.source import Launch

ULP = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7, mx.float32: 2.0**-23}


class Product(NamedTuple):
    """x (M, K), weights (N, K)."""

    x: mx.array
    weights: Weights
    bits: int
    group: int

    def fast(self) -> Launch:
        return products.fast(self.x, self.weights, self.bits)

    def exact(self, order: Order, row: int | None = None) -> Launch:
        """Of one row alone, or of all; y in float32, where 16 bits would hide the last ones."""
        x = self.x if row is None else self.x[row : row + 1]
        launch = products.exact(x, self.weights, self.bits, order)
        return launch._replace(constants={**launch.constants, "T": mx.float32}, dtypes=[mx.float32])

    def right(self) -> np.ndarray:
        """y (M, N) in float64."""
        w, scales, biases = self.weights
        with mx.stream(mx.cpu):
            wide = (part.astype(mx.float32) for part in (scales, biases))
            unpacked = mx.dequantize(w, *wide, group_size=self.group, bits=self.bits)
            x = np.array(self.x.astype(mx.float32)).astype(np.float64)
        return x @ np.array(unpacked).astype(np.float64).T

    def close(self, found: np.ndarray, dtype: mx.Dtype) -> bool:
        """Is it right, but for the rounding of the outputs, and of sums in float32?"""
        right = self.right()
        rounding = ULP[dtype] / 2 * np.abs(right)
        near = rounding + 2e-6 * np.abs(right).max()
        return bool((np.abs(values(found, dtype) - right) <= near).all())


def product(
    rows: int, inputs: int, outputs: int, width: int, group: int, dtype: mx.Dtype, seed: int = 0
) -> Product:
    """Random, of about unit size; MLX quantises on the CPU."""
    rng = np.random.default_rng([seed, rows, inputs, outputs, width, group])
    with mx.stream(mx.cpu):
        w = mx.array(rng.standard_normal((outputs, inputs)) * inputs**-0.5, mx.float32)
        w, scales, biases = mx.quantize(w.astype(dtype), group, width)
        x = mx.array(rng.standard_normal((rows, inputs)), mx.float32).astype(dtype)
        mx.eval(w, scales, biases, x)
    return Product(x, Weights(w, scales, biases), width, group)


def whole() -> Iterator[Product]:
    """Every number of rows, group, width and type, at sizes that end within a tile."""
    sizes = {32: [(288, 40), (32, 33)], 64: [(320, 72), (1024, 8)], 128: [(640, 31), (128, 96)]}
    for dtype in (mx.float16, mx.bfloat16):
        for width in (4, 8):
            for group, shapes in sizes.items():
                for inputs, outputs in shapes:
                    for rows in range(1, 18):
                        yield product(rows, inputs, outputs, width, group, dtype)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """To the bit."""
    return one.tobytes() == other.tobytes()
