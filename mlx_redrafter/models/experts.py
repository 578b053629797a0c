"""A feed-forward layer of experts: a router chooses a few for every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .config import DecoderConfig, ExpertsConfig
from .layers import GATED, MLP, Activation, Routed

MOST_NODES = 64
"""Rows up to which every pair of a row and an expert is computed alone, as for one row: draft trees
that pay have no more. Of a longer pass the pairs are sorted by expert, as mlx-lm does from 64 pairs
on; kernels for sorted pairs may round otherwise."""
_SORTED_PAIRS = 64


class Stacked(nn.Module):
    """The gated feed-forward layers of all experts, one array (E, out, in) a projection; gate and
    up are one after `fuse`. Checkpoints have them as mlx_lm's SwitchGLU."""

    def __init__(self, config: DecoderConfig, experts: ExpertsConfig):
        super().__init__()
        dim, size, count, bias = config.hidden_size, experts.size, experts.count, experts.biases
        self.gate_proj: nn.Module = SwitchLinear(dim, size, count, bias=bias)
        self.up_proj: nn.Module = SwitchLinear(dim, size, count, bias=bias)
        self.down_proj = SwitchLinear(size, dim, count, bias=bias)
        self._activation = GATED[config.activation]

    def fuse(self) -> None:
        """Join gate and up, where they are stored alike."""
        if "gate_proj" not in self or not _alike(self.gate_proj, self.up_proj):
            return
        joined, second = self.gate_proj, self.up_proj.parameters()
        for name, value in joined.parameters().items():
            joined[name] = mx.concatenate([value, second[name]], axis=1)
        self.gate_up_proj = joined
        del self.gate_proj, self.up_proj

    def __call__(
        self, x: mx.array, chosen: mx.array, activation: Activation | None = None
    ) -> mx.array:
        """x (N, D), chosen (N, K) -> (N, K, D)."""
        n, k = chosen.shape
        in_order = n > MOST_NODES and n * k >= _SORTED_PAIRS
        rows, experts = x[:, None, None], chosen  # (N, 1, 1, D)
        if in_order:
            order = mx.argsort(chosen.flatten())
            rows, experts = x[order // k][:, None], chosen.flatten()[order]  # (N*K, 1, D)
        if "gate_up_proj" in self:
            gate, up = mx.split(self.gate_up_proj(rows, experts, in_order), 2, axis=-1)
        else:
            gate = self.gate_proj(rows, experts, in_order)
            up = self.up_proj(rows, experts, in_order)
        inner = (activation or self._activation)(gate, up)
        out = self.down_proj(inner, experts, in_order)
        if in_order:
            out = out[mx.argsort(order)]
        return out.reshape(n, k, -1)


class Experts(nn.Module):
    """Experts, the router that chooses among them, and the one that all tokens take."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        experts = config.experts
        assert experts is not None, "a layer of experts has a configuration of them"
        self._config = experts
        self.gate = nn.Linear(config.hidden_size, experts.count, bias=experts.biases)
        if experts.scores == "sigmoid":
            self.e_score_correction_bias = mx.zeros((experts.count,))
        self.switch_mlp = Stacked(config, experts)
        if experts.shared:
            self.shared_experts = MLP(replace(config, intermediate_size=experts.shared))
        if experts.shared_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def fuse(self) -> None:
        """Join gate and up projections, where they can be joined."""
        self.switch_mlp.fuse()
        if "shared_experts" in self:
            self.shared_experts.fuse()

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x (N, D) -> the experts of every token and their weights, (N, K) each.

        Rows are chosen for alone, in mlx-lm's order: that of the sum over the experts.
        """
        config, k = self._config, self._config.chosen
        logits = self.gate(x.astype(mx.float32) if config.precise else x)
        scores = ranked = logits
        if config.scores == "softmax":
            scores = ranked = mx.softmax(logits, axis=-1, precise=True)
        elif config.scores == "sigmoid":
            scores = mx.sigmoid(logits.astype(mx.float32))
            ranked = self._in_groups(scores + self.e_score_correction_bias)
        if config.from_top:
            chosen = mx.argpartition(ranked, kth=-k, axis=-1)[..., -k:]
        else:
            chosen = mx.argpartition(-ranked, kth=k - 1, axis=-1)[..., :k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        if config.scores == "chosen":
            weights = mx.softmax(weights, axis=-1, precise=True)
        elif config.normalise and k > 1:
            weights = weights / (mx.sum(weights, axis=-1, keepdims=True) + config.epsilon)
        if config.scale != 1.0:
            weights = weights * config.scale
        return chosen, weights.astype(x.dtype) if config.precise else weights

    def _in_groups(self, ranked: mx.array) -> mx.array:
        """Scores (N, E), 0 outside the groups whose two best have the largest sum."""
        groups = self._config.groups
        if groups == 1:
            return ranked
        by_group = mx.unflatten(ranked, axis=-1, shape=(groups, -1))
        best = mx.topk(by_group, 2, axis=-1).sum(axis=-1, keepdims=True)  # (N, G, 1)
        out = groups - self._config.kept_groups
        worst = mx.argpartition(best, kth=out - 1, axis=-2)[..., :out, :]
        return mx.flatten(mx.put_along_axis(by_group, worst, mx.array(0.0), axis=-2), -2, -1)

    def mixed(
        self, x: mx.array, chosen: mx.array, weights: mx.array, activation: Activation | None
    ) -> mx.array:
        """What the chosen experts make of x (N, D), weighted: (N, D)."""
        out = self.switch_mlp(x, chosen, activation)
        return (out * weights[..., None]).sum(axis=-2).astype(out.dtype)

    def __call__(
        self, x: mx.array, activation: Activation | None = None, routed: Routed | None = None
    ) -> mx.array:
        """(N, D) -> (N, D)."""
        chosen, weights = self.route(x)
        if routed is not None:
            routed(chosen)
        out = self.mixed(x, chosen, weights, activation)
        if "shared_experts" not in self:
            return out
        shared = self.shared_experts(x, activation)
        if "shared_expert_gate" in self:
            shared = mx.sigmoid(self.shared_expert_gate(x)) * shared
        return out + shared


def distinct(chosen: Sequence[mx.array]) -> mx.array:
    """How many experts the rows of a pass have chosen, over all its layers: () int32.

    chosen: of every layer (..., N, K). A read of an expert's weights serves all rows that chose it.
    """
    layers = [layer.reshape(layer.shape[-2:]) for layer in chosen]  # (N, K)
    most = max(layer.shape[1] for layer in layers)
    rows = [x if x.shape[1] == most else _widened(x, most) for x in layers]
    found = mx.sort(mx.stack(rows).reshape(len(rows), -1), axis=-1)  # (layers, N*K)
    return len(rows) + mx.sum((found[:, 1:] != found[:, :-1]).astype(mx.int32))


def _widened(chosen: mx.array, columns: int) -> mx.array:
    """Experts (N, K), the last of a row over again: (N, columns)."""
    return mx.pad(chosen, [(0, 0), (0, columns - chosen.shape[1])], "edge")


def _alike(first: nn.Module, second: nn.Module) -> bool:
    if type(first) is not type(second):
        return False
    one, other = first.parameters(), second.parameters()
    if one.keys() != other.keys() or any(one[n].dtype != other[n].dtype for n in one):
        return False
    kinds = [(m.bits, m.group_size, m.mode) for m in (first, second) if _packed(m)]
    return not kinds or kinds[0] == kinds[1]


def _packed(module: nn.Module) -> bool:
    return isinstance(module, QuantizedSwitchLinear)
