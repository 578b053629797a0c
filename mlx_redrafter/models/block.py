"""One layer of a decoder: attention and a feed-forward part, each with what surrounds it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .config import DecoderConfig
from .delta import DeltaNet
from .experts import Experts
from .gemma4 import Beside, LayerInput
from .latent import LatentAttention
from .layers import MLP, Attention, LayerPass, Total, norm


class Block(nn.Module):
    """Attention and feed-forward layer with the family's norms around them.

    total: makes one of the parts of a sum that several machines compute, see `Share.total`.
    """

    def __init__(self, config: DecoderConfig, total: Total = lambda x: x):
        super().__init__()
        self._total = total
        self._mixer = "linear_attn" if config.delta is not None else "self_attn"
        self[self._mixer] = _mixer(config)
        dense = config.experts is None or config.experts_beside
        self.mlp = MLP(config) if dense else Experts(config)
        if config.experts is not None and config.experts_beside:
            self.beside = Beside(config, total)
        if config.layer_input:
            self.layer_input = LayerInput(config)
        if config.layer_scalar:
            self.layer_scalar = mx.ones((1,))
        self._norms = config.norms
        self._residual_scale, self._clip = config.residual_scale, config.clip_residual
        behind = config.norms in ("post", "both")
        after = config.post_norm_eps if behind else None
        if config.norms != "parallel":
            self.post_attention_layernorm = norm(config, after)
        if config.norms != "post":
            self.input_layernorm = norm(config)
        if config.norms == "both":
            self.pre_feedforward_layernorm = norm(config)
        if behind:
            self.post_feedforward_layernorm = norm(config, after)

    def _add(self, x: mx.array, r: mx.array) -> mx.array:
        if self._residual_scale != 1.0:
            r = r * self._residual_scale
        if self._clip and x.dtype == mx.float16:
            bound = mx.finfo(mx.float16).max
            total = x.astype(mx.float32) + r.astype(mx.float32)
            return mx.clip(total, -bound, bound).astype(mx.float16)
        return x + r

    def _fed(self, x: mx.array, run: LayerPass) -> mx.array:
        """The feed-forward part, x (N, D) -> (N, D)."""
        more = (run.routed,) if "switch_mlp" in self.mlp else ()
        return self.mlp(x, run.activation, *more)

    def __call__(self, x: mx.array, run: LayerPass) -> mx.array:
        """x (N, D) -> (N, D)."""
        inputs = x if self._norms == "post" else self.input_layernorm(x)
        r = self[self._mixer](inputs, run)
        if self._norms == "parallel":
            return self._add(x, self._total(r + self._fed(inputs, run)))
        r = self._total(r)
        # The same checkpoint name is the norm after attention, or (Llama) before the MLP.
        h = self._add(x, r if self._norms == "pre" else self.post_attention_layernorm(r))
        if self._norms == "pre":
            return self._add(h, self._total(self._fed(self.post_attention_layernorm(h), run)))
        inputs = h if self._norms == "post" else self.pre_feedforward_layernorm(h)
        r = self._total(self._fed(inputs, run))
        if "beside" in self:
            r = self.beside.join(h, r, run)
        h = self._add(h, self.post_feedforward_layernorm(r))
        if run.given is not None:
            h = h + self.layer_input(h, run.given)
        return h * self.layer_scalar if "layer_scalar" in self else h

    def fuse(self) -> None:
        """Join the projections that read the same input, where they can be joined."""
        self[self._mixer].fuse()
        self.mlp.fuse()
        if "beside" in self:
            self.beside.fuse()


def _mixer(config: DecoderConfig) -> nn.Module:
    """What mixes the tokens of a layer."""
    if config.delta is not None:
        return DeltaNet(config)
    return Attention(config) if config.latent is None else LatentAttention(config)
