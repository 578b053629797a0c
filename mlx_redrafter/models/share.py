"""What one of several machines holds of a model, and where its pass meets the others'.

A decoder asks its share and knows nothing of machines; `distributed` has the shares of several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx

from .config import DecoderConfig

Layers = Callable[[mx.array], tuple[mx.array, Mapping[int, mx.array]]]
"""Runs the layers that are held on x (N, D): what comes out, and every layer's output by number."""


class Share(Protocol):
    """One machine's share of a model."""

    @property
    def held(self) -> range:
        """The layers that it holds, or holds a part of."""
        ...

    @property
    def routes(self) -> bool:
        """Does a pass see what all layers send to experts?"""
        ...

    def layer(self, config: DecoderConfig, index: int) -> DecoderConfig:
        """What a layer is made of here; config: the whole model's."""
        ...

    def total(self, x: mx.array) -> mx.array:
        """A part of what a layer adds to the stream (N, D) -> all of it, on every machine."""
        ...

    def passed(
        self, x: mx.array, run: Layers, layers: Sequence[int]
    ) -> tuple[mx.array, list[mx.array]]:
        """What the model's layers make of x (N, D), and the wanted ones' outputs."""
        ...

    def common(self, *arrays: mx.array) -> Sequence[mx.array]:
        """Integers or truths that have to be the same on all machines: the first one's, where
        others might round otherwise."""
        ...


class Whole:
    """All of a model on one machine."""

    routes = True

    def __init__(self, layers: int) -> None:
        self.held = range(layers)

    def layer(self, config: DecoderConfig, index: int) -> DecoderConfig:
        return config.layer(index)

    def total(self, x: mx.array) -> mx.array:
        return x

    def passed(
        self, x: mx.array, run: Layers, layers: Sequence[int]
    ) -> tuple[mx.array, list[mx.array]]:
        x, outputs = run(x)
        return x, [outputs[i] for i in layers]

    def common(self, *arrays: mx.array) -> Sequence[mx.array]:
        return arrays


class Plan(Protocol):
    """How a model is shared among machines: what one of them is given of its tensors."""

    def cut(
        self, config: DecoderConfig, weights: dict[str, mx.array], raw: Mapping[str, Any]
    ) -> tuple[Share, dict[str, mx.array]]:
        """This machine's share of a model's tensors, by the names in its own decoder; nothing is
        evaluated. raw: config.json. Raises ModelError where it cannot be shared so."""
        ...
