"""Other choices of as many key blocks: at random, the nearest, and the best there are."""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import numpy as np

from mlx_redrafter.bench.prefill.recall import Sample
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Selection

RANDOM, LOCAL, ORACLE = "random", "local", "oracle"
CONTROLS = (RANDOM, LOCAL, ORACLE)


def block_count(chosen: Selection, chunk: Chunk, j: int) -> int:
    """Key blocks that a selection spends on query block j, single keys rounded up to whole ones."""
    if isinstance(chosen, Blocks):
        return chosen.ids[j].shape[1]
    return min(chunk.past_blocks[j], -(-sum(chosen.counts[j]) // (chunk.heads * chunk.block)))


def at_random(past: int, count: int, kv_heads: int, seed: int) -> mx.array:
    """(Hkv, count) int32: different ones of ``past`` blocks for every key/value head."""
    rng = np.random.default_rng(seed)
    return mx.array(np.stack([rng.permutation(past)[:count] for _ in range(kv_heads)]), mx.int32)


def nearest(past: int, count: int, kv_heads: int) -> mx.array:
    """(Hkv, count) int32: the last ones."""
    return mx.broadcast_to(mx.arange(past - count, past, dtype=mx.int32), (kv_heads, count))


def oracle(dense: Sample, count: int) -> mx.array:
    """(Hkv, count) int32: those with the largest dense attention of the sampled rows, summed over
    the query heads of a key/value head.

    No other choice of as many whole blocks for a key/value head has a larger mean recall on these
    rows: it is the bound.
    """
    kv_heads, block = len(dense.values), dense.block
    mass = dense.weights[:, :, : dense.past].sum(axis=1)  # (H, P)
    mass = mass.reshape(kv_heads, -1, dense.past // block, block).sum(axis=(1, 3))
    return mx.argsort(-mass, axis=-1)[:, :count].astype(mx.int32)


def control(name: str, dense: Sample, count: int, seed: int) -> mx.array:
    """(Hkv, count) int32 of the blocks before the sample's own."""
    past, kv_heads = dense.past // dense.block, len(dense.values)
    if name == RANDOM:
        return at_random(past, count, kv_heads, seed)
    return nearest(past, count, kv_heads) if name == LOCAL else oracle(dense, count)


def pairs(chosen: Selection, chunk: Chunk, j: int) -> int:
    """Pairs of a query of block j and a key that a selection looks at; padding is not counted."""
    if isinstance(chosen, Blocks):
        keys = chunk.heads * chosen.ids[j].shape[1] * chunk.block
    else:
        keys = sum(cast(list[int], chosen.counts[j]))
    return keys * chunk.block + chunk.heads * own_pairs(chunk.block)


def own_pairs(block: int) -> int:
    """Within a query block, of one head."""
    return block * (block + 1) // 2


def causal_pairs(chunk: Chunk, j: int) -> int:
    """That dense attention scores for query block j."""
    past = chunk.past_blocks[j] * chunk.block
    return chunk.heads * (past * chunk.block + own_pairs(chunk.block))
