"""What machines that share a model are asked before it is: how long exchanges take, and whether
everybody computes the same."""

from __future__ import annotations

import statistics
import time
import zlib
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_redrafter.distributed.link import Link

BYTES = (4, 16 << 10, 128 << 10, 1 << 20)  # of the exchanges that are timed
_TIMES = 64
_ROWS, _WIDTH = 16, 512


@dataclass(frozen=True)
class Probe:
    """What came of it.

    Args:
        seconds: of a gather, by the bytes that everybody brings: the median.
        alike: do all machines compute the same numbers to the last bit?
        rows_alone: has every row of a sum over machines the bits that it has alone?
        bandwidth: bytes per second that this machine reads.
    """

    seconds: dict[int, float]
    alike: bool
    rows_alone: bool
    bandwidth: float


def probe(link: Link) -> Probe:
    """On all machines at once."""
    return Probe(
        {size: _gather_seconds(link, size) for size in BYTES},
        len({code for (code,) in link.numbers(_code())}) == 1,
        _rows_alone(link),
        _bandwidth(),
    )


def _gather_seconds(link: Link, size: int) -> float:
    mine, taken = mx.zeros((1, max(1, size // 4)), mx.float32), list[float]()
    for _ in range(_TIMES if size < 1 << 20 else _TIMES // 4):
        start = time.perf_counter()
        mx.eval(link.gather(mine))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _code() -> int:
    """A checksum of what every machine computes for itself in a pass: norms, products, softmax."""
    keys = [mx.random.key(seed) for seed in range(3)]
    x = mx.random.normal((_ROWS, _WIDTH), key=keys[0])
    w = mx.random.normal((_WIDTH, _WIDTH), key=keys[1])
    y = mx.fast.rms_norm(x, mx.ones((_WIDTH,)), 1e-5) @ w
    y = mx.softmax(y, axis=-1, precise=True) + mx.sigmoid(y) * mx.exp(-mx.abs(y))
    y = y + mx.random.gumbel(y.shape, key=keys[2])
    return zlib.crc32(np.array(y).tobytes())


def _rows_alone(link: Link) -> bool:
    x = mx.random.normal((_ROWS, _WIDTH), key=mx.random.key(link.rank))
    together = link.total(x)
    alone = mx.concatenate([link.total(x[i : i + 1]) for i in range(_ROWS)])
    same = cast(bool, mx.array_equal(together, alone).item())
    return all(value for (value,) in link.numbers(int(same)))


def _bandwidth() -> float:
    """By the fastest of a few sums over an array that no cache holds."""
    x = mx.zeros((64 << 20,), mx.float32)
    mx.eval(x)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        mx.eval(mx.sum(x))
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best
