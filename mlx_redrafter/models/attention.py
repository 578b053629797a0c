"""Attention of N tokens over a slab, with an explicit mask."""

from __future__ import annotations

import mlx.core as mx

from .rope import fused_kernels


def attend(q: mx.array, slab: mx.array, mask: mx.array, scale: float, softcap: float) -> mx.array:
    """q (N, H, Dh) over slab (1, 2*Hkv, C, Dh) where mask (N, S) is True; returns (N, H*Dh).

    Only the first S <= C slots are read.
    """
    if mask.shape[1] < slab.shape[2]:
        slab = slab[:, :, : mask.shape[1]]
    if softcap == 0.0 and fused_kernels():
        half = slab.shape[1] // 2
        out = mx.fast.scaled_dot_product_attention(
            q.transpose(1, 0, 2)[None], slab[:, :half], slab[:, half:], scale=scale, mask=mask
        )
        return out[0].transpose(1, 0, 2).reshape(q.shape[0], -1)
    return _attend_unfused(q, slab, mask, scale, softcap)


def _attend_unfused(
    q: mx.array, slab: mx.array, mask: mx.array, scale: float, softcap: float
) -> mx.array:
    """The operations of MLX's own fallback (mlx/fast.cpp), in that order.

    The query heads of one key/value head are folded into the rows of one matrix, so that keys
    and values are read once per key/value head and not once per query head.
    """
    n, heads, dim = q.shape
    kv_heads = slab.shape[1] // 2
    repeats, capacity = heads // kv_heads, slab.shape[2]
    keys, values = slab[0, :kv_heads], slab[0, kv_heads:]  # (Hkv, C, Dh)
    q = q * mx.array(scale, q.dtype)
    q = q.reshape(n, kv_heads, repeats, dim).transpose(1, 2, 0, 3)
    scores = q.reshape(kv_heads, repeats * n, dim) @ keys.swapaxes(-1, -2)
    if softcap:
        scores = mx.tanh(scores / softcap) * softcap
    scores = scores.reshape(kv_heads, repeats, n, capacity)
    lowest = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
    scores = mx.softmax(mx.where(mask, scores, lowest), axis=-1, precise=True)
    out = scores.reshape(kv_heads, repeats * n, capacity) @ values
    out = out.reshape(kv_heads, repeats, n, dim).transpose(2, 0, 1, 3)
    return out.reshape(n, heads * dim)
