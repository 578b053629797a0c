"""Drafters of the last hidden state alone whose levels have weights of their own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_redrafter.drafters.beam import BeamDrafter


class LevelDrafter(BeamDrafter):
    """Searches with a cell that is told at which level it is. Level 0 consumes the root.

    ``levels``: how many it was made for; None: it goes on with what it does at the last one.
    """

    joins = True
    config: Any  # says draft_vocab_size, None without a draft vocabulary
    levels: int | None
    vocabulary: mx.array
    """(Vd,) int32: the target's ids of its tokens."""

    def token_ids(self, picks: mx.array) -> mx.array:
        """Draft-vocabulary indices -> token ids of the target."""
        return mx.take(self.vocabulary, picks) if self.config.draft_vocab_size else picks

    def context(self, read: mx.array) -> mx.array:
        """(M, D): the hidden states as they are."""
        return read

    def first(self, context: mx.array, depth: int) -> mx.array:
        """(1, D) -> the state (1, *) that the first of so many levels starts from."""
        raise NotImplementedError

    def level(self, index: int, tokens: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        """Consume tokens (R,) of the target's vocabulary: logits (R or 1, Vd), state."""
        raise NotImplementedError

    def searched(self, depth: int) -> Levels:  # type: ignore[override]
        return Levels(self, depth)


class Levels:
    """The cell of one search, a `drafters.Cell`: it counts its levels while they are traced.

    Beyond a drafter's last level every token is as likely as another: such nodes come last, and
    a chain that is longer than its drafter ends in tokens that are hardly ever right.
    """

    def __init__(self, drafter: LevelDrafter, depth: int) -> None:
        self._drafter, self._depth, self._next = drafter, depth, 0
        self.vocabulary = drafter.vocabulary

    def context(self, read: mx.array) -> mx.array:
        return self._drafter.context(read)

    def start(self, context: mx.array) -> tuple[mx.array, mx.array]:
        """(D,) -> the state (1, *); nothing else stays the same."""
        return self.starts(context[None])

    def starts(self, contexts: mx.array) -> tuple[mx.array, mx.array]:
        """The same for several contexts, (B, D)."""
        self._next = 0
        return self._drafter.first(contexts, self._depth), contexts

    def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> tuple[mx.array, mx.array]:
        index, self._next = self._next, self._next + 1
        if self._drafter.levels is not None and index >= self._drafter.levels:
            return mx.zeros((state.shape[0], self.vocabulary.shape[0])), state
        return self._drafter.level(index, tokens, state)

    def follow(
        self, picks: mx.array, state: mx.array, fixed: mx.array
    ) -> tuple[mx.array, mx.array]:
        return self.step(self.token_ids(picks), state, fixed)

    def token_ids(self, picks: mx.array) -> mx.array:
        return self._drafter.token_ids(picks)
