"""The parts of a block: norms, attention and feed-forward layer, as a DecoderConfig says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu, swiglu_oai

from . import attention
from .attention import Attend
from .config import DecoderConfig
from .fuse import fuse

Activation = Callable[[mx.array, mx.array], mx.array]
LayerWrite = Callable[[mx.array], mx.array]
Rotate = Callable[[mx.array, int], mx.array]


class LayerPass(NamedTuple):
    """What one pass over N tokens hands to one layer.

    mask (N, S); rotate: (N, A, Dh) -> (A, N, Dh), of which so many are rotated; write: adds rows to
    the layer's cache and gives what the layer reads; attend: over that; activation: another than
    the family's own; growth (N, 1): of the queries, where they grow with the position.
    """

    mask: mx.array
    rotate: Rotate
    write: LayerWrite
    attend: Attend
    activation: Activation | None = None
    growth: mx.array | None = None


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """Gemma's gated activation, as mlx-lm computes it."""
    return nn.gelu_approx(gate) * up


GATED: dict[str, Activation] = {"silu": swiglu, "gelu_approx": geglu, "swiglu_oai": swiglu_oai}
UNGATED: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_approx": nn.gelu_approx,
    "relu2": nn.relu2,
}


def norm(config: DecoderConfig, eps: float | None = None) -> nn.Module:
    """A norm over the hidden states, of the family's kind."""
    eps = config.norm_eps if eps is None else eps
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, eps, bias=config.norm_bias)
    return nn.RMSNorm(config.hidden_size, eps)


class Attention(nn.Module):
    """Grouped-query attention of one layer; q, k and v are one projection after `fuse`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        dim, head_dim = config.hidden_size, config.head_dim
        self._heads, self._kv_heads, self._head_dim = (
            config.num_heads,
            config.num_kv_heads,
            head_dim,
        )
        self._scale, self._softcap = config.attention_scale, config.attention_softcap
        self._qk_norm, self._eps = config.qk_norm, config.norm_eps
        self._query_scale = config.query_scale
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self._splits = [q_size, q_size + kv_size]
        if config.stored_fused:
            self.qkv_proj: nn.Module = nn.Linear(dim, q_size + 2 * kv_size, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(dim, q_size, bias=config.qkv_bias)
            self.k_proj = nn.Linear(dim, kv_size, bias=config.qkv_bias)
            self.v_proj = nn.Linear(dim, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, dim, bias=config.output_bias)
        if config.qk_norm in ("head", "full"):
            full = config.qk_norm == "full"
            self.q_norm = nn.RMSNorm(q_size if full else head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(kv_size if full else head_dim, config.norm_eps)
        if config.output_gate:
            self.gate_proj = nn.Linear(dim, q_size, bias=False)
        if config.sinks:
            self.sinks = mx.zeros((config.num_heads,))

    def fuse(self) -> None:
        """Join the stored q, k and v projections into one, where they can be joined."""
        if "qkv_proj" in self:
            return
        joined = fuse([self.q_proj, self.k_proj, self.v_proj])
        if joined is not None:
            self.qkv_proj = joined
            del self.q_proj, self.k_proj, self.v_proj

    def _project(self, x: mx.array) -> mx.array:
        """x (N, D) -> queries, keys and values together (N, H + 2 Hkv, Dh)."""
        n = x.shape[0]
        if self._qk_norm == "none" and "qkv_proj" in self:
            return self.qkv_proj(x).reshape(n, -1, self._head_dim)
        if "qkv_proj" in self:
            q, k, v = mx.split(self.qkv_proj(x), self._splits, axis=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self._qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(n, self._heads, -1)
        k, v = k.reshape(n, self._kv_heads, -1), v.reshape(n, self._kv_heads, -1)
        if self._qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self._qk_norm == "unit":
            q, k = mx.fast.rms_norm(q, None, self._eps), mx.fast.rms_norm(k, None, self._eps)
        if self._query_scale != 1.0:
            q = q * self._query_scale
        return mx.concatenate([q, k, v], axis=1)

    def __call__(self, x: mx.array, run: LayerPass) -> mx.array:
        """x (N, D) -> (N, D)."""
        rows = run.rotate(self._project(x), self._heads + self._kv_heads)  # (H + 2 Hkv, N, Dh)
        slab = run.write(rows[self._heads :][None])
        q = rows[: self._heads]
        if run.growth is not None:
            q = q * run.growth
        if "sinks" in self:
            # Whoever replaces the attention of other layers does not know of sinks.
            out = attention.attend(
                q, slab, run.mask, self._scale, self._softcap, sinks=self.sinks
            )  # fmt: skip
        else:
            out = run.attend(q, slab, run.mask, self._scale, self._softcap)
        if "gate_proj" in self:
            out = out * mx.sigmoid(self.gate_proj(x))
        return self.o_proj(out)


class MLP(nn.Module):
    """Feed-forward layer; where it is gated, gate and up are one projection after `fuse`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        dim, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self._gated = config.gated
        if not config.gated:
            self._single = UNGATED[config.activation]
            self.up_proj = nn.Linear(dim, inner, bias=bias)
        elif config.stored_fused or config.stored_gate_up:
            self.gate_up_proj: nn.Module = nn.Linear(dim, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(dim, inner, bias=bias)
            self.up_proj = nn.Linear(dim, inner, bias=bias)
        self.down_proj = nn.Linear(inner, dim, bias=bias)
        if config.gated:
            self._activation = GATED[config.activation]

    def fuse(self) -> None:
        """Join the stored gate and up projections, where they can be joined."""
        if "gate_proj" not in self:
            return
        joined = fuse([self.gate_proj, self.up_proj])
        if joined is not None:
            self.gate_up_proj = joined
            del self.gate_proj, self.up_proj

    def __call__(self, x: mx.array, activation: Activation | None = None) -> mx.array:
        """(N, D) -> (N, D)."""
        if not self._gated:
            return self.down_proj(self._single(self.up_proj(x)))
        if "gate_up_proj" in self:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((activation or self._activation)(gate, up))
