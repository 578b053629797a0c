"""The parts of a block: norms, attention and feed-forward layer, as a DecoderConfig says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu, swiglu_oai

from mlx_redrafter.cache.layer import Kept, LayerCache, Pass
from mlx_redrafter.cache.lineage import Lineage
from mlx_redrafter.cache.packed import Seen

from .attention import Attend, attend
from .config import DecoderConfig
from .fuse import fuse
from .stacked import StackPass

Activation = Callable[[mx.array, mx.array], mx.array]
LayerWrite = Callable[[mx.array], Seen]
Rotate = Callable[[mx.array, int], mx.array]
Routed = Callable[[mx.array], None]
Total = Callable[[mx.array], mx.array]


class Memory(NamedTuple):
    """What one layer remembers, by slot, while a pass is run."""

    caches: Pass
    kinds: Sequence[LayerCache]
    first: int

    @property
    def lineage(self) -> Lineage | None:
        """Whom the nodes go on from; None: a chunk of a prompt."""
        return self.caches.lineage

    def read(self, slot: int) -> Kept:
        """As it is before this pass."""
        return self.caches.settled(self.first + slot, self.kinds[self.first + slot])

    def write(self, slot: int, rows: Any) -> Any:
        """Add what this pass brings: what the layer reads."""
        return self.caches.extend(self.first + slot, self.kinds[self.first + slot], rows)


class LayerPass(NamedTuple):
    """What one pass over N tokens hands to one layer.

    memory: what it keeps; mask (N, S); rotate: (N, A, Dh) -> (A, N, Dh), of which so many are
    rotated; write: adds rows to the layer's cache and gives what the layer reads; attend: over
    that; activation: another than the family's own; growth (N, 1): of the queries, where they grow
    with the position; given (N, *): this layer's own input, where layers have one; routed: told of
    the experts (N, K) that it chooses; sequences: those of several, whose rows lie one behind the
    other: `each` goes over them; stack: of several whose slabs are one, all else by place and node.
    """

    memory: Memory
    mask: mx.array
    rotate: Rotate
    write: LayerWrite
    attend: Attend
    activation: Activation | None = None
    growth: mx.array | None = None
    given: mx.array | None = None
    routed: Routed | None = None
    sequences: tuple[LayerPass, ...] = ()
    stack: StackPass | None = None

    @property
    def rows(self) -> int:
        """Of the pass."""
        return self.mask.shape[0] if self.stack is None else self.stack.rows

    def each(
        self, f: Callable[..., mx.array], *rows: mx.array, axes: Sequence[int] | None = None
    ) -> mx.array:
        """f(pass, *rows) -> (N, *) of every sequence by itself, one behind the other. Nodes lie
        along these axes of the rows, the first if not told otherwise."""
        axes = axes or [0] * len(rows)
        if self.stack is not None and not self.sequences:
            rows = tuple(map(self.stack.gathered, rows, axes))
            return self.stack.scattered(f(self, *rows))
        if not self.sequences:
            return f(self, *rows)
        ends = list(itertools.accumulate(run.rows for run in self.sequences[:-1]))
        parts = [mx.split(x, ends, axis=axis) for x, axis in zip(rows, axes, strict=True)]
        found = [
            run.each(f, *own, axes=axes) for run, *own in zip(self.sequences, *parts, strict=True)
        ]
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=0)


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
        self._config = config
        dim, head_dim, bias = config.hidden_size, config.head_dim, config.qkv_bias
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        own = config.kv_source is None
        self._kv_heads = config.num_kv_heads if own else 0
        self._parts: tuple[str, ...] = ("q", "k", "v") if own else ("q",)
        if config.values_are_keys:
            self._parts = self._parts[:2]
        self._splits = [q_size, q_size + kv_size][: len(self._parts) - 1]
        if config.stored_fused:
            self.qkv_proj: nn.Module = nn.Linear(dim, q_size + 2 * kv_size, bias=bias)
        else:
            for part in self._parts:
                size = q_size if part == "q" else kv_size
                self[f"{part}_proj"] = nn.Linear(dim, size, bias=bias)
        self.o_proj = nn.Linear(q_size, dim, bias=config.output_bias)
        if config.qk_norm in ("head", "full"):
            full = config.qk_norm == "full"
            self.q_norm = nn.RMSNorm(q_size if full else head_dim, config.norm_eps)
            if own:
                self.k_norm = nn.RMSNorm(kv_size if full else head_dim, config.norm_eps)
        if config.output_gate:
            self.gate_proj = nn.Linear(dim, q_size, bias=bias)
        if config.sinks:
            self.sinks = mx.zeros((config.num_heads,))

    def fuse(self) -> None:
        """Join the stored q, k, v and gate projections into one, where they can be joined."""
        names = [f"{part}_proj" for part in self._parts]
        for those in ([*names, "gate_proj"], names):
            if all(name in self for name in those) and (joined := fuse([self[n] for n in those])):
                self.qkv_proj = joined
                for name in those:
                    del self[name]

    def _project(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """x (N, D) -> queries, keys and values together (N, H + 2 Hkv, Dh), and the output's gate
        (N, H*Dh) where there is one."""
        config, n = self._config, x.shape[0]
        changed = config.qk_norm != "none" or config.value_norm or config.query_scale != 1.0
        gate = self.gate_proj(x) if "gate_proj" in self else None
        joined = self.qkv_proj(x) if "qkv_proj" in self else None
        if joined is not None and config.output_gate and gate is None:
            size = config.num_heads * config.head_dim
            joined, gate = mx.split(joined, [joined.shape[-1] - size], axis=-1)
        if joined is not None and len(self._parts) == 3 and not changed:
            return joined.reshape(n, -1, config.head_dim), gate
        if joined is not None:
            parts = list(mx.split(joined, self._splits, axis=-1))
        else:
            parts = [self[f"{part}_proj"](x) for part in self._parts]
        if config.qk_norm == "full":
            parts = [self.q_norm(parts[0]), self.k_norm(parts[1]), *parts[2:]]
        heads = [part.reshape(n, -1, config.head_dim) for part in parts]
        if config.values_are_keys and self._kv_heads:
            heads.append(heads[1])
        normed = self._normed(heads)
        return (normed[0] if len(normed) == 1 else mx.concatenate(normed, axis=1)), gate

    def _normed(self, heads: list[mx.array]) -> list[mx.array]:
        """Queries, and keys and values if they are the layer's own, by head (N, *, Dh)."""
        config = self._config
        if config.qk_norm == "head":
            norms = [self.q_norm] if len(heads) == 1 else [self.q_norm, self.k_norm]
            heads = [*(f(x) for f, x in zip(norms, heads, strict=False)), *heads[2:]]
        elif config.qk_norm == "unit":
            heads = [*(mx.fast.rms_norm(x, None, config.norm_eps) for x in heads[:2]), *heads[2:]]
        if config.value_norm:
            heads = [*heads[:2], *(mx.fast.rms_norm(x, None, config.norm_eps) for x in heads[2:])]
        if config.query_scale != 1.0:
            heads = [heads[0] * config.query_scale, *heads[1:]]
        return heads

    def __call__(self, x: mx.array, run: LayerPass) -> mx.array:
        """x (N, D) -> (N, D)."""
        projected, gate = self._project(x)
        rows = run.rotate(projected, self._config.num_heads + self._kv_heads)
        out = run.each(self._mixed, rows, axes=(1,))
        if gate is not None:
            out = out * mx.sigmoid(gate)
        return self.o_proj(out)

    def _mixed(self, run: LayerPass, rows: mx.array) -> mx.array:
        """rows (H + 2 Hkv, N, Dh): queries, and what is kept -> what they attend to (N, H*Dh)."""
        config, count = self._config, self._config.num_heads
        slab = run.write(rows[count:][None])
        q = rows[:count]
        if run.growth is not None:
            q = q * run.growth
        scale, softcap = config.attention_scale, config.attention_softcap
        if "sinks" in self:
            # Whoever replaces the attention of other layers does not know of sinks.
            return attend(q, slab, run.mask, scale, softcap, sinks=self.sinks)
        return run.attend(q, slab, run.mask, scale, softcap)


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
