"""MInference (arXiv 2407.02490): a pattern per query head, its place found in the prompt itself.

Follows minference/modules/minference_forward.py (microsoft/MInference, MIT). There the whole
prompt is one pass and its last 64 queries decide; here every chunk is estimated by its own last
64. There ranges of a slash merge in steps of 64 tokens; here a query block sees exactly the union.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import mlx.core as mx

from mlx_redrafter.models.attention import masked_softmax
from mlx_redrafter.prefill.config import HeadPattern, SparsePrefill
from mlx_redrafter.prefill.selectors import Chunk, Columns, Selection, Selector

# Of vertical_and_slash: at least so many, and always the first columns and shortest distances.
_LEAST_VERTICAL, _LEAST_SLASH, _FIRST_COLUMNS, _SHORT_DISTANCES = 30, 50, 30, 100
_TOP_TOKENS, _TOP_BLOCK = 6400, 64  # of block_sparse: upstream has 100 blocks of 64, always


def minference(options: SparsePrefill) -> Selector:
    """The patterns of the options, or vertical_and_slash of one size for every head."""

    def select(layer: int, chunk: Chunk) -> Selection:
        patterns = options.head_patterns(layer, chunk.heads)
        columns, distances = lines(chunk, patterns, options.last_queries)
        blocks = top_blocks(chunk, patterns)
        seen = list(keys_seen(chunk, columns, distances, blocks, options))
        counts = mx.stack([row.astype(mx.int32).sum(axis=1) for row in seen])
        return Columns(seen, cast(list[list[int]], counts.tolist()))

    return select


def keys_seen(
    chunk: Chunk,
    columns: mx.array,
    distances: mx.array,
    blocks: mx.array | None,
    options: SparsePrefill,
) -> Iterator[mx.array]:
    """For every query block the keys before it that its rows see: (H, past) bool."""
    for j, number in enumerate(chunk.past_blocks):
        past = number * chunk.block
        slots = mx.arange(past)
        always = (slots < options.sink) | (slots >= past - options.local)
        seen = slash_union(distances, past, chunk.block) | columns[:, :past] | always
        if blocks is not None:
            seen = seen | mx.repeat(blocks[:, j, :number], chunk.block, axis=1)
        yield seen


def slash_union(distances: mx.array, past: int, block: int) -> mx.array:
    """distances (H, >= past + block) bool -> (H, past) bool: keys on some slash of a query block.

    The block's rows are at past..past+block-1; at distance s they meet the keys
    past-s..past-s+block-1, and all of them are taken for all rows (section 3.2 of the paper; the
    kernel of `convert_vertical_slash_indexes`). A key c is met by the distances past-c..
    past-c+block-1, less those below zero: two running counts, read backwards.
    """
    below = mx.cumsum(distances[:, : past + block].astype(mx.int32), axis=1)
    below = mx.pad(below, [(0, 0), (1, 0)])  # below[d]: chosen distances < d
    end = past + block
    far, near = below[:, end:block:-1], below[:, past:0:-1]  # d = end - c and past - c
    return far > near


def lines(chunk: Chunk, patterns: Sequence[HeadPattern], last: int) -> tuple[mx.array, mx.array]:
    """The columns and distances that each head looks at: two (H, length) bool."""
    if any(p.kind == "vertical_and_slash" for p in patterns):
        return lines_of(ranks(chunk, last), patterns)
    nothing = mx.zeros((len(patterns), chunk.length), mx.int32)
    return lines_of((nothing, nothing), patterns)


def ranks(chunk: Chunk, last: int) -> tuple[mx.array, mx.array]:
    """Ranks, from 0, of the columns and of the distances by their mass: two (H, length) int32."""
    mass = last_queries(chunk, last)
    slots = mx.arange(chunk.length)
    return (
        ranked(mass.sum(axis=1), slots < _FIRST_COLUMNS),
        ranked(diagonal_sums(mass), slots < _SHORT_DISTANCES),
    )


def lines_of(
    ranks: tuple[mx.array, mx.array], patterns: Sequence[HeadPattern]
) -> tuple[mx.array, mx.array]:
    """Ranks (H, length) of columns and distances -> those that each head looks at, bool."""
    slots = mx.arange(ranks[0].shape[1])
    dynamic = [p.kind == "vertical_and_slash" for p in patterns]
    vertical = [
        max(p.vertical, _LEAST_VERTICAL) * d for p, d in zip(patterns, dynamic, strict=True)
    ]
    slash = [max(p.slash, _LEAST_SLASH) * d for p, d in zip(patterns, dynamic, strict=True)]
    columns = ranks[0] < mx.array(vertical)[:, None]
    distances = ranks[1] < mx.array(slash)[:, None]
    if any(p.kind == "stream_llm" for p in patterns):
        stream = [(p.vertical, p.slash) if p.kind == "stream_llm" else (0, 0) for p in patterns]
        columns = columns | (slots < mx.array([first for first, _ in stream])[:, None])
        distances = distances | (slots < mx.array([local for _, local in stream])[:, None])
    return columns, distances


def last_queries(chunk: Chunk, last: int) -> mx.array:
    """Attention of the last R queries of a chunk to everything before them: (H, R, length)."""
    n = chunk.q.shape[1]
    return probabilities(chunk, mx.arange(max(0, n - last), n))


def probabilities(chunk: Chunk, rows: mx.array) -> mx.array:
    """Dense attention of some of a chunk's queries, rows (R,): (H, R, length) float32."""
    heads, _, size = chunk.q.shape
    q = chunk.q[:, rows] * mx.array(chunk.scale, chunk.q.dtype)
    q = q.reshape(chunk.kv_heads, -1, size)
    scores = (q @ chunk.keys.swapaxes(-1, -2)).astype(mx.float32)
    scores = scores.reshape(heads, rows.shape[0], -1)
    if chunk.softcap:
        scores = mx.tanh(scores / chunk.softcap) * chunk.softcap
    seen = mx.arange(chunk.length) <= chunk.offset + rows[:, None]
    return masked_softmax(scores, seen)


