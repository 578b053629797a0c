"""Are the kernels right and fast on this GPU? `python -m mlx_redrafter.kernels.probe SHAPE ...`

A line of JSON for each shape. Right: against MLX's own product with the same weights. Fast: in
chains of products of which each needs the one before, over several matrices, as independent ones
overlap and a single matrix stays in the cache.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import mlx.core as mx

from . import products
from .products import Order, Shape, Weights
from .verdicts import Verdict, named, shape_of

NEAR = 0.02  # of the largest output
ROWS = (5, 6, 8, 9, 12, 16)  # to measure with; see Verdict.rows
_BYTES = 256 * 2**20  # of different weights in a chain: more than any cache
_MOST = 12  # matrices
_REPEATS = 5

Product = Callable[[mx.array, Weights], mx.array]


def main(names: list[str]) -> None:
    for name in names:
        print(json.dumps({"name": name, **examined(shape_of(name)).as_dict()}), flush=True)


def examined(shape: Shape) -> Verdict:
    """What `fast` gains, and the order of `exact`."""
    mx.random.seed(0)
    first = weights(shape)
    try:
        order, single = exact_order(shape, first)
        gains = {}
        if fast_is_right(shape, first):
            count = min(_MOST, 1 + _BYTES // sum(part.nbytes for part in first))
            several = [first, *(weights(shape) for _ in range(count - 1))]
            mx.eval(several)
            gains = {rows: gain(shape, several, rows) for rows in ROWS}
    except (RuntimeError, ValueError) as error:
        return Verdict(error=f"{named(shape)}: {' '.join(str(error).split())[:200]}")
    finally:
        mx.clear_cache()
    return Verdict(gains, order, single)


def weights(shape: Shape) -> Weights:
    """Random words, with scales as of a matrix that keeps the size of what it multiplies."""
    outputs, inputs, bits, group, dtype = shape
    words = mx.random.randint(0, 256, (outputs, inputs * bits // 8), mx.uint8).view(mx.uint32)
    size = inputs**-0.5 / 2 ** (bits - 2)
    scales = (size * mx.random.uniform(0.5, 1.5, (outputs, inputs // group))).astype(dtype)
    return Weights(words, scales, -(2 ** (bits - 1)) * scales)


def inputs_of(shape: Shape, rows: int) -> list[mx.array]:
    """Rows (M, K) that show what is wrong: random ones, and single inputs of 1."""
    place = mx.random.randint(0, shape.inputs, (rows, 1))
    one = (mx.arange(shape.inputs)[None] == place).astype(shape.dtype)
    return [mx.random.normal((rows, shape.inputs)).astype(shape.dtype), one]


def usual(shape: Shape) -> Product:
    """MLX's own."""
    return lambda x, w: mx.quantized_matmul(x, *w, True, shape.group, shape.bits)


def fast_is_right(shape: Shape, w: Weights) -> bool:
    return all(
        near(products.fast(x, w, shape.bits).run()[0], usual(shape)(x, w))
        for rows in (5, 8, 11, 16)
        for x in inputs_of(shape, rows)
    )


def exact_order(shape: Shape, w: Weights) -> tuple[Order | None, bool]:
    """An order that is right and gives every row its own bits, those of MLX's single row if there
    is one; and whether it does."""
    given = [x for rows in (2, 3, 8, 11) for x in inputs_of(shape, rows)]
    plain = [_row_by_row(usual(shape), x, w) for x in given]
    for order in products.orders(shape):

        def exact(x: mx.array, w: Weights, order: Order = order) -> mx.array:
            return products.exact(x, w, shape.bits, order).run()[0]

        if all(same(exact(x, w), y) for x, y in zip(given, plain, strict=True)):
            return order, True
    for order in products.orders(shape):

        def exact(x: mx.array, w: Weights, order: Order = order) -> mx.array:
            return products.exact(x, w, shape.bits, order).run()[0]

        alone = [_row_by_row(exact, x, w) for x in given]
        together = [exact(x, w) for x in given]
        alike = all(same(one, other) for one, other in zip(alone, together, strict=True))
        if alike and all(near(y, right) for y, right in zip(together, plain, strict=True)):
            return order, False
    return None, False


def near(found: mx.array, right: mx.array) -> bool:
    found, right = found.astype(mx.float32), right.astype(mx.float32)
    limit = NEAR * mx.max(mx.abs(right))
    return bool(mx.all(mx.abs(found - right) <= limit).item())  # not where there is a NaN


def same(one: mx.array, other: mx.array) -> bool:
    """To the bit."""
    return bool(mx.all(one.view(mx.uint16) == other.view(mx.uint16)).item())


def gain(shape: Shape, several: list[Weights], rows: int) -> float:
    """How many times faster than MLX's `fast` is with so many rows."""
    x = inputs_of(shape, rows)[0]
    count = 48 if shape.outputs * shape.inputs < 2**26 else 12

    def seconds(product: Product) -> float:
        def chain() -> mx.array:
            y, now = x, x
            for i in range(count):
                y = product(now, several[i % len(several)])
                now = x + 0 * y[:, :1]
            return y

        mx.eval(chain())
        return min(_timed(chain) for _ in range(_REPEATS))

    own = seconds(lambda x, w: products.fast(x, w, shape.bits).run()[0])
    return round(seconds(usual(shape)) / own, 3)


def _timed(function: Callable[[], mx.array]) -> float:
    start = time.perf_counter()
    mx.eval(function())
    return time.perf_counter() - start


def _row_by_row(product: Product, x: mx.array, w: Weights) -> mx.array:
    return mx.concatenate([product(x[i : i + 1], w) for i in range(x.shape[0])])


if __name__ == "__main__":
    main(sys.argv[1:])
