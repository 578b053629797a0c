"""What Gemma 4 has beside other decoders: inputs of single layers, experts beside a dense layer."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .config import DecoderConfig
from .experts import Experts
from .layers import LayerPass, Total


class LayerInputs(nn.Module):
    """What all layers are given of the tokens besides the stream."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        size, width = config.layer_input, config.layer_input * config.num_layers
        self._size, self._root = size, config.hidden_size**-0.5
        self.embedding = nn.Embedding(config.layer_input_vocab, width)
        self.projection = nn.Linear(config.hidden_size, width, bias=False)
        self.norm = nn.RMSNorm(size, config.norm_eps)

    def __call__(self, tokens: mx.array, x: mx.array) -> mx.array:
        """tokens (N,) and their scaled embeddings x (N, D) -> (N, layers, size)."""
        own = self.embedding(tokens).astype(x.dtype) * self._size**0.5
        projected = self.projection(x) * self._root
        shape = (x.shape[0], -1, self._size)
        return (self.norm(projected.reshape(shape)) + own.reshape(shape)) * 2.0**-0.5


class LayerInput(nn.Module):
    """A layer's own input, added behind its feed-forward part."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.layer_input, bias=False)
        self.projection = nn.Linear(config.layer_input, config.hidden_size, bias=False)
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def __call__(self, x: mx.array, given: mx.array) -> mx.array:
        """x (N, D), given (N, size) -> what is added to x."""
        return self.norm(self.projection(nn.gelu_approx(self.gate(x)) * given))


class Beside(Experts):
    """Experts beside a dense layer: both with norms of their own, the router with its scales."""

    def __init__(self, config: DecoderConfig, total: Total = lambda x: x):
        super().__init__(config)
        self._total = total
        size = config.hidden_size
        self._eps, self._root = config.norm_eps, size**-0.5
        self.scale = mx.ones((size,))
        self.expert_scale = mx.ones((self._config.count,))
        self.norm = nn.RMSNorm(size, config.norm_eps)
        self.norm_dense = nn.RMSNorm(size, config.norm_eps)
        self.norm_experts = nn.RMSNorm(size, config.norm_eps)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Of the layer's input, which has its own scale here."""
        chosen, weights = super().route(mx.fast.rms_norm(x, self.scale * self._root, self._eps))
        return chosen, weights * self.expert_scale[chosen]

    def join(self, x: mx.array, dense: mx.array, run: LayerPass) -> mx.array:
        """The layer's input x (N, D), and what its dense layer made of it (N, D) -> (N, D)."""
        chosen, weights = self.route(x)
        if run.routed is not None:
            run.routed(chosen)
        mixed = self._total(self.mixed(self.norm(x), chosen, weights, run.activation))
        return self.norm_dense(dense) + self.norm_experts(mixed)
