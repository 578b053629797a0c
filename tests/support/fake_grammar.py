"""A grammar over token ids: what may follow depends on the tokens so far, drawn by a seed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import numpy.typing as npt

END = 1


class Drawn:
    """A grammar in which every beginning of a text has legal tokens of its own.

    Args:
        vocab: tokens.
        seed: another grammar.
        share: of the vocabulary that is legal after most beginnings.
        forced: share of beginnings that only one token can follow.
        longest: tokens after which only the end is legal; before, it is so now and then.
    """

    def __init__(
        self, vocab: int, seed: int, share: float = 0.5, forced: float = 0.3, longest: int = 40
    ) -> None:
        self.vocab, self.seed, self.share, self.forced = vocab, seed, share, forced
        self.longest = longest

    def begin(self) -> Stand:
        return Stand(self)

    def legal(self, tokens: Sequence[int]) -> set[int]:
        """What may follow."""
        if len(tokens) >= self.longest:
            return {END}
        random = Random(repr((self.seed, list(tokens[-3:]), len(tokens))))
        others = [token for token in range(self.vocab) if token != END]
        if random.random() < self.forced:
            return {random.choice(others)}
        found = {token for token in others if random.random() < self.share}
        return found | ({END} if random.random() < 0.05 else set()) or {others[0]}


class Stand:
    """A `decoding.grammar.Place`."""

    end = END

    def __init__(self, grammar: Drawn) -> None:
        self.grammar, self.tokens = grammar, list[int]()

    @property
    def over(self) -> bool:
        return END in self.tokens

    def take(self, tokens: Sequence[int]) -> int:
        for count, token in enumerate(tokens):
            legal = set() if self.over else self.grammar.legal(self.tokens)
            if token not in legal or legal == {END}:
                return count
            self.tokens.append(token)
        return len(tokens)

    def mask(self) -> npt.NDArray[np.uint32]:
        bits = np.zeros(-(-self.grammar.vocab // 32) * 32, np.uint8)
        bits[list(self.grammar.legal(self.tokens))] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def forced(self, most: int) -> list[int]:
        found: list[int] = []
        while len(found) < most and END not in [*self.tokens, *found]:
            legal = self.grammar.legal([*self.tokens, *found])
            if len(legal) > 1:
                break
            found += legal
        return found
