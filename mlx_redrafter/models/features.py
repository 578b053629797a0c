"""What a pass of the target leaves to be read by those that draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx


class Features(NamedTuple):
    """What a pass of the target leaves to be read.

    hidden (M, D): after the final norm. layers: indices of layers, and outputs: what each of them
    put out, (M, D).
    """

    hidden: mx.array
    layers: tuple[int, ...] = ()
    outputs: tuple[mx.array, ...] = ()

    def of(self, layers: Sequence[int]) -> mx.array:
        """The outputs of some layers side by side (M, layers * D); of none, the final hidden
        states."""
        if not layers:
            return self.hidden
        return mx.concatenate([self.outputs[self.layers.index(i)] for i in layers], axis=-1)


class Chunk(NamedTuple):
    """A part of a prompt: tokens (n,), the token behind each of them, following (n,), their
    positions (n,), and what the target's pass left of them, read (n rows)."""

    tokens: mx.array
    following: mx.array
    positions: mx.array
    read: Features
