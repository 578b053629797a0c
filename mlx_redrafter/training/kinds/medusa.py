"""Medusa heads (arXiv 2401.10774) with one output matrix for all of them.

A head begins as nothing, x + silu(0), as in the paper. The hidden states keep their units, as the
blocks add to them; the output matrix sees what comes out divided by their standard deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_redrafter.drafters import medusa
from mlx_redrafter.drafters.medusa import Medusa, MedusaConfig
from mlx_redrafter.drafters.rollout import final_hidden
from mlx_redrafter.models import DecoderConfig, Target
from mlx_redrafter.models.weights import shapes
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.kinds.trainee import (
    About,
    Trainee,
    counted,
    deviation,
    drafted,
    first_rows,
)


class MedusaTrainee(Trainee):
    """Medusa heads while they are trained: as many as there are draft steps in the rollout."""

    title, paper = "Medusa heads", "arXiv 2401.10774"
    module: Medusa
    shape: MedusaConfig
    scale: float

    @staticmethod
    def shape_of(config: TrainConfig, target: DecoderConfig) -> MedusaConfig:
        size = drafted(config, target)
        return MedusaConfig(
            target.hidden_size, target.vocab_size, config.rollout, config.num_draft_layers, True,
            "shared", size or target.vocab_size, size,
        )  # fmt: skip

    @staticmethod
    def build(shape: MedusaConfig) -> Medusa:
        module = Medusa(shape)
        module.freeze(keys=["draft_vocab"], recurse=False)
        return module

    @staticmethod
    def row_floats(shape: MedusaConfig) -> int:
        """Of every block: its sum, its gate and the gradients of both."""
        return (4 * shape.blocks + 2) * shape.hidden_size

    @staticmethod
    def load(folder: Path, target: Target) -> Medusa:
        return medusa.load(folder, target)

    @staticmethod
    def about(folder: Path) -> About:
        """All heads are read at once."""
        raw, weights = medusa.LAYOUT.weights(folder)
        shape = MedusaConfig.of(raw, shapes(weights), folder)
        stored = sum(counted(Medusa(shape)).values())
        blocks = f"{shape.blocks} residual block{'s' * (shape.blocks > 1)}"
        rows = [
            ["heads", f"{shape.heads} Medusa heads, {blocks} in each"],
            ["context", "the last hidden state"],
            ["head", f"one output matrix for all heads, width {shape.hidden_size}"],
            ["draft vocabulary", f"{shape.rows:,} of {shape.vocab_size:,} tokens"],
        ]
        return About(rows, stored, stored, 0)

    def begin(self, vocabulary: np.ndarray | None, sample: mx.array) -> None:
        self.scale = deviation(final_hidden(self.target, sample))
        self.module = self.build(self.shape)
        if self.config.warm_start is not None:
            drafter, weights = self.warm()
            if "draft_vocab" in drafter:
                self.module.draft_vocab = drafter.draft_vocab
            self.module.load_weights(list(weights.items()), strict=False)
            self.module.shared.weight = self.module.shared.weight * self.scale
        else:
            mx.random.seed(self.config.seed)
            if vocabulary is not None:
                self.module.draft_vocab = mx.array(vocabulary, mx.int32)
            for head in self.module.heads:
                for block in head.blocks:
                    block.update({"linear": _nothing(block.linear)})
            width = self.shape.hidden_size
            self.module.shared.weight = first_rows(self.target, vocabulary, width)
        mx.eval(self.module.parameters())

    def go_on(self, weights: Any, facts: Mapping[str, str]) -> None:
        super().go_on(weights, facts)
        self.scale = float(facts["context_scale"])

    @property
    def facts(self) -> dict[str, str]:
        return {"context_scale": repr(self.scale)}

    @property
    def output(self) -> str:
        return "shared."

    def inputs(self, batch: Mapping[str, mx.array]) -> list[mx.array]:
        """Head k reads what predicted the root, and says what comes k + 1 tokens after it."""
        features = batch["features"]
        length = features.shape[1] - self.config.rollout
        hidden = final_hidden(self.target, features[:, :length])
        hidden = hidden.astype(mx.float32).reshape(-1, hidden.shape[-1])
        return [head(hidden) / self.scale for head in self.module.heads]

    def output_rows(self) -> mx.array:
        return self.module.shared.weight

    def finished(self) -> Medusa:
        heads = Medusa(self.shape)
        heads.update(self.module.parameters())
        heads.shared.weight = heads.shared.weight / self.scale
        return heads

    def save(self, folder: Path, module: nn.Module, extra: dict[str, Any]) -> None:
        assert isinstance(module, Medusa)
        medusa.save(folder, module, extra)


def _nothing(linear: nn.Linear) -> dict[str, mx.array]:
    return {name: mx.zeros_like(value) for name, value in linear.parameters().items()}
