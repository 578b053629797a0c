"""Gated DeltaNet (arXiv 2412.06464) over a tree: a layer that keeps a state of fixed size.

As mlx_lm/models/qwen3_5.py and qwen3_next.py, whose projections `layout` brings into one order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import precise_swiglu
from mlx_lm.models.gated_delta import gated_delta_update

from mlx_redrafter.cache.layer import LayerCache
from mlx_redrafter.cache.recurrent import LastRows, State, Tape, TapedState

from ..runtime.device import fused_kernels
from . import delta_kernel, forms
from .config import DecoderConfig
from .fuse import fuse
from .layers import LayerPass

ROWS, STATE = 0, 1
"""What a layer keeps, in this order: the last inputs of its convolution, and its state."""
_PARTS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_JOINED = {"in_proj": _PARTS, "in_proj_qkvz": _PARTS[:2], "in_proj_ba": _PARTS[2:]}
_EPS = 1e-6  # of the norm of queries and keys, mlx_lm's


def caches(config: DecoderConfig) -> list[LayerCache]:
    """What a layer remembers."""
    delta = config.delta
    assert delta is not None, "a recurrent layer has a configuration"
    shape = (1, delta.value_heads, delta.value_size, delta.key_size)
    state = State(shape, mx.float32)
    if _closed(config):
        state = TapedState(shape, mx.float32, sharing=delta.value_heads // delta.key_heads)
    return [LastRows((1, delta.kernel - 1, delta.channels), None), state]


def _closed(config: DecoderConfig) -> bool:
    return fused_kernels() if config.closed is None else config.closed


class DeltaNet(nn.Module):
    """The mixer of one layer; its projections are one after `fuse`, or two."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        delta = config.delta
        assert delta is not None, "a recurrent layer has a configuration"
        self._delta = delta
        self._closed = _closed(config)
        self.rule: forms.Rule | None = None  # another than the forms' own
        sizes = (delta.channels, delta.values, delta.value_heads, delta.value_heads)
        self._sizes = dict(zip(_PARTS, sizes, strict=True))
        for name, size in self._sizes.items():
            self[name] = nn.Linear(config.hidden_size, size, bias=False)
        self.taps = mx.zeros((delta.kernel, delta.channels))
        self.dt_bias = mx.ones((delta.value_heads,))
        self.A_log = mx.zeros((delta.value_heads,))
        self.norm = nn.RMSNorm(delta.value_size, config.norm_eps)
        self.out_proj = nn.Linear(delta.values, config.hidden_size, bias=False)

    def quicken(self, say: Callable[[str], None]) -> bool:
        """Take the kernel for a tree, if this machine was found to do well with it."""
        delta = self._delta
        sizes = (delta.key_heads, delta.value_heads, delta.key_size, delta.value_size)
        if self._closed and delta_kernel.pays(delta_kernel.Heads(*sizes), say):
            self.rule = delta_kernel.rule
        return self.rule is not None

    def fuse(self) -> None:
        """Join all projections, or where they are stored otherwise the large and the small ones."""
        for name, parts in _JOINED.items():
            if all(part in self for part in parts) and (both := fuse([self[p] for p in parts])):
                self[name] = both
                for part in parts:
                    del self[part]

    def _project(self, x: mx.array) -> list[mx.array]:
        """x (N, D) -> what the convolution reads, the output's gate, b and a, (N, *) each."""
        found = {name: self[name](x) for name in _PARTS if name in self}
        for name, parts in _JOINED.items():
            if name in self:
                ends = list(itertools.accumulate(self._sizes[part] for part in parts[:-1]))
                found |= zip(parts, mx.split(self[name](x), ends, axis=-1), strict=True)
        return [found[part] for part in _PARTS]

    def __call__(self, x: mx.array, run: LayerPass) -> mx.array:
        """x (N, D) -> (N, D)."""
        return self.out_proj(run.each(self._mixed, *self._project(x)))

    def _mixed(self, run: LayerPass, *projected: mx.array) -> mx.array:
        """What the projections gave (N, *) -> what is left of them after the recurrence
        (N, values); of a prompt's chunk N may be those of several sequences."""
        delta, memory = self._delta, run.memory
        state = memory.read(STATE)
        several = state.shape[0]
        mixed, gate, b, a = (part.reshape(several, -1, part.shape[-1]) for part in projected)
        n, seen = mixed.shape[1], None
        if several > 1:  # a row that sees nothing is padding
            seen = mx.any(run.mask, axis=-1).reshape(several, n)
            mixed = mx.where(seen[..., None], mixed, 0)
        read, lineage = memory.write(ROWS, mixed), memory.lineage
        if lineage is None:  # (B, K-1+n, C)
            rows = [read[:, i : i + n] for i in range(delta.kernel)]
        else:  # (N, K, C)
            rows = [x.transpose(1, 0, 2) for x in mx.split(read, delta.kernel, axis=1)]
        qk, v = self._heads(_convolved()(self.taps, *rows))
        left: mx.array | Tape
        rates, scale = (self.A_log, self.dt_bias), delta.key_size**-0.5
        if lineage is not None and self._closed:
            inputs = (qk.squeeze(0), v.squeeze(0), a.squeeze(0), b.squeeze(0))
            out, left = forms.closed_delta(inputs, rates, state, lineage, scale, self.rule)
            out = out[None].astype(mixed.dtype)
        else:
            q, k = (part.squeeze(2) for part in mx.split(qk, 2, axis=2))
            values = (scale**2 * q, scale * k, v, a, b)
            out, left = forms.gated_delta(
                gated_delta_update, values, rates, state, lineage, self._closed, mask=seen
            )
        memory.write(STATE, left)
        out = precise_swiglu(out, gate.reshape(out.shape), self.norm(out))
        return out.reshape(several * n, -1)

    def _heads(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x (B, n, C) -> normed queries and keys (B, n, 2, Hk, Dk), and values (B, n, Hv, Dv)."""
        delta = self._delta
        qk, v = mx.split(x, [2 * delta.keys], axis=-1)
        qk = qk.reshape(*x.shape[:2], 2, delta.key_heads, delta.key_size)
        v = v.reshape(*x.shape[:2], delta.value_heads, delta.value_size)
        return mx.fast.rms_norm(qk, None, _EPS / delta.key_size), v


@functools.cache
def _convolved() -> Callable[..., mx.array]:
    """A short convolution of every channel alone, in float32, and its activation; one kernel.

    The same order of sums for a chunk as for a tree.
    """

    def convolved(taps: mx.array, *rows: mx.array) -> mx.array:
        """taps (K, C), K rows (B, n, C), a token's own last -> (B, n, C)."""
        terms = (row.astype(mx.float32) * taps[i : i + 1] for i, row in enumerate(rows))
        return nn.silu(functools.reduce(mx.add, terms).astype(rows[0].dtype))

    return mx.compile(convolved)
