"""The gated delta rule over a tree as one kernel in place of some thirty."""

from __future__ import annotations

import mlx.core as mx

from .source import Kernel, Launch

DELTA = Kernel(
    "delta", ("qk", "v", "gates", "beta", "ancestors", "state"), ("out", "total", "delta")
)
MOST_NODES = 32
_THREADS, _VALUES = 256, 32  # of a group


def possible(key_size: int, value_size: int) -> bool:
    """Is there a kernel for a state of such a head?"""
    return key_size % 32 == 0 and key_size <= 256 and value_size % _VALUES == 0


def delta(
    qk: mx.array,
    v: mx.array,
    gates: mx.array,
    beta: mx.array,
    ancestors: mx.array,
    state: mx.array,
) -> Launch:
    """As `models.forms.delta_rule`: qk (Hk, 2, N, Dk) float32, v (N, H, Dv), gates (N, H) as
    logarithms, beta (N, H), ancestors (N, N) bool, parents before children and every node its own,
    state (1, H, Dv, Dk) float32 -> out (N, H, Dv), total (H, N, 1), delta (H, N, Dv), float32."""
    n, heads, width = v.shape
    size = qk.shape[-1]
    grid = (heads * _THREADS, width // _VALUES, 1)
    shapes = [(n, heads, width), (heads, n, 1), (heads, n, width)]
    inputs = [qk, v, gates, beta, ancestors, state]
    return Launch(DELTA, inputs, {"SIZE": size}, grid, (_THREADS, 1, 1), shapes, [mx.float32] * 3)
