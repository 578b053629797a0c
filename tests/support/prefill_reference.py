"""Sparse attention by its definition in NumPy: an n x n table of who sees whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip


def attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, table: np.ndarray, scale: float, cap: float
) -> np.ndarray:
    """q (H, n, Dh), keys and values (Hkv, T, Dh), table (H, n, T) bool -> (n, H*Dh), in float64."""
    heads, n, size = q.shape
    out = np.zeros((n, heads, size))
    for head in range(heads):
        kv = head * len(keys) // heads
        scores = q[head].astype(np.float64) @ keys[kv].astype(np.float64).T * scale
        if cap:
            scores = np.tanh(scores / cap) * cap
        scores = np.where(table[head], scores, -np.inf)
        mass = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = mass / mass.sum(axis=1, keepdims=True) @ values[kv]
    return out.reshape(n, -1)


def of_blocks(chosen: Sequence[Iterable[int]], offset: int, n: int, block: int) -> np.ndarray:
    """(n, offset + n) bool: rows of query block j see the blocks chosen[j] and, of their own, what
    is not behind them."""
    table = np.zeros((n, offset + n), bool)
    for row in range(n):
        for number in chosen[row // block]:
            table[row, number * block : (number + 1) * block] = True
        position = offset + row
        table[row, position - position % block : position + 1] = True
    return table


def of_lines(
    columns: Iterable[int],
    distances: Iterable[int],
    offset: int,
    n: int,
    block: int,
    sink: int,
    local: int,
) -> np.ndarray:
    """(n, offset + n) bool: a distance gives a query block all the keys that any row of the block
    has at that distance; then columns, sink, what is local to the block, the own block; no future.
    """
    table = np.zeros((n, offset + n), bool)
    for row in range(n):
        position = offset + row
        first = position - position % block
        seen = set(columns)
        for distance in distances:
            seen |= {member - distance for member in range(first, first + block)}
        seen |= set(range(sink)) | set(range(first - local, first + block))
        for key in seen:
            if 0 <= key <= position:
                table[row, key] = True
    return table


def slab_of(keys: np.ndarray, values: np.ndarray, capacity: int) -> mx.array:
    """keys, values (Hkv, T, Dh) -> (1, 2*Hkv, C, Dh); what is behind T is not a number."""
    both = np.concatenate([keys, values]).astype(np.float32)
    more = capacity - both.shape[1]
    return mx.array(np.pad(both, ((0, 0), (0, more), (0, 0)), constant_values=np.nan)[None])
