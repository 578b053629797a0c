"""What decoding needs of a model that it checks drafts with, and drafters of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from mlx_redrafter.cache.layer import LayerCache, Pass

from .config import DecoderConfig
from .decoder import Functions, Part
from .stacked import StackPass


class Target(Protocol):
    """A model whose layers remember what `caches` says: a `Decoder` or an `AdaptedModel`.

    Drafters that share parts of it ask for the rest of it than a pass and its logits too.
    """

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def dtype(self) -> mx.Dtype:
        """Of the activations."""
        ...

    @property
    def caches(self) -> Sequence[LayerCache]:
        """What each layer remembers."""
        ...

    @property
    def routes(self) -> int:
        """Experts that a token is sent to, over all layers: 0 where there are none, or where what
        they choose is not known."""
        ...

    def __call__(
        self,
        tokens: mx.array,
        positions: mx.array,
        mask: mx.array,
        key_positions: mx.array,
        caches: Pass,
        layers: Sequence[int] = (),
        functions: Functions = ...,
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        """Run N tokens; see :meth:`Decoder.__call__`."""
        ...

    @property
    def stacks(self) -> bool:
        """Can sequences lie in a stack, as far as layers go?"""
        ...

    def together(
        self,
        parts: Sequence[Part],
        layers: Sequence[int] = (),
        functions: Functions = ...,
        stacks: Sequence[StackPass] = (),
    ) -> list[tuple[mx.array, tuple[mx.array, ...]]]:
        """Run the tokens of several sequences; see :meth:`Decoder.together`."""
        ...

    def common(self, *arrays: mx.array) -> Sequence[mx.array]:
        """What has to be the same on all machines that share the model, see `Share.common`."""
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (M, D) -> (M, V)."""
        ...

    def scaled(self, out: mx.array) -> mx.array:
        """Products with output rows (M, *) -> logits, scaled and soft-capped."""
        ...

    def norm(self, x: mx.array) -> mx.array:
        """What the last layer puts out (..., D) -> what the head reads."""
        ...

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens (...,) -> rows of the input embedding (..., D), without the embedding scale."""
        ...

    def head_rows(self, ids: mx.array) -> mx.array:
        """ids (K,) -> rows (K, D) of the output head or tied embedding, dequantised."""
        ...
