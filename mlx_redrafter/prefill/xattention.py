"""XAttention (arXiv 2503.16428): blocks are chosen by the sums of their antidiagonals."""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mlx_redrafter.models.attention import masked_softmax
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Selection, Selector, always


def xattention(options: SparsePrefill) -> Selector:
    """As many blocks as hold ``tau`` of the estimated attention, per key/value head.

    Every head of a layer gets the number that the neediest one needs, so that one gather serves
    all; the others take their next best blocks. These numbers are read back.
    """

    def select(layer: int, chunk: Chunk) -> Selection:
        if options.tau >= 1:
            return everything(chunk)
        order, needed = ranked(block_mass(chunk, options.stride), chunk, options)
        counts = cast(list[int], needed.tolist())
        return Blocks([order[:, j, :count] for j, count in enumerate(counts)])

    return select


def everything(chunk: Chunk) -> Blocks:
    """All blocks before each query block."""
    return Blocks([
        mx.broadcast_to(mx.arange(past, dtype=mx.int32)[None], (chunk.kv_heads, past))
        for past in chunk.past_blocks
    ])  # fmt: skip


def block_mass(chunk: Chunk, stride: int) -> mx.array:
    """Estimated attention of every query block to every key block: (Hkv, n/b, length/b) float32.

    A square of stride x stride scores is represented by its antidiagonal: one product of rows of
    stride * Dh numbers. Probabilities are summed over the rows of a block and over the query heads
    of a key/value head; a query block's row sums to (H/Hkv) * b/stride.
    """
    heads, n, size = chunk.q.shape
    kv_heads, first = chunk.kv_heads, chunk.offset // stride
    rows, columns = n // stride, chunk.length // stride
    q = chunk.q * mx.array(chunk.scale / stride, chunk.q.dtype)
    q = q.reshape(heads, rows, stride, size)[:, :, ::-1]  # the antidiagonal: last query, first key
    q = q.reshape(kv_heads, -1, stride * size)
    keys = chunk.keys.reshape(kv_heads, columns, stride * size)
    scores = (q @ keys.swapaxes(-1, -2)).astype(mx.float32)
    if chunk.softcap:
        scores = mx.tanh(scores / chunk.softcap) * chunk.softcap
    scores = scores.reshape(kv_heads, -1, rows, columns)
    seen = mx.arange(columns) <= mx.arange(first, first + rows)[:, None]
    mass = masked_softmax(scores, seen).sum(axis=1)  # over the group
    per = chunk.block // stride
    return mass.reshape(kv_heads, rows // per, per, columns // per, per).sum(axis=(2, 4))


def ranked(mass: mx.array, chunk: Chunk, options: SparsePrefill) -> tuple[mx.array, mx.array]:
    """mass (Hkv, n/b, K) -> blocks (Hkv, n/b, K), the most wanted first, and how many (n/b,).

    What is always kept comes first. The own block, whose mass counts, is not among them.
    With ``over`` cap a query block has no more than max_density allows.
    """
    count, total = mass.shape[2], mass.sum(axis=-1, keepdims=True)
    own = mx.array(list(chunk.past_blocks), mx.int32)[:, None]  # (n/b, 1)
    numbers = mx.arange(count)
    sure = (numbers < options.sink_blocks) | (numbers >= own - options.local_blocks)
    wanted = mx.where(sure, mass + 2 * total, mass)
    wanted = mx.where(numbers < own, wanted, -1.0)
    order = mx.argsort(-wanted, axis=-1).astype(mx.int32)
    held = mx.take_along_axis(mx.where(numbers < own, mass, 0.0), order, axis=-1)
    held = mx.cumsum(held, axis=-1, inclusive=False)
    held = held + mx.take_along_axis(mass, mx.broadcast_to(own, (*mass.shape[:2], 1)), axis=-1)
    needed = (held < options.tau * total).sum(axis=-1).max(axis=0)  # (n/b,)
    past = chunk.past_blocks
    kept = [len(always(b, options.sink_blocks, options.local_blocks)) for b in past]
    most = [*past]
    if options.over == "cap":  # a query block scores half of its own block
        fitting = [int(options.max_density * (b + 0.5) - 0.5) for b in past]
        most = [max(least, fit) for least, fit in zip(kept, fitting, strict=True)]
    return order, mx.clip(needed, mx.array(kept), mx.array(most))
