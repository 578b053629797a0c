"""Top-p, min-p and top-k: the likeliest tokens of a distribution, in mlx_lm's order.

A token is kept if it is no less likely than a threshold: of top-p the largest probability for which
the tokens at least as likely have the mass, of top-k that of the k-th, of min-p a share of the
likeliest's. So tokens that are equally likely stay or go together, and each filter may look at the
whole distribution, as what another one takes away lies below its threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import mlx.core as mx

from mlx_redrafter.runtime.device import fused_kernels

Arrays = dict[str, mx.array]


def restrict(logits: mx.array, arrays: Arrays) -> mx.array:
    """Log-probabilities with the tokens outside top-p, min-p and top-k at -inf. (N, V)."""
    filters: Sequence[str] = [n for n in ("top_p", "min_p", "top_k") if n in arrays]
    if not filters:
        return logits
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if fused_kernels() and filters != ["min_p"]:
        return _by_sorting(logp, arrays)
    return _by_halving(logp, filters, arrays)


def _by_sorting(logp: mx.array, arrays: Arrays) -> mx.array:
    """For a GPU, which waits for every one of the halvings below: one sort for all filters."""
    surprise = -logp
    rising = mx.sort(surprise, axis=-1)
    kept = []
    if "top_p" in arrays:
        mass = mx.cumsum(mx.exp(-rising), axis=-1)
        short = mass < arrays["top_p"] * mass[:, -1:]
        at = short.astype(mx.int32).sum(-1, keepdims=True)  # never all: the last has the total
        kept.append(surprise <= _entry(rising, at))
    if "min_p" in arrays:
        kept.append(logp >= mx.log(arrays["min_p"]) - rising[:, :1])
    if "top_k" in arrays:
        least = mx.minimum(arrays["top_k"], logp.shape[-1]).astype(mx.int32)
        at = mx.broadcast_to(least - 1, (logp.shape[0], 1))
        kept.append(surprise <= _entry(rising, at))
    return mx.where(functools.reduce(mx.logical_and, kept), logp, -mx.inf)


def _entry(rows: mx.array, at: mx.array) -> mx.array:
    """One of every row: (N, V), (N, 1) -> (N, 1)."""
    return mx.take_along_axis(rows, at, axis=-1)


def _by_halving(logp: mx.array, filters: Sequence[str], arrays: Arrays) -> mx.array:
    """For a CPU, which takes longer for a sort."""
    for name in filters:
        if name == "min_p":
            floor = logp.max(-1, keepdims=True) + mx.log(arrays["min_p"])
            logp = mx.where(logp < floor, -mx.inf, logp)
            continue
        surprise = mx.maximum(-logp, 0.0)  # rounding may put a logp just above 0
        if name == "top_p":
            p = mx.exp(logp)
            limit = _threshold(surprise, p, arrays[name] * p.sum(-1, keepdims=True))
        else:
            limit = _threshold(surprise, mx.array(1.0), arrays[name])
        logp = mx.where(surprise > limit, -mx.inf, logp)
    return logp


def _threshold(x: mx.array, weights: mx.array, budget: mx.array) -> mx.array:
    """The smallest t per row for which the entries <= t weigh at least the budget: (N, 1).

    Bisection over the bits of a non-negative float, which order as the floats do: exact after 31
    halvings. Infinity where all entries together weigh less.
    """
    low = mx.full((*x.shape[:-1], 1), -1, mx.int32)  # below 0: nothing is in
    high = mx.full(low.shape, 0x7F800000, mx.int32)  # infinity: everything is in
    for _ in range(31):
        middle = low + (high - low) // 2  # the sum may overflow
        inside = mx.where(x <= mx.view(middle, mx.float32), weights, 0.0).sum(-1, keepdims=True)
        enough = inside >= budget
        low, high = mx.where(enough, low, middle), mx.where(enough, middle, high)
    return mx.view(high, mx.float32)
