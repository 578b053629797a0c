"""The one decoder: N tokens with their own positions and an explicit mask, over KV slabs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from mlx_redrafter.cache.layer import LayerCache, Pass
from mlx_redrafter.cache.slabs import Slab

from .attention import Attend, dense
from .config import DecoderConfig
from .fuse import fuse
from .rope import Rope, Rotation

Activation = Callable[[mx.array, mx.array], mx.array]
LayerWrite = Callable[[mx.array], mx.array]
Rotate = Callable[[mx.array, int], mx.array]


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """Gemma's gated activation, as mlx-lm computes it."""
    return nn.gelu_approx(gate) * up


class Functions(NamedTuple):
    """What a pass computes with: how a layer attends, and the gated activation (None: the
    family's own)."""

    attend: Callable[[int], Attend] = dense
    activation: Activation | None = None


DECODING = Functions()


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
        self._qk_norm = config.qk_norm
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self._splits = [q_size, q_size + kv_size]
        if config.stored_fused:
            self.qkv_proj: nn.Module = nn.Linear(dim, q_size + 2 * kv_size, bias=config.qkv_bias)
        else:
            self.q_proj = nn.Linear(dim, q_size, bias=config.qkv_bias)
            self.k_proj = nn.Linear(dim, kv_size, bias=config.qkv_bias)
            self.v_proj = nn.Linear(dim, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, dim, bias=config.output_bias)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = nn.RMSNorm(q_size if full else head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(kv_size if full else head_dim, config.norm_eps)

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
        return mx.concatenate([q, k, v], axis=1)

    def __call__(
        self, x: mx.array, mask: mx.array, rotate: Rotate, write: LayerWrite, attend: Attend
    ) -> mx.array:
        """x (N, D) -> (N, D)."""
        rows = rotate(self._project(x), self._heads + self._kv_heads)  # (H + 2 Hkv, N, Dh)
        slab = write(rows[self._heads :][None])
        attended = attend(rows[: self._heads], slab, mask, self._scale, self._softcap)
        return self.o_proj(attended)


class MLP(nn.Module):
    """Gated feed-forward layer; gate and up are one projection after `fuse`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        dim, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.stored_fused:
            self.gate_up_proj: nn.Module = nn.Linear(dim, 2 * inner, bias=bias)
        else:
            self.gate_proj = nn.Linear(dim, inner, bias=bias)
            self.up_proj = nn.Linear(dim, inner, bias=bias)
        self.down_proj = nn.Linear(inner, dim, bias=bias)
        self._activation = swiglu if config.activation == "silu" else geglu

    def fuse(self) -> None:
        """Join the stored gate and up projections, where they can be joined."""
        if "gate_up_proj" in self:
            return
        joined = fuse([self.gate_proj, self.up_proj])
        if joined is not None:
            self.gate_up_proj = joined
            del self.gate_proj, self.up_proj

    def __call__(self, x: mx.array, activation: Activation | None = None) -> mx.array:
        """(N, D) -> (N, D)."""
        if "gate_up_proj" in self:
            gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((activation or self._activation)(gate, up))


class Block(nn.Module):
    """Attention and feed-forward layer with the family's norms around them."""

    def __init__(self, config: DecoderConfig):
        super().__init__()

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.hidden_size, config.norm_eps)

        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self._norms = config.norms
        self._residual_scale, self._clip = config.residual_scale, config.clip_residual
        self.post_attention_layernorm = norm()
        if config.norms != "post":
            self.input_layernorm = norm()
        if config.norms == "both":
            self.pre_feedforward_layernorm = norm()
        if config.norms != "pre":
            self.post_feedforward_layernorm = norm()

    def _add(self, x: mx.array, r: mx.array) -> mx.array:
        if self._residual_scale != 1.0:
            r = r * self._residual_scale
        if self._clip and x.dtype == mx.float16:
            bound = mx.finfo(mx.float16).max
            total = x.astype(mx.float32) + r.astype(mx.float32)
            return mx.clip(total, -bound, bound).astype(mx.float16)
        return x + r

    def __call__(
        self,
        x: mx.array,
        mask: mx.array,
        rotate: Rotate,
        write: LayerWrite,
        attend: Attend,
        activation: Activation | None = None,
    ) -> mx.array:
        """x (N, D) -> (N, D)."""
        inputs = x if self._norms == "post" else self.input_layernorm(x)
        r = self.self_attn(inputs, mask, rotate, write, attend)
        # The same checkpoint name is the norm after attention, or (Llama) before the MLP.
        h = self._add(x, r if self._norms == "pre" else self.post_attention_layernorm(r))
        if self._norms == "pre":
            return self._add(h, self.mlp(self.post_attention_layernorm(h), activation))
        inputs = h if self._norms == "post" else self.pre_feedforward_layernorm(h)
        return self._add(h, self.post_feedforward_layernorm(self.mlp(inputs, activation)))


