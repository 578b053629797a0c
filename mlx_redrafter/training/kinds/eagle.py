"""EAGLE-3 heads (arXiv 2503.01840), trained on what they will see: their own outputs.

Draft step 0 at a position reads the target's features, step k the block's output of step k - 1
("training-time test"). The pairs that a query of step k attends to are those of inference: all true
ones up to the position where its draft begins, and its draft's own. Every layer's output is normed
before fc, so that features divided by their root mean square are as good as the outputs themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_redrafter.drafters import eagle_files, files
from mlx_redrafter.drafters.eagle import Eagle, EagleConfig
from mlx_redrafter.drafters.rollout import feature_layers
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import DecoderConfig, Target
from mlx_redrafter.models.config import RopeConfig
from mlx_redrafter.models.weights import parameters, shapes
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.differentiable import attention_weights, swiglu
from mlx_redrafter.training.kinds.trainee import (
    About,
    Trainee,
    context_layers,
    counted,
    drafted,
    first_rows,
)

_UNSEEN = -1e9  # added to scores
_BASE, _HEAD = 10_000.0, 64  # of the rotation and the size of a head, where the target says none


class EagleTrainee(Trainee):
    """An EAGLE-3 head while it is trained; its block is like one of the target's."""

    title, paper, whole = "EAGLE-3 head", "arXiv 2503.01840", True
    module: Eagle
    shape: EagleConfig

    @staticmethod
    def shape_of(config: TrainConfig, target: DecoderConfig) -> EagleConfig:
        layers = context_layers(config, target)
        if not layers:
            raise OptionError("kind eagle3 needs context_layers: use auto, or name layers")
        size = drafted(config, target)
        heads, kv_heads, head_dim = _heads(target)
        base = target.ropes[0].base if target.ropes else _BASE
        return EagleConfig(
            target.hidden_size, target.hidden_size, target.vocab_size, layers, heads, kv_heads,
            head_dim, target.intermediate_size, target.norm_eps,
            RopeConfig(head_dim, base, max_positions=target.max_positions),
            size or target.vocab_size, size, feature_norm="each",
        )  # fmt: skip

    @staticmethod
    def build(shape: EagleConfig) -> Eagle:
        return Eagle(shape)

    @staticmethod
    def layers_of(shape: EagleConfig, target: DecoderConfig) -> tuple[int, ...]:
        return feature_layers(target, shape.features)

    @staticmethod
    def row_floats(shape: EagleConfig) -> int:
        """The block's activations and their gradients; scores of a position, about."""
        heads = shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
        scores = 4 * shape.num_heads * 512
        return 2 * (8 * shape.hidden_size + 3 * shape.intermediate_size + heads) + scores

    @staticmethod
    def load(folder: Path, target: Target) -> Eagle:
        return eagle_files.load(folder, target)

    def read(self, folder: Path) -> Eagle:
        return eagle_files.LAYOUT.load(folder, self.target)

    @staticmethod
    def about(folder: Path) -> About:
        raw, weights = eagle_files.LAYOUT.weights(folder)
        shape = eagle_files.shape_of(raw, shapes(weights), folder)
        counts = counted(Eagle(shape))
        once = sum(n for name, n in counts.items() if name.startswith(("fc.", "fc_norm.")))
        stored = sum(counts.values())
        rows = [
            ["block", f"{shape.num_heads} heads, {shape.num_kv_heads} of keys and values, "
             f"feed-forward width {shape.intermediate_size}"],
            ["context", f"layers {', '.join(map(str, shape.features))}"],
            ["head", f"own output matrix, width {shape.hidden_size}"],
            ["draft vocabulary", f"{shape.rows:,} of {shape.vocab_size:,} tokens"],
        ]  # fmt: skip
        return About(rows, stored, once, stored - once)

    def begin(self, vocabulary: np.ndarray | None, sample: mx.array) -> None:
        if self.config.warm_start is not None:
            drafter, weights = self.warm()
            self.module = self.build(self.shape)
            if "draft_vocab" in drafter:
                self.module.draft_vocab = drafter.draft_vocab
            self.module.load_weights(list(weights.items()), strict=False)
        else:
            mx.random.seed(self.config.seed)
            self.module = self.build(self.shape)
            if vocabulary is not None:
                self.module.draft_vocab = mx.array(vocabulary, mx.int32)
            width = self.shape.hidden_size
            self.module.lm_head.weight = first_rows(self.target, vocabulary, width)
        self.module.set_dtype(mx.float32)
        mx.eval(self.module.parameters())

    @property
    def output(self) -> str:
        return "lm_head."

    def inputs(self, batch: Mapping[str, mx.array]) -> list[mx.array]:
        tokens, steps = batch["tokens"], self.config.rollout
        head, block, runs = self.module, self.module.midlayer, tokens.shape[0]
        length, before = tokens.shape[1] - steps, batch["before_tokens"].shape[1]
        embedded = self.target.embed(tokens[:, : length + steps - 1]).astype(mx.float32)
        residual, u, rows = self._pairs(batch, embedded[:, :length])
        seen = _seen(batch["before_seen"], length)
        own: list[mx.array] = []
        result: list[mx.array] = []
        for k in range(steps):
            positions = mx.tile(mx.arange(before + k, before + k + length), runs)
            if k:
                own.append(block.self_attn.rows(u, positions)[0])
            q = block.self_attn.queries(u, positions)
            y = residual + block.self_attn.o_proj(attended(q, rows, seen, own))
            out = y + block.mlp(block.post_attention_layernorm(y), swiglu)
            result.append(head.norm(out))
            if k + 1 < steps:
                following = embedded[:, k + 1 : k + 1 + length].reshape(out.shape)
                residual, u = head.pairs(following, out)
        return result

    def _pairs(
        self, batch: Mapping[str, mx.array], embedded: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The true pairs of the answers, (B * T, H) and (B * T, 2H), and keys and values of those
        before them too (2*Hkv, B, Q + T, Dh)."""
        runs, length, _ = embedded.shape
        before = self.target.embed(batch["before_tokens"]).astype(mx.float32)
        features = mx.concatenate([batch["before_features"], batch["features"][:, :length]], axis=1)
        count = features.shape[1]
        stored = self.layers_of(self.shape, self.target.config)
        if stored != self.shape.features:
            features = features[:, :, mx.array([stored.index(i) for i in self.shape.features])]
        f = self.module.mixed(features.astype(mx.float32).reshape(runs * count, -1))
        e = mx.concatenate([before, embedded], axis=1).reshape(runs * count, -1)
        pairs = self.module.pairs(e, f)
        rows = self.module.midlayer.self_attn.rows(pairs[1], mx.tile(mx.arange(count), runs))
        residual, u = (
            x.reshape(runs, count, -1)[:, -length:].reshape(runs * length, -1) for x in pairs
        )
        return residual, u, rows[0].reshape(rows.shape[1], runs, count, -1)

    def output_rows(self) -> mx.array:
        return self.module.lm_head.weight

    def finished(self) -> Eagle:
        head = self.build(self.shape)
        head.update(self.module.parameters())
        return head

    def save(self, folder: Path, module: nn.Module, extra: dict[str, Any]) -> None:
        assert isinstance(module, Eagle)
        files.save(folder, {**_stored(module.config), **extra}, parameters(module))


def _heads(target: DecoderConfig) -> tuple[int, int, int]:
    """Heads of queries, of keys, and their size: the target's; where it attends in a form that
    the block does not have, or not at all, what is usual for its width."""
    heads, kv_heads, size = target.num_heads, target.num_kv_heads, target.head_dim
    usual = heads % kv_heads == 0 and size % 2 == 0 and heads * size <= 4 * target.hidden_size
    if target.ropes or usual:
        return heads, kv_heads, size
    size = next(n for n in (_HEAD, 32, 16, 8, 4, 2) if target.hidden_size % n == 0)
    return target.hidden_size // size, target.hidden_size // size, size


def _stored(shape: EagleConfig) -> dict[str, Any]:
    """The config.json of what is written, as SpecForge's; the rest is said by the tensors."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "eagle3",
        "hidden_size": shape.hidden_size,
        "target_hidden_size": shape.target_size,
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.rows,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope.base,
        "max_position_embeddings": shape.rope.max_positions,
        "eagle_aux_hidden_state_layer_ids": list(shape.features),
        eagle_files.LAYERS_ARE: "outputs",
        "norm_before_residual": False,
        "fc_norm": True,
    }


