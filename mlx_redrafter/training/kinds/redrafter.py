"""ReDrafter (arXiv 2403.09919), in normalised units.

Hidden states and embeddings of a target differ by orders of magnitude in size, and Adam moves all
weights by like amounts. So training sees both divided by their standard deviation; when a drafter
is written, the scales are folded into the weights that read them, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_redrafter.drafters.files import raw_config
from mlx_redrafter.drafters.loading import load_recurrent, save_drafter
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.drafters.rollout import contexts, feature_layers, final_hidden, head_inputs
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import DecoderConfig, Target
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.kinds.trainee import (
    About,
    Trainee,
    context_layers,
    counted,
    deviation,
    drafted,
    first_rows,
)


@dataclass(frozen=True)
class Scales:
    """What embeddings and contexts are divided by."""

    embedding: float
    context: float

    def inverse(self) -> Scales:
        return Scales(1 / self.embedding, 1 / self.context)


class ReDrafterTrainee(Trainee):
    """A ReDrafter while it is trained."""

    title, paper = "ReDrafter", "arXiv 2403.09919"
    module: ReDrafter
    shape: ReDrafterConfig
    scales: Scales

    @staticmethod
    def shape_of(config: TrainConfig, target: DecoderConfig) -> ReDrafterConfig:
        return drafter_config(config, target)

    @staticmethod
    def build(shape: ReDrafterConfig) -> ReDrafter:
        return ReDrafter(shape)

    @staticmethod
    def layers_of(shape: ReDrafterConfig, target: DecoderConfig) -> tuple[int, ...]:
        return feature_layers(target, shape.context_layers)

    @staticmethod
    def row_floats(shape: ReDrafterConfig) -> int:
        """Gates, states and blocks."""
        return 10 * shape.hidden_size + 4 * shape.exit_dim

    @staticmethod
    def load(folder: Path, target: Target) -> ReDrafter:
        return load_recurrent(folder, target)

    @staticmethod
    def about(folder: Path) -> About:
        shape = ReDrafterConfig.from_dict(raw_config(folder))
        counts = counted(ReDrafter(shape))
        once = sum(n for name, n in counts.items() if name.startswith("context_"))
        if "input_proj.weight" in counts:  # the half of the context, and the bias
            once += shape.hidden_size * shape.exit_dim + shape.exit_dim
        stored = sum(counts.values())
        target_rows = shape.output_size * shape.hidden_size if shape.head == "target" else 0
        layers = ", ".join(map(str, shape.context_layers))
        head = "own output matrix" if shape.head == "own" else "the target's output rows, frozen"
        rows = [
            ["cell", f"{shape.cell}, first state: {shape.initial_state}"],
            ["context", f"layers {layers}" if layers else "the last hidden state"],
            ["head", f"{head}, width {shape.exit_dim}, {shape.num_draft_layers} residual blocks"],
            ["draft vocabulary", f"{shape.output_size:,} of {shape.vocab_size:,} tokens"],
        ]
        return About(rows, stored, once, stored - once + target_rows)

    def begin(self, vocabulary: np.ndarray | None, sample: mx.array) -> None:
        self.scales = measure_scales(self.shape, self.target, final_hidden(self.target, sample))
        if self.config.warm_start is None:
            self.module = new_drafter(self.shape, self.target, vocabulary, self.config.seed)
            self._bind()
            return
        drafter, weights = self.warm()
        self.module = ReDrafter(self.shape)
        if "draft_vocab" in drafter:
            self.module.draft_vocab = drafter.draft_vocab
        self.module.load_weights(list(weights.items()), strict=False)
        mx.eval(self.module.parameters())
        fold(self.module, self.scales.inverse())
        self._bind()

    def go_on(self, weights: Any, facts: Mapping[str, str]) -> None:
        super().go_on(weights, facts)
        self.scales = Scales(float(facts["embedding_scale"]), float(facts["context_scale"]))
        self._bind()

    def _bind(self) -> None:
        if self.shape.head == "target":
            self.module.bind(self.target)

    @property
    def facts(self) -> dict[str, str]:
        return {
            "embedding_scale": repr(self.scales.embedding),
            "context_scale": repr(self.scales.context),
        }

    @property
    def output(self) -> str | None:
        own = self.shape.head == "own"
        return f"lm_head.{self.shape.num_draft_layers}." if own else None

    def inputs(self, batch: Mapping[str, mx.array]) -> list[mx.array]:
        steps = self.config.rollout
        tokens, length = batch["tokens"], batch["tokens"].shape[1] - steps
        context = self._contexts(batch["features"][:, :length])
        embeddings = self.target.embed(tokens[:, : length + steps - 1]) / self.scales.embedding
        return head_inputs(self.module, context, embeddings, steps)

    def _contexts(self, features: mx.array) -> mx.array:
        """features (B, T, L, D) -> (B, T, D)."""
        runs, length = features.shape[:2]
        flat = contexts(self.module, self.target, features.reshape(-1, *features.shape[2:]))
        if not self.shape.context_layers:
            flat = flat / self.scales.context
        return flat.reshape(runs, length, -1)

    def output_rows(self) -> mx.array:
        return self.module.output_rows()

    def finished(self) -> ReDrafter:
        drafter = ReDrafter(self.shape)
        drafter.update(self.module.parameters())
        if "draft_vocab" in self.module:
            drafter.draft_vocab = self.module.draft_vocab
        fold(drafter, self.scales)
        return drafter

    def save(self, folder: Path, module: nn.Module, extra: dict[str, Any]) -> None:
        assert isinstance(module, ReDrafter)
        save_drafter(folder, module, extra)


def drafter_config(config: TrainConfig, target: DecoderConfig) -> ReDrafterConfig:
    """The drafter's shape. Raises OptionError for layers that the target does not have."""
    layers, size = context_layers(config, target), target.hidden_size
    shape = {
        "model_type": "redrafter",
        "hidden_size": size,
        "vocab_size": target.vocab_size,
        "exit_dim": config.exit_dim or size,
        "num_draft_layers": config.num_draft_layers,
        "cell": config.cell,
        "initial_state": config.initial_state,
        "context_layers": list(layers),
        "head": config.head,
        "draft_vocab_size": drafted(config, target),
    }
    result = ReDrafterConfig.from_dict(shape)
    if result.initial_state == "context" and not layers:
        raise OptionError("initial_state context needs context_layers: use zero, or name layers")
    return result


