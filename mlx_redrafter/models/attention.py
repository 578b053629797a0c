"""Attention of N tokens over a slab, with an explicit mask or bottom-right causal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_redrafter.cache.halves import Halved, halves
from mlx_redrafter.cache.packed import Packed, Seen, plain

from ..runtime import metal
from ..runtime.device import fused_kernels
from .config import DecoderConfig

Softmax = Callable[[mx.array], mx.array]


def softmax(scores: mx.array) -> mx.array:
    """Over the last axis, summed in float32.

    On a CPU step by step, in MLX's order and to the same bits: mx.compile makes the exponential a
    kernel for this machine (see compiler.py), a third of the time of MLX's own.
    """
    if scores.dtype != mx.float32 or fused_kernels():
        return mx.softmax(scores, axis=-1, precise=True)
    mass = mx.exp(scores - mx.max(scores, axis=-1, keepdims=True))
    return mass * (1 / mx.sum(mass, axis=-1, keepdims=True))


def attend(
    q: mx.array,
    slab: Seen | Halved,
    mask: mx.array | None,
    scale: float,
    softcap: float,
    softmax: Softmax = softmax,
    sinks: mx.array | None = None,
) -> mx.array:
    """q (H, B*n, Dh) over slabs (B, 2*Hkv, C, Dh) where mask (B*n, S) is True; (B*n, H*Dh).

    Decoding has one sequence, B = 1. Only the first S <= C slots are read. Without a mask the n
    queries of a slab are those of its last n slots, and each sees its own and all before it.
    Sinks (H,) are scores of a key without a value.
    """
    if mask is not None and mask.shape[1] < slab.shape[2]:
        slab = slab[:, :, : mask.shape[1]]
    if not isinstance(slab, Halved):
        slab = readable(slab)
    if softcap == 0.0 and fused_kernels() and not isinstance(slab, Packed):
        calls = _fused_calls(q, slab, mask)
        if calls:
            return _attend_fused(q, slab, mask, scale, sinks, calls)
    return _attend_unfused(q, slab, mask, scale, softcap, softmax, sinks)


Attend = Callable[[mx.array, Seen, mx.array, float, float], mx.array]
"""How one layer of one pass attends; arguments and result as of `attend`."""


def dense(layer: int) -> Attend:
    """Every layer looks at every slot that its mask shows."""
    return attend


def causal(length: int, config: DecoderConfig) -> Callable[[int], Attend]:
    """For a chunk of a prompt that ends behind so many tokens: no mask is read where MLX's kernels
    know what a token sees. Within a window they do not, and on a CPU there are none."""

    def whole(q: mx.array, slab: Seen, mask: mx.array, scale: float, softcap: float) -> mx.array:
        return attend(q, slab[:, :, :length], None, scale, softcap)

    if not fused_kernels():
        return dense
    windows = config.layer_windows
    return lambda layer: attend if windows[layer] else whole


def _fused_calls(q: mx.array, slab: mx.array | Halved, mask: mx.array | None) -> list[int]:
    """How many queries every call of MLX's fused kernels gets; empty: there is none for them."""
    heads, total, size = q.shape
    n, kv_heads = total // slab.shape[0], slab.shape[1] // 2
    if mask is None and n >= metal.LONG and size == 256:
        return [n]  # MLX knows whether this GPU has one
    return metal.attention_calls(n, heads, kv_heads, size)


def _attend_fused(
    q: mx.array,
    slab: mx.array | Halved,
    mask: mx.array | None,
    scale: float,
    sinks: mx.array | None,
    calls: Sequence[int],
) -> mx.array:
    """By MLX's kernels, which give every query the same bits in whatever company."""
    rows, capacity = slab.shape[0], slab.shape[2]
    if len(calls) > 1 and rows == 1:  # by query: a call's share needs no copy then
        heads, _, size = q.shape
        q = q.transpose(1, 0, 2).reshape(-1, heads * size)
        q = q.reshape(-1, heads, size).transpose(1, 0, 2)
    queries = q.reshape(q.shape[0], rows, -1, q.shape[2]).transpose(1, 0, 2, 3)
    n, found, start = queries.shape[2], [], 0
    seen = None if mask is None else _by_row(mask, rows)
    for count in calls:
        stop = start + count
        own, shown = queries[:, :, start:stop], slab
        if seen is None and stop < n:
            shown = slab[:, :, : capacity - n + stop]
        out = mx.fast.scaled_dot_product_attention(
            own, *halves(shown), scale=scale,
            mask="causal" if seen is None else seen[..., start:stop, :], sinks=sinks,
        )  # fmt: skip
        found.append(out.transpose(0, 2, 1, 3))
        start = stop
    whole = found[0] if len(found) == 1 else mx.concatenate(found, axis=1)
    return whole.reshape(q.shape[1], -1)