def diagonal_sums(mass: mx.array) -> mx.array:
    """mass (H, R, length) of the last R queries -> (H, length): summed by distance.

    The rows in one line, read again one entry shorter, stand shifted by their number.
    """
    heads, rows, length = mass.shape
    width = length + rows
    flat = mx.pad(mass[:, ::-1], [(0, 0), (0, 0), (0, rows)]).reshape(heads, -1)
    shifted = flat[:, : rows * (width - 1)].reshape(heads, rows, width - 1)
    return shifted.sum(axis=1)[:, length - 1 :: -1]  # column length-1-d holds distance d


def ranked(values: mx.array, sure: mx.array) -> mx.array:
    """values (H, length) -> int32 ranks in their rows, 0 the largest; those that are sure first."""
    order = mx.argsort(mx.where(sure, -mx.inf, -values), axis=1)
    rank = mx.broadcast_to(mx.arange(values.shape[1], dtype=mx.int32), values.shape)
    return mx.put_along_axis(mx.zeros(values.shape, mx.int32), order, rank, axis=1)


def top_blocks(chunk: Chunk, patterns: Sequence[HeadPattern]) -> mx.array | None:
    """The blocks of the heads with the pattern block_sparse: (H, n/b, length/b) bool, or None.

    Means of queries and keys stand for their blocks (ops/block_sparse_flash_attention.py). Upstream
    takes 100 of 64 tokens whatever the file says; here a smaller ``vertical`` is obeyed.
    """
    if not any(p.kind == "block_sparse" for p in patterns):
        return None
    heads, n, size = chunk.q.shape
    q = chunk.q.reshape(heads, -1, chunk.block, size).mean(axis=2)
    keys = chunk.keys.reshape(chunk.kv_heads, -1, chunk.block, size).mean(axis=2)
    q = q.reshape(chunk.kv_heads, -1, size)
    scores = (q @ keys.swapaxes(-1, -2)).astype(mx.float32).reshape(heads, n // chunk.block, -1)
    numbers, own = mx.arange(scores.shape[2]), mx.array(list(chunk.past_blocks))[:, None]
    order = mx.argsort(mx.where(numbers < own, -scores, mx.inf), axis=-1)
    tokens = [min(p.vertical * _TOP_BLOCK, _TOP_TOKENS) for p in patterns]
    count = [
        most // chunk.block * (p.kind == "block_sparse")
        for most, p in zip(tokens, patterns, strict=True)
    ]
    chosen = numbers < mx.array(count)[:, None, None]
    chosen = mx.broadcast_to(chosen, scores.shape)
    return mx.put_along_axis(mx.zeros(scores.shape, mx.bool_), order, chosen, axis=-1)
