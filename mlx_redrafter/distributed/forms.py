"""Answers that follow a grammar: the first machine reads it, and tells the others what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mlx_redrafter.decoding.grammar import Grammar, Place
from mlx_redrafter.distributed.wire import Message

Tell = Callable[..., None]
Expect = Callable[[str], Message]


class TellingGrammar:
    """A grammar whose places tell the others. ``left``: it could not be followed any more, and the
    others know that."""

    def __init__(self, grammar: Grammar, tell: Tell) -> None:
        self._grammar, self.tell, self.left = grammar, tell, False

    def begin(self) -> TellingPlace:
        return TellingPlace(self._grammar.begin(), self)


class TellingPlace:
    def __init__(self, place: Place, grammar: TellingGrammar) -> None:
        self._place, self._grammar, self.end = place, grammar, place.end

    @property
    def over(self) -> bool:
        return self._place.over

    def take(self, tokens: Sequence[int]) -> int:
        try:
            taken = self._place.take(tokens)
        except BaseException:
            self._grammar.left = True
            self._grammar.tell("leave")
            raise
        self._grammar.tell("taken", taken=taken, over=self.over)
        return taken

    def mask(self) -> npt.NDArray[np.uint32]:
        bits = self._place.mask()
        self._grammar.tell("mask", bits=bits.tolist())
        return bits

    def forced(self, most: int) -> list[int]:
        tokens = self._place.forced(most)
        self._grammar.tell("forced", tokens=tokens)
        return tokens


class ToldGrammar:
    """What the others have in its place. end: see `Place`."""

    def __init__(self, end: int, expect: Expect) -> None:
        self._end, self._expect = end, expect

    def begin(self) -> ToldPlace:
        return ToldPlace(self._end, self._expect)


class ToldPlace:
    def __init__(self, end: int, expect: Expect) -> None:
        self.end, self._expect, self.over = end, expect, False

    def take(self, tokens: Sequence[int]) -> int:
        told = self._expect("taken")
        self.over = bool(told["over"])
        return int(told["taken"])

    def mask(self) -> npt.NDArray[np.uint32]:
        return np.array(self._expect("mask")["bits"], np.uint32)

    def forced(self, most: int) -> list[int]:
        return [int(token) for token in self._expect("forced")["tokens"]]
