"""A new drafter for a target, or a trained one to go on with, in normalised units.

Hidden states and embeddings of a target differ by orders of magnitude in size, and Adam moves all
weights by like amounts. So training sees both divided by their standard deviation; when a drafter
is written, the scales are folded into the weights that read them, and nothing else changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafters.loading import load_recurrent
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.weights import parameters
from mlx_redrafter.training.config import TrainConfig

_FIRST_OUTPUT = 0.1  # size of the first logits, as a share of what the target's rows would give


@dataclass(frozen=True)
class Scales:
    """What embeddings and contexts are divided by."""

    embedding: float
    context: float

    def inverse(self) -> Scales:
        return Scales(1 / self.embedding, 1 / self.context)


def drafter_config(config: TrainConfig, target: Decoder) -> ReDrafterConfig:
    """The drafter's shape. Raises OptionError for layers that the target does not have."""
    count, size = target.config.num_layers, target.config.hidden_size
    if config.context_layers == "auto":
        layers: tuple[int, ...] = tuple(sorted({min(2, count - 1), count // 2, count - 1}))
    else:
        try:
            layers = tuple(int(i) for i in config.context_layers.split(",") if i.strip())
        except ValueError:
            layers = (-1,)
        if any(not 0 <= i < count for i in layers):
            raise OptionError(
                f"context_layers {config.context_layers!r} is not possible: use auto, an empty "
                f"string, or numbers below {count}, separated by commas"
            )
    vocab = config.draft_vocab_size
    shape = {
        "model_type": "redrafter",
        "hidden_size": size,
        "vocab_size": target.config.vocab_size,
        "exit_dim": config.exit_dim or size,
        "num_draft_layers": config.num_draft_layers,
        "cell": config.cell,
        "initial_state": config.initial_state,
        "context_layers": list(layers),
        "head": config.head,
        "draft_vocab_size": vocab if 0 < vocab < target.config.vocab_size else None,
    }
    result = ReDrafterConfig.from_dict(shape)
    if result.initial_state == "context" and not layers:
        raise OptionError("initial_state context needs context_layers: use zero, or name layers")
    return result


def frequent(frequencies: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` most frequent tokens, in rising order of their ids (int32)."""
    order = np.argsort(-frequencies, kind="stable")
    return np.sort(order[:count]).astype(np.int32)


def new_drafter(
    config: ReDrafterConfig, target: Decoder, vocabulary: np.ndarray | None, seed: int
) -> ReDrafter:
    """Random weights; an own output matrix begins with the target's rows."""
    mx.random.seed(seed)
    drafter = ReDrafter(config)
    if vocabulary is not None:
        drafter.draft_vocab = mx.array(vocabulary, mx.int32)
    if config.head == "own":
        ids = mx.arange(config.vocab_size) if vocabulary is None else drafter.draft_vocab
        rows = target.head_rows(ids).astype(mx.float32)
        width = config.exit_dim
        if width > rows.shape[1]:
            rows = mx.pad(rows, [(0, 0), (0, width - rows.shape[1])])
        elif width < rows.shape[1]:
            rows = rows @ mx.random.normal((rows.shape[1], width)) * (width**-0.5)
        drafter.lm_head[-1].weight = rows * (_FIRST_OUTPUT / mx.std(rows) * width**-0.5)
    drafter.set_dtype(mx.float32)
    mx.eval(drafter.parameters())
    return drafter


def warm_start(
    folder: Path, config: ReDrafterConfig, target: Decoder, vocabulary: np.ndarray | None
) -> ReDrafter:
    """A trained drafter of exactly this shape. Raises OptionError or DrafterError."""
    drafter = load_recurrent(folder, target)
    if drafter.config != config:
        for name, value in vars(config).items():
            if (theirs := getattr(drafter.config, name)) != value:
                raise OptionError(
                    f"the drafter in {folder} has {name} {theirs}, the configuration {value}: "
                    "a warm start needs the same shape"
                )
    fresh = ReDrafter(config)
    weights = {
        k: v.astype(mx.float32) for k, v in parameters(drafter).items() if v.dtype != mx.int32
    }
    if "draft_vocab" in drafter:
        fresh.draft_vocab = drafter.draft_vocab
    fresh.load_weights(list(weights.items()), strict=False)
    mx.eval(fresh.parameters())
    return fresh


def measure_scales(config: ReDrafterConfig, target: Decoder, hidden: mx.array) -> Scales:
    """Scales of the target's embedding, and of hidden states (R, D) where they are read."""
    embedding = context = 1.0
    if config.cell != "sum":
        ids = mx.arange(min(4096, config.vocab_size))
        embedding = _deviation(target.embed(ids))
    if not config.context_layers and config.exit_dim != 2 * config.hidden_size:
        context = _deviation(hidden)
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


def _deviation(x: mx.array) -> float:
    return float(cast(float, mx.std(x.astype(mx.float32)).item()))
