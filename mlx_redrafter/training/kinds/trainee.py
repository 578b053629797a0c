"""What a kind of drafter brings to the fit, and what kinds have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_redrafter.drafters.files import VOCABULARY
from mlx_redrafter.drafters.rollout import check_final
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import DecoderConfig, Target
from mlx_redrafter.models.weights import parameters
from mlx_redrafter.training.config import TrainConfig

FIRST_OUTPUT = 0.1  # size of the first logits, as a share of what the target's rows would give


class About(NamedTuple):
    """A drafter in a table: rows of two cells; parameters in its files, read once per draft, and
    per draft step. The target's own rows are read but are not in the files."""

    rows: list[list[str]]
    stored: int
    per_draft: int
    per_step: int


class Trainee(ABC):
    """A drafter of one kind while it is trained.

    A kind sees the target in normalised units, where its inputs are read by weights that can take
    the scales: ``finished`` folds them in, and nothing else changes.

    Args:
        target: frozen.
        config: how to train.

    Raises:
        OptionError: options that do not go with the model.
        ModelError: a model that no drafter can be trained for.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    whole: ClassVar[bool] = False
    """Does it see a conversation from its beginning?"""
    module: nn.Module
    """What is trained; there is one after ``begin`` or ``go_on``."""

    def __init__(self, target: Target, config: TrainConfig) -> None:
        check_final(target)
        self.target, self.config = target, config
        self.shape: Any = self.shape_of(config, target.config)

    # Known before there are weights

    @staticmethod
    @abstractmethod
    def shape_of(config: TrainConfig, target: DecoderConfig) -> Any:
        """The drafter's configuration; it says ``draft_vocab_size``, None for all tokens.

        Raises:
            OptionError: options that do not go with the model.
        """

    @staticmethod
    @abstractmethod
    def build(shape: Any) -> nn.Module:
        """A module of a shape, with weights of any value."""

    @staticmethod
    def layers_of(shape: Any, target: DecoderConfig) -> tuple[int, ...]:
        """Layers whose outputs the fit reads, in rising order; the last is always among them."""
        return (target.num_layers - 1,)

    @staticmethod
    @abstractmethod
    def row_floats(shape: Any) -> int:
        """Floats that a position and a draft step take on the way to the output rows, about."""

    @staticmethod
    @abstractmethod
    def load(folder: Path, target: Target) -> Any:
        """A drafter of this kind, in the units of inference. Raises DrafterError."""

    @staticmethod
    @abstractmethod
    def about(folder: Path) -> About:
        """What a model card says of a drafter in a folder; nothing is loaded."""

    # Weights

    @abstractmethod
    def begin(self, vocabulary: np.ndarray | None, sample: mx.array) -> None:
        """A new module, or that of a warm start.

        Args:
            vocabulary: (Vd,) token ids; None: all.
            sample: features (R, L, D), to take scales from.
        """

    def go_on(self, weights: Any, facts: Mapping[str, str]) -> None:
        """All as it was in a checkpoint."""
        self.module = self.build(self.shape)
        self.module.update(weights)

    @property
    def facts(self) -> dict[str, str]:
        """What a checkpoint keeps beside the weights."""
        return {}

    # A step

    @property
    def output(self) -> str | None:
        """How the names of an output matrix of its own begin; None: it has none."""
        return None

    @abstractmethod
    def inputs(self, batch: Mapping[str, mx.array]) -> list[mx.array]:
        """What the output rows are multiplied with at every draft step k < K: (B * T, E) each.

        batch: tokens (B, T + K), features (B, T + K, L, D); see ``data.Batch``. For whole
            conversations also before_tokens, before_features and before_seen; see ``data.Before``.
        """

    @abstractmethod
    def output_rows(self) -> mx.array:
        """(Vd, E)."""

    # The result

    @abstractmethod
    def finished(self) -> nn.Module:
        """A copy in the units of inference."""

    @abstractmethod
    def save(self, folder: Path, module: nn.Module, extra: dict[str, Any]) -> None:
        """Write a finished module, quantised or not; ``extra`` joins its config.json."""

    def read(self, folder: Path) -> Any:
        """A drafter in a folder with its weights as they are trained. Raises DrafterError."""
        return self.load(folder, self.target)

    def warm(self) -> tuple[Any, dict[str, mx.array]]:
        """The drafter of the warm start, and its weights in float32.

        Raises:
            OptionError: one of another shape.
            DrafterError: broken files, or a drafter for another model.
        """
        place = self.config.warm_start
        assert place is not None
        drafter = self.read(place)
        if drafter.config != self.shape:
            for name, value in vars(self.shape).items():
                if (theirs := getattr(drafter.config, name, None)) != value:
                    raise OptionError(
                        f"the drafter in {place} has {name} {theirs}, the configuration {value}: "
                        "a warm start needs the same shape"
                    )
        return drafter, {
            k: v.astype(mx.float32) for k, v in parameters(drafter).items() if v.dtype != mx.int32
        }


def counted(module: nn.Module) -> dict[str, int]:
    """Parameters by name; the lazy arrays' sizes are all that is asked for."""
    return {name: v.size for name, v in parameters(module).items() if name != VOCABULARY}


def drafted(config: TrainConfig, target: DecoderConfig) -> int | None:
    """The size of the draft vocabulary; None: all tokens."""
    vocab = config.draft_vocab_size
    return vocab if 0 < vocab < target.vocab_size else None


def context_layers(config: TrainConfig, target: DecoderConfig) -> tuple[int, ...]:
    """The layers that a drafter reads. Raises OptionError for those that the target lacks."""
    count = target.num_layers
    if config.context_layers == "auto":
        return tuple(sorted({min(2, count - 1), count // 2, count - 1}))
    try:
        layers = tuple(int(i) for i in config.context_layers.split(",") if i.strip())
    except ValueError:
        layers = (-1,)
    if any(not 0 <= i < count for i in layers):
        raise OptionError(
            f"context_layers {config.context_layers!r} is not possible: use auto, an empty "
            f"string, or numbers below {count}, separated by commas"
        )
    return layers


def frequent(frequencies: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` most frequent tokens, in rising order of their ids (int32)."""
    order = np.argsort(-frequencies, kind="stable")
    return np.sort(order[:count]).astype(np.int32)


def first_rows(target: Target, vocabulary: np.ndarray | None, width: int) -> mx.array:
    """What an output matrix of a drafter's own begins with, the target's rows: (Vd, E) float32."""
    ids = mx.arange(target.config.vocab_size) if vocabulary is None else mx.array(vocabulary)
    rows = target.head_rows(ids).astype(mx.float32)
    if width > rows.shape[1]:
        rows = mx.pad(rows, [(0, 0), (0, width - rows.shape[1])])
    elif width < rows.shape[1]:
        rows = rows @ mx.random.normal((rows.shape[1], width)) * (width**-0.5)
    return rows * (FIRST_OUTPUT / mx.std(rows) * width**-0.5)


def deviation(x: mx.array) -> float:
    """The standard deviation of all numbers."""
    return float(cast(float, mx.std(x.astype(mx.float32)).item()))