class Backbone(nn.Module):
    """Embedding, blocks and final norm: the part whose checkpoint names start with `model.`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """A target model for tree verification.

    One call runs N tokens, each with its own position and its own row of the mask, against the
    layers' caches: a prompt chunk, a single token and a draft tree are the same call. All of
    it can be traced by mx.compile.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._ropes = [Rope(rope) for rope in config.ropes]
        self._caches = [Slab(2 * config.num_kv_heads, config.head_dim)] * config.num_layers

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the activations."""
        return self.model.norm.weight.dtype

    @property
    def caches(self) -> Sequence[LayerCache]:
        """What each layer remembers."""
        return self._caches

    def __call__(
        self,
        tokens: mx.array,
        positions: mx.array,
        mask: mx.array,
        key_positions: mx.array,
        caches: Pass,
        layers: Sequence[int] = (),
        functions: Functions = DECODING,
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        """Run N tokens.

        tokens (N,), positions (N,) int32; mask (N, C) bool, True where a token may attend (prefix,
        ancestors and itself); key_positions (C,) int32, the position of the token in every slot
        (only sliding windows read it); caches: what the layers remember, which has it with N more
        nodes afterwards; layers: indices of blocks whose output is wanted too.

        Returns hidden (N, D) after the final norm, and the wanted outputs (N, D).
        """
        x = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        rotations = [rope.prepare(positions, x.dtype) for rope in self._ropes]
        masks = self._masks(mask, positions, key_positions)
        outputs = []
        for index, block in enumerate(self.model.layers):
            rotate = self._rotate(self.config.layer_ropes[index], rotations)
            window_mask = masks[self.config.layer_windows[index]]
            write = functools.partial(caches.extend, index, self._caches[index])
            attend = functions.attend(index)
            x = block(x, window_mask, rotate, write, attend, functions.activation)
            outputs.append(x)
        return self.model.norm(x), tuple(outputs[i] for i in layers)

    def _masks(
        self, mask: mx.array, positions: mx.array, key_positions: mx.array
    ) -> dict[int, mx.array]:
        """One mask (N, C) per distinct sliding window."""
        masks = {0: mask}
        for window in set(self.config.layer_windows) - {0}:
            masks[window] = mask & (positions[:, None] < key_positions + window)
        return masks

    def _rotate(self, index: int, rotations: Sequence[Rotation]) -> Rotate:
        if index < 0:
            return lambda x, _: x.transpose(1, 0, 2)
        rope, rotation = self._ropes[index], rotations[index]
        return lambda x, heads: rope(x, heads, rotation)

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (M, D) after the final norm -> logits (M, V), scaled and soft-capped."""
        if self.config.tied:
            out = self.model.embed_tokens.as_linear(hidden)
        else:
            out = self.lm_head(hidden)
        return self.scaled(out)

    def scaled(self, out: mx.array) -> mx.array:
        """Products with output rows (M, *) -> logits, scaled and soft-capped."""
        if self.config.logits_divisor != 1.0:
            out = out / self.config.logits_divisor
        if self.config.logits_softcap:
            cap = self.config.logits_softcap
            out = mx.tanh(out / cap) * cap
        return out

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens (...,) -> rows of the input embedding (..., D), without the embedding scale."""
        return self.model.embed_tokens(tokens).astype(self.dtype)

    def head_rows(self, ids: mx.array) -> mx.array:
        """ids (K,) -> rows (K, D) of the output head or tied embedding, dequantised."""
        head = self.model.embed_tokens if self.config.tied else self.lm_head
        rows = head.weight[ids]
        if isinstance(head, nn.QuantizedLinear | nn.QuantizedEmbedding):
            biases = head.get("biases")
            rows = mx.dequantize(
                rows,
                scales=head.scales[ids],
                biases=None if biases is None else biases[ids],
                group_size=head.group_size,
                bits=head.bits,
                mode=head.mode,
            )
        return rows.astype(self.dtype)