def attend_branches(
    q: mx.array,
    slab: mx.array,
    seen: mx.array,
    branches: mx.array,
    above: mx.array,
    scale: float,
    softcap: float = 0.0,
) -> mx.array:
    """q (H, R, Dh) over a slab (1, 2*Hkv, C, Dh) and over rows that are not in it; (R, H*Dh).

    A draft's own rows, branches (1, 2*Hkv, M, Dh), would have to be written between reads of the
    slab, which MLX copies then. seen (R or 1, C) and above (R, M): what every query attends to.
    """
    heads, n, dim = q.shape
    kv_heads, capacity = slab.shape[1] // 2, slab.shape[2]
    q = (q * mx.array(scale, q.dtype)).reshape(kv_heads, heads // kv_heads * n, dim)
    keys, values = zip(*((x[0, :kv_heads], x[0, kv_heads:]) for x in (slab, branches)), strict=True)
    scores = mx.concatenate([q @ k.swapaxes(-1, -2) for k in keys], axis=-1)
    if softcap:
        scores = mx.tanh(scores / softcap) * softcap
    scores = scores.reshape(kv_heads, heads // kv_heads, n, -1)
    mask = mx.concatenate([mx.broadcast_to(seen, (n, capacity)), above], axis=1)
    weights = masked_softmax(scores, mask).reshape(kv_heads, heads // kv_heads * n, -1)
    out = weights[..., :capacity] @ values[0] + weights[..., capacity:] @ values[1]
    return out.reshape(heads, n, dim).transpose(1, 0, 2).reshape(n, -1)


def readable(slab: Seen) -> Seen:
    """Quantised rows are read as they are, by `mx.quantized_matmul`; on a CPU, whose products of
    that kind unpack them anew for every query, they are unpacked first."""
    return slab if fused_kernels() else plain(slab)


def scored(q: mx.array, keys: Seen) -> mx.array:
    """q (..., n, Dh) times keys (..., C, Dh): (..., n, C)."""
    return keys.times(q, True) if isinstance(keys, Packed) else q @ keys.swapaxes(-1, -2)


def mixed(weights: mx.array, values: Seen) -> mx.array:
    """weights (..., n, C) times values (..., C, Dh): (..., n, Dh)."""
    return values.times(weights, False) if isinstance(values, Packed) else weights @ values


def _by_row(mask: mx.array, rows: int) -> mx.array:
    """(B*n, S) -> (B, 1, n, S); one sequence keeps its two axes."""
    return mask if rows == 1 else mask.reshape(rows, 1, -1, mask.shape[1])


def masked_softmax(scores: mx.array, seen: mx.array, softmax: Softmax = softmax) -> mx.array:
    """Over the last axis, of the scores that are seen (bool, of a shape that fits)."""
    return _masked(softmax)(scores, seen)


@functools.cache
def _masked(softmax: Softmax) -> Callable[[mx.array, mx.array], mx.array]:
    """The softmax of the scores that are seen. Compiled on its own, as reading a prompt is not: the
    same bits in a third of the time. A pass that is compiled as a whole takes it in as it is."""

    def masked(scores: mx.array, seen: mx.array) -> mx.array:
        lowest = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
        return softmax(mx.where(seen, scores, lowest))

    return mx.compile(masked)


def _attend_unfused(
    q: mx.array,
    slab: Seen | Halved,
    mask: mx.array | None,
    scale: float,
    softcap: float,
    softmax: Softmax,
    sinks: mx.array | None,
) -> mx.array:
    """The operations of MLX's own fallback (mlx/fast.cpp), in that order.

    The query heads of one key/value head are folded into the rows of one matrix, so that keys
    and values are read once per key/value head and not once per query head.
    """
    heads, total, dim = q.shape
    rows, kv_heads = slab.shape[0], slab.shape[1] // 2
    n, repeats, capacity = total // rows, heads // kv_heads, slab.shape[2]
    keys, values = halves(slab)  # (B, Hkv, C, Dh)
    q = q * mx.array(scale, q.dtype)
    q = q.reshape(kv_heads, repeats, rows, n, dim).transpose(2, 0, 1, 3, 4)
    scores = scored(q.reshape(rows, kv_heads, repeats * n, dim), keys)
    if softcap:
        scores = mx.tanh(scores / softcap) * softcap
    scores = scores.reshape(rows, kv_heads, repeats, n, capacity)
    if mask is None:
        seen = mx.arange(capacity) <= mx.arange(capacity - n, capacity)[:, None]  # (n, C)
    else:
        seen = mask.reshape(rows, 1, 1, n, capacity)
    if sinks is not None:  # in front, where MLX puts them
        column = sinks.astype(scores.dtype).reshape(1, kv_heads, repeats, 1, 1)
        column = mx.broadcast_to(column, (*scores.shape[:-1], 1))
        scores = mx.concatenate([column, scores], axis=-1)
        seen = mx.pad(seen, [(0, 0)] * (seen.ndim - 1) + [(1, 0)], constant_values=True)
    scores = masked_softmax(scores, seen, softmax)
    scores = scores if sinks is None else scores[..., 1:]
    out = mixed(scores.reshape(rows, kv_heads, repeats * n, capacity), values)
    out = out.reshape(rows, kv_heads, repeats, n, dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(total, heads * dim)