def new_drafter(
    config: ReDrafterConfig, target: Target, vocabulary: np.ndarray | None, seed: int
) -> ReDrafter:
    """Random weights; an own output matrix begins with the target's rows."""
    mx.random.seed(seed)
    drafter = ReDrafter(config)
    if vocabulary is not None:
        drafter.draft_vocab = mx.array(vocabulary, mx.int32)
    if config.head == "own":
        drafter.lm_head[-1].weight = first_rows(target, vocabulary, config.exit_dim)
    drafter.set_dtype(mx.float32)
    mx.eval(drafter.parameters())
    return drafter


def measure_scales(config: ReDrafterConfig, target: Target, hidden: mx.array) -> Scales:
    """Scales of the target's embedding, and of hidden states (R, D) where they are read."""
    embedding = context = 1.0
    if config.cell != "sum":
        ids = mx.arange(min(4096, config.vocab_size))
        embedding = deviation(target.embed(ids))
    if not config.context_layers and config.exit_dim != 2 * config.hidden_size:
        context = deviation(hidden)
    return Scales(embedding, context)


def fold(drafter: ReDrafter, scales: Scales) -> None:
    """Make a drafter of divided inputs one of the inputs themselves; its inverse undoes it."""
    size = drafter.config.hidden_size
    if drafter.config.cell != "sum":
        drafter.rnn_w.weight = drafter.rnn_w.weight / scales.embedding
    if not drafter.config.context_layers and "input_proj" in drafter:
        weight = drafter.input_proj.weight
        halves = [weight[:, :size] / scales.context, weight[:, size:]]
        drafter.input_proj.weight = mx.concatenate(halves, axis=1)
