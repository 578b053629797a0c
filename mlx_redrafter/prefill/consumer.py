"""Attention of a prompt chunk over chosen keys only: gather them, then ordinary attention.

Gathered keys are all before the query block and the block's own keys come last, so that
bottom-right causal attention is right whatever the order of the others. Rotary positions are in
the keys already. No kernel of our own: with every key chosen this is dense attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from mlx_redrafter.models.attention import attend

BATCH = 4  # query blocks at a time: their gathered keys and values are the memory this needs


def block_sparse_attention(
    q: mx.array,
    slab: mx.array,
    blocks: Sequence[mx.array],
    offset: int,
    *,
    block: int,
    scale: float,
    softcap: float = 0.0,
    batch: int = BATCH,
) -> mx.array:
    """Attention of n queries at positions offset.. over whole blocks of keys.

    Args:
        q: (H, n, Dh); n and offset are multiples of ``block``.
        slab: (1, 2*Hkv, C, Dh), C a multiple of ``block``. Slots from offset + n on are not read.
        blocks: for every query block, (Hkv, B_j) int32: numbers of key blocks before it, each at
            most once in a row. Its own block is added here.
        batch: query blocks with equal B_j that are gathered at a time.

    Returns:
        (n, H*Dh), as `models.attention.attend`.
    """
    heads, capacity, size = slab.shape[1:]
    per_head = capacity // block
    stored = slab.reshape(-1, block, size)  # a view: (2 Hkv C/b, b, Dh)
    firsts = mx.arange(heads, dtype=mx.int32)[:, None] * per_head
    out: list[mx.array] = []
    for start, stop in _alike([chosen.shape[1] for chosen in blocks], batch):
        own = mx.arange(start, stop, dtype=mx.int32)[:, None, None] + offset // block
        own = mx.broadcast_to(own, (stop - start, heads // 2, 1))
        ids = mx.concatenate([mx.stack(list(blocks[start:stop])), own], axis=-1)
        ids = mx.concatenate([ids, ids], axis=1) + firsts  # of keys, then of values
        if out:  # or MLX may gather for all query blocks before it attends for the first
            (ids,) = mx.depends([ids], [out[-1]])
        gathered = mx.take(stored, ids, axis=0).reshape(stop - start, heads, -1, size)
        queries = q[:, start * block : stop * block]
        out.append(attend(queries, gathered, None, scale, softcap))
    return mx.concatenate(out)


def column_sparse_attention(
    q: mx.array,
    slab: mx.array,
    columns: Sequence[mx.array],
    counts: Sequence[Sequence[int]],
    offset: int,
    *,
    block: int,
    scale: float,
    softcap: float = 0.0,
) -> mx.array:
    """Attention of n queries at positions offset.. over single keys, chosen per query head.

    Args:
        q, slab: as for `block_sparse_attention`.
        columns: for query block j, (H, offset + j*block) bool: the keys before it that its rows
            see. Its own block is added here.
        counts: for every query block, how many each head sees.

    Returns:
        (n, H*Dh).
    """
    out: list[mx.array] = []
    for j, (seen, number) in enumerate(zip(columns, counts, strict=True)):
        past = offset + j * block
        done: list[mx.array] = []
        order: list[int] = []
        for heads in padded_together(number):
            if out or done:
                (seen,) = mx.depends([seen], [done[-1] if done else out[-1]])
            most = max(number[head] for head in heads)
            of = mx.array(heads, mx.int32)
            gathered = _gather(
                slab, seen[of], of * (slab.shape[1] // 2) // len(q), past, block, most
            )
            queries = q[of, j * block : (j + 1) * block].reshape(1, -1, q.shape[2])
            mask = _ragged_mask(mx.array([number[head] for head in heads]), block, most)
            done.append(attend(queries, gathered, mask, scale, softcap))
            order += heads
        by_head = mx.concatenate(done).reshape(len(q), block, -1)
        place = mx.argsort(mx.array(order))
        out.append(by_head[place].transpose(1, 0, 2).reshape(block, -1))
    return mx.concatenate(out)


def padded_together(counts: Sequence[int]) -> list[list[int]]:
    """Heads whose numbers of keys are alike: padding at most doubles a number above 128."""
    groups: dict[int, list[int]] = {}
    for head, count in enumerate(counts):
        groups.setdefault(max(7, (count - 1).bit_length()), []).append(head)
    return list(groups.values())


def _alike(sizes: Sequence[int], batch: int) -> Iterator[tuple[int, int]]:
    """Runs of neighbours of equal size, at most ``batch`` long: (first, behind the last)."""
    start = 0
    for i in range(1, len(sizes) + 1):
        if i == len(sizes) or sizes[i] != sizes[start] or i - start == batch:
            yield start, i
            start = i


def _gather(
    slab: mx.array, seen: mx.array, kv_heads: mx.array, past: int, block: int, most: int
) -> mx.array:
    """Keys and values of A heads where seen (A, past), then their own block: (A, 2, most+b, Dh)."""
    _, both, capacity, size = slab.shape
    # The place of a key among those that are seen; all others share one place behind them.
    place = mx.where(seen, mx.cumsum(seen.astype(mx.int32), axis=1) - 1, most)
    tokens = mx.zeros((seen.shape[0], most + 1), mx.int32)
    slots = mx.broadcast_to(mx.arange(past, dtype=mx.int32), seen.shape)
    tokens = mx.put_along_axis(tokens, place, slots, axis=1)[:, :most]
    own = mx.broadcast_to(mx.arange(past, past + block, dtype=mx.int32), (seen.shape[0], block))
    tokens = mx.concatenate([tokens, own], axis=1)[:, None]  # (A, 1, most + b)
    firsts = mx.stack([kv_heads, kv_heads + both // 2], axis=1)[:, :, None] * capacity  # (A, 2, 1)
    return mx.take(slab.reshape(-1, size), firsts + tokens, axis=0)


def _ragged_mask(counts: mx.array, block: int, most: int) -> mx.array:
    """counts (A,) -> (A*b, most + b): the first so many of `most` slots, then causal."""
    heads = counts.shape[0]
    real = mx.arange(most) < counts[:, None]  # (A, most)
    causal = mx.arange(block) <= mx.arange(block)[:, None]
    parts = [
        mx.broadcast_to(real[:, None], (heads, block, most)),
        mx.broadcast_to(causal[None], (heads, block, block)),
    ]
    return mx.concatenate(parts, axis=-1).reshape(heads * block, most + block)