def _seen(before: mx.array, length: int) -> mx.array:
    """What is added to scores of true pairs (B, 1, 1, T, Q + T): 0 for those that a position sees,
    its own among them."""
    runs, count = before.shape
    causal = mx.arange(length)[:, None] >= mx.arange(length)
    masks = [
        mx.broadcast_to(before[:, None], (runs, length, count)),
        mx.broadcast_to(causal[None], (runs, length, length)),
    ]
    seen = mx.concatenate(masks, axis=2)[:, None, None]
    return mx.where(seen, 0.0, _UNSEEN)


def attended(q: mx.array, rows: mx.array, seen: mx.array, own: list[mx.array]) -> mx.array:
    """What queries read of the true pairs, and each of the pairs of its own draft.

    Args:
        q: (H, B * T, Dh).
        rows: (2*Hkv, B, S, Dh), keys, then values.
        seen: (B, 1, 1, T, S), added to scores.
        own: (2*Hkv, B * T, Dh) per draft step before this.

    Returns:
        (B * T, H * Dh).
    """
    heads, _, size = q.shape
    pairs, runs, count, _ = rows.shape
    keys, length = pairs // 2, seen.shape[3]
    group = heads // keys
    q = q.reshape(keys, group, runs, length, size).transpose(2, 0, 1, 3, 4) * size**-0.5
    rows = rows.transpose(1, 0, 2, 3)  # (B, 2*Hkv, S, Dh)
    k, v = rows[:, :keys], rows[:, keys:]
    scores = q.reshape(runs, keys, group * length, size) @ k.swapaxes(2, 3)
    scores = scores.reshape(runs, keys, group, length, count) + seen
    mine = [x.reshape(2, keys, runs, 1, length, size).transpose(0, 2, 1, 3, 4, 5) for x in own]
    if mine:
        more = [mx.sum(q * x[0], axis=-1, keepdims=True) for x in mine]
        scores = mx.concatenate([scores, *more], axis=-1)
    weights = attention_weights(scores)
    true = weights[..., :count].reshape(runs, keys, group * length, count)
    result = (true @ v).reshape(runs, keys, group, length, size)
    for j, x in enumerate(mine):
        result = result + weights[..., count + j, None] * x[1]
    return result.transpose(0, 3, 1, 2, 4).reshape(runs * length, heads * size)
