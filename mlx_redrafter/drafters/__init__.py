"""Drafters: what proposes the next tokens. One protocol, one implementation so far."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx


class Drafter(Protocol):
    """What the decode step needs of a drafter. ``R`` rows are beams, ``Vd`` its vocabulary."""

    @property
    def context_layers(self) -> tuple[int, ...]:
        """Target layers whose outputs it reads; none: it reads the last hidden state."""
        ...

    @property
    def context_size(self) -> int:
        """``Dc``: the size of what is kept from one step to the next."""
        ...

    def context(self, seen: mx.array) -> mx.array:
        """What the context layers put out, side by side (M, layers * D), or, without context
        layers, the final hidden states (M, D) -> (M, Dc)."""
        ...

    def start(self, context: mx.array) -> tuple[mx.array, mx.array]:
        """(Dc,) -> recurrent state (1, S), and what stays the same for the whole draft."""
        ...

    def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> tuple[mx.array, mx.array]:
        """Consume tokens (R,) of the target's vocabulary: logits (R, Vd), state (R, S).

        A state of one row, given or returned, is that of all beams.
        """
        ...

    def follow(
        self, picks: mx.array, state: mx.array, fixed: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The same for tokens (R,) of its own vocabulary."""
        ...

    def token_ids(self, picks: mx.array) -> mx.array:
        """Draft-vocabulary indices -> token ids of the target."""
        ...

    def select(self, values: mx.array) -> mx.array:
        """(V,) values of the target's vocabulary -> (Vd,) of the drafter's."""
        ...


def seen(hidden: mx.array, inner: tuple[mx.array, ...]) -> mx.array:
    """What a drafter reads of a pass: the outputs of its context layers side by side, or, without
    any, the final hidden states. (M, D), one (M, D) per context layer -> (M, *)."""
    return mx.concatenate(list(inner), axis=-1) if inner else hidden
