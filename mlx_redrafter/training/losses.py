"""Losses of the drafter's distribution against the target's, on a subset of the tokens.

cross-entropy    -sum p log q              (Hinton et al., arXiv 1503.02531)
acceptance       1 - sum min(p, q), the total variation distance: the share of drafts that
                 speculative sampling would refuse (Leviathan et al., arXiv 2211.17192)
"""

from __future__ import annotations

import mlx.core as mx

from mlx_redrafter.models import vectorised
from mlx_redrafter.runtime.device import fused_kernels


def softmax(x: mx.array) -> mx.array:
    """Over the last axis, float32; the vectorised form on a CPU."""
    return mx.softmax(x, axis=-1) if fused_kernels() else vectorised.softmax(x)


@mx.custom_function
def distillation(
    logits: mx.array, target: mx.array, weights: mx.array, acceptance: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Weighted sum over rows of cross-entropy plus ``acceptance`` times the acceptance loss.

    Args:
        logits: (R, S), the drafter's.
        target: (R, S), rows that sum to 1; no gradient goes there.
        weights: (R,), 0 for rows that do not count.
        acceptance: scalar.

    Returns:
        loss (), the drafter's probabilities (R, S), sum min(p, q) per row (R,).
    """
    top = mx.max(logits, axis=-1, keepdims=True)
    q = softmax(logits)
    # log q = x - top - log sum exp(x - top), and exp(x - top) / q is that sum everywhere.
    best = mx.max(q, axis=-1, keepdims=True)
    log_mass = -mx.log(best)
    expected = mx.sum(target * logits, axis=-1)
    entropy = (top + log_mass)[:, 0] * mx.sum(target, axis=-1) - expected
    overlap = mx.sum(mx.minimum(target, q), axis=-1)
    loss = mx.sum(weights * (entropy + acceptance * (1 - overlap)))
    return loss, q, overlap


@distillation.vjp
def _distillation_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    _, target, weights, acceptance = primals
    q = outputs[1]
    # d(-sum min(p, q)) / dq is -1 where q < p; through the softmax: q * (g - sum g q).
    g = (q < target).astype(mx.float32)
    centred = g - mx.sum(g * q, axis=-1, keepdims=True)
    by_logit = q * mx.sum(target, axis=-1, keepdims=True) - target - acceptance * q * centred
    scale = (cotangents[0] * weights)[:, None]
    return (
        scale * by_logit, mx.zeros_like(target), mx.zeros_like(weights), mx.zeros_like(acceptance)
    )  # fmt: skip
