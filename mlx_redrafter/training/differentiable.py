"""Functions of a drafter's block with gradients, vectorised on a CPU.

What ``vectorised`` computes has none: bits of a number are put together there.
"""

from __future__ import annotations

from typing import cast

import mlx.core as mx

from mlx_redrafter.models import vectorised
from mlx_redrafter.runtime.device import fused_kernels
from mlx_redrafter.training.losses import softmax


def attention_weights(scores: mx.array) -> mx.array:
    """softmax over the last axis."""
    return cast(mx.array, _attention_weights(scores))


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return cast(mx.array, _swiglu(gate, up))


@mx.custom_function
def _attention_weights(scores: mx.array) -> mx.array:
    return softmax(scores)


@_attention_weights.vjp
def _attention_weights_vjp(scores: mx.array, by_weight: mx.array, weights: mx.array) -> mx.array:
    product = by_weight * weights
    return product - weights * mx.sum(product, axis=-1, keepdims=True)


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * _sigmoid(gate) * up


@_swiglu.vjp
def _swiglu_vjp(
    primals: tuple[mx.array, mx.array], by_output: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    gate, up = primals
    share = _sigmoid(gate)
    return by_output * up * share * (1 + gate * (1 - share)), by_output * gate * share


def _sigmoid(x: mx.array) -> mx.array:
    if fused_kernels():
        return mx.sigmoid(x)
    return 1.0 / (1.0 + vectorised.exp(mx.minimum(-x, 80.0)))
