"""How much of the attention a selection keeps, on sampled rows of one query block."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_redrafter.models.attention import softmax
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Selection


@dataclass(frozen=True)
class Sample:
    """Dense attention of R rows of query block j, whose own keys are the last b of P + b.

    weights (H, R, P + b) float32: each row sums to one; values (Hkv, P + b, Dh) float32.
    """

    weights: mx.array
    values: mx.array
    block: int

    @property
    def past(self) -> int:
        return self.weights.shape[2] - self.block


def sample(chunk: Chunk, j: int, rows: int) -> Sample:
    """Dense probabilities, in float32, of ``rows`` evenly spaced rows of query block j."""
    past, step = chunk.offset + j * chunk.block, chunk.block // rows
    places = mx.arange(step // 2, chunk.block, step)[:rows]
    queries = chunk.q[:, j * chunk.block + places].astype(mx.float32) * chunk.scale  # (H, R, Dh)
    queries = queries.reshape(chunk.kv_heads, -1, queries.shape[2])
    both = chunk.slab[0, :, : past + chunk.block].astype(mx.float32)
    scores = queries @ both[: chunk.kv_heads].swapaxes(-1, -2)
    if chunk.softcap:
        scores = mx.tanh(scores / chunk.softcap) * chunk.softcap
    scores = scores.reshape(chunk.heads, rows, -1)
    visible = mx.arange(past + chunk.block) <= past + places[:, None]
    scores = mx.where(visible, scores, mx.finfo(mx.float32).min)
    return Sample(softmax(scores), both[chunk.kv_heads :], chunk.block)


def seen(chosen: Selection, chunk: Chunk, j: int) -> mx.array:
    """Who is looked at by query block j: (H, P + b) bool, its own block whole."""
    if isinstance(chosen, Blocks):
        return blocks_seen(chosen.ids[j], chunk.past_blocks[j], chunk)
    own = mx.ones((chunk.heads, chunk.block), mx.bool_)
    return mx.concatenate([chosen.seen[j], own], axis=1)


def blocks_seen(ids: mx.array, past: int, chunk: Chunk) -> mx.array:
    """ids (Hkv, B) of ``past`` key blocks -> (H, P + b) bool, the own block besides."""
    ids = mx.concatenate([ids, mx.full((ids.shape[0], 1), past, mx.int32)], axis=1)
    flags = mx.zeros((ids.shape[0], past + 1), mx.bool_)
    flags = mx.put_along_axis(flags, ids, mx.array(True), axis=1)
    return mx.repeat(mx.repeat(flags, chunk.block, axis=1), chunk.heads // chunk.kv_heads, axis=0)


def kept(dense: Sample, visible: mx.array) -> tuple[mx.array, mx.array]:
    """visible (H, P + b) bool -> recall and relative output error, (H, R) each.

    Recall is the share of a row's dense attention on the keys that are looked at; the error is
    |o - o'| / |o|, o' from the same scores renormalised over those keys.
    """
    weights = dense.weights * visible[:, None]
    recall = weights.sum(axis=-1)
    whole = _weighted(dense, dense.weights)
    part = _weighted(dense, weights) / mx.maximum(recall[..., None], 1e-30)
    distance = mx.linalg.norm(whole - part, axis=-1)
    return recall, distance / mx.maximum(mx.linalg.norm(whole, axis=-1), 1e-30)


def _weighted(dense: Sample, weights: mx.array) -> mx.array:
    """(H, R, P + b) -> (H, R, Dh)."""
    heads, rows, length = weights.shape
    folded = weights.reshape(len(dense.values), -1, length)
    return (folded @ dense.values).reshape(heads, rows, -1)
