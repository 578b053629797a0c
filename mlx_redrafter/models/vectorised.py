"""Element-wise functions that a C++ compiler can vectorise, for many rows on a CPU.

MLX's exponential calls a library function per term on x86 (11 ns per element); the same polynomial
without fused multiply-add takes 2.5 ns and differs by at most 1.2e-7. Reading and writing training
text may differ by that; decoding may not: what the target does there uses MLX's own functions.
"""

from __future__ import annotations

import mlx.core as mx

_POLYNOMIAL = (  # of 2**x on [-0.5, 0.5], from Cephes, as in mlx/backend/cpu/simd/math.h
    1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2,
    2.402264791363012e-1, 6.931472028550421e-1, 1.0,
)  # fmt: skip


def exp(x: mx.array) -> mx.array:
    """e**x for float32 x <= 88."""
    powers = mx.maximum(x, -87.0) * 1.442695 + 0.5
    whole = powers.astype(mx.int32)  # towards zero
    whole = whole - (whole.astype(mx.float32) > powers).astype(mx.int32)
    rest = powers - 0.5 - whole.astype(mx.float32)
    value = mx.full((), 1.535336188319500e-4)
    for coefficient in _POLYNOMIAL:
        value = value * rest + coefficient
    return ((whole + 127) * (1 << 23)).view(mx.float32) * value


_SERIES = (  # of (log(1 + t) - t + t**2 / 2) / t**3 on [sqrt(1/2) - 1, sqrt(2) - 1], fitted in
    # Chebyshev points: 7 terms are as good as a float32
    9.272283084e-02, -1.411843188e-01, 1.467637877e-01, -1.659285518e-01,
    1.998512912e-01, -2.500092169e-01, 3.333341026e-01,
)  # fmt: skip
_ROOT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)


def log(x: mx.array) -> mx.array:
    """The natural logarithm of float32 x > 0, normal numbers; relative error below 2e-7."""
    bits = x.view(mx.int32)
    power = (bits - _ROOT_HALF) >> 23
    t = (bits - (power << 23)).view(mx.float32) - 1.0  # x = (1 + t) 2**power, near 1
    value = mx.full((), _SERIES[0])
    for coefficient in _SERIES[1:]:
        value = value * t + coefficient
    square = t * t
    return t + (value * t * square - 0.5 * square) + power.astype(mx.float32) * 0.6931471805599453


@mx.compile
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up."""
    return gate / (1.0 + exp(mx.minimum(-gate, 80.0))) * up


@mx.compile
def _exp_below(x: mx.array, top: mx.array) -> mx.array:
    return exp(x - top)


def softmax(x: mx.array) -> mx.array:
    """Over the last axis."""
    mass = _exp_below(x, mx.max(x, axis=-1, keepdims=True))
    return mass / mx.sum(mass, axis=-1, keepdims=True)
