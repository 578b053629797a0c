"""How much to draft in each step: the shape with the most expected tokens per second.

A step's price is measured (``costs.py``), what it yields is reckoned from a table recorded with the
drafter (``yields.py``) and one number learned while decoding: how much easier or harder the text
at hand is than the table's. The choice falls before drafting, so that a step stays one graph and
is launched ahead; docs/decisions.md holds the comparison with choices that know the draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_redrafter.tree.shape import TreeShape

Tokens = Callable[[TreeShape], float]
Seconds = Callable[[TreeShape, int], float]
Learn = Callable[[TreeShape, int, float, int], None]

# Replayed over answers of the built-in model, greedy and at temperature 0.8 (docs/decisions.md).
_MEMORY = 0.9  # what a step still weighs after the next one
_PRIOR = 3.0  # drafts' worth of trust in the table
_PROBE, _LONGEST_PROBE = 12, 96  # plain steps before drafting is tried again; doubled in vain
_MARGIN = 1.015  # by which a further shape has to be faster on some kind of text
_WORTH = 1.05  # nothing is tried that could not be so much faster than plain decoding
_COMPARED = 64  # drafted steps after which a plain one is timed, where prices are compared with it
FIRST = 4  # plain steps to begin with there: the first ones wait for graphs and are not timed


class Automatic:
    """The shape with the best expected speed, plain decoding among them.

    Args:
        shapes: to choose from, plain decoding included.
        tokens: what a step of a shape yields on average text.
        seconds: what it costs at present, with so many tokens in the cache.
        learn: told of every step's shape, cached tokens, duration and experts.
        owed: plain steps to begin with, and one after every ``_COMPARED`` drafted ones: until one
            of them was timed. None: none are needed.
    """

    def __init__(
        self,
        shapes: Sequence[TreeShape],
        tokens: Tokens,
        seconds: Seconds,
        learn: Learn = lambda shape, position, seconds, experts: None,
        owed: int | None = None,
    ) -> None:
        self.shapes = tuple(shapes)
        self.tokens, self._seconds, self._learn = tokens, seconds, learn
        self._accepted = self._foreseen = _PRIOR
        self._plain_steps, self._wait, self._position = 0, _PROBE, 0
        self._compares, self._owed, self._drafted = owed is not None, owed or 0, 0

    @property
    def ease(self) -> float:
        """Accepted drafts over those that the table foresaw, recent steps first."""
        return self._accepted / self._foreseen

    def choose(self, position: int) -> TreeShape:
        self._position = position
        best = max(self.shapes, key=lambda shape: self.speed(shape, position))
        return self.unless_due(best, position)

    def unless_due(self, best: TreeShape, position: int) -> TreeShape:
        """What was chosen, unless a step is due that shows whether another would be better."""
        self._position = position
        if best.drafts and self._must_compare():
            return TreeShape.plain()
        if best.drafts:
            self._plain_steps, self._wait = 0, _PROBE
            return best
        self._plain_steps += 1
        if self._plain_steps > self._wait and (probe := self._worth_trying()) is not None:
            self._plain_steps, self._wait = 0, min(2 * self._wait, _LONGEST_PROBE)
            return probe
        return best

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        if seconds is not None:
            self._learn(shape, self._position, seconds, experts)
            self._owed = self._owed if shape.drafts else 0
        if shape.drafts:
            self._accepted = _PRIOR + _MEMORY * (self._accepted - _PRIOR) + produced - 1
            foreseen = self.tokens(shape) - 1
            self._foreseen = _PRIOR + _MEMORY * (self._foreseen - _PRIOR) + foreseen

    def _must_compare(self) -> bool:
        """Where a price says more of one shape than of another, plain steps have to be timed now
        and then: drafted ones alone cannot tell a machine that is slow from drafts that are."""
        if not self._compares:
            return False
        if self._owed:
            self._owed -= 1
            return True
        self._drafted += 1
        if self._drafted == _COMPARED:
            self._owed, self._drafted = 1, 0
        return False

    def foreseen(self, shape: TreeShape) -> float:
        """Tokens that a step of a shape would give on the text at hand."""
        return expected(self.tokens(shape), shape, self.ease)

    def speed(self, shape: TreeShape, position: int) -> float:
        """Tokens per second, with so many in the cache."""
        return self.foreseen(shape) / self._seconds(shape, position)

    def _price(self, shape: TreeShape) -> float:
        return self._seconds(shape, self._position)

    def _worth_trying(self) -> TreeShape | None:
        """The cheapest shape that would be faster than plain decoding if all of it were right."""
        plain = self._price(TreeShape.plain())
        hopeful = [
            shape
            for shape in self.shapes
            if shape.drafts and (shape.longest + 1) * plain > _WORTH * self._price(shape)
        ]
        return min(hopeful, key=self._price, default=None)


def expected(tokens: float, shape: TreeShape, ease: float) -> float:
    """Tokens of a step on text that is so much easier (> 1) or harder than average.

    Every draft's chance of failing on average text is taken to the power ``ease``: about in
    proportion for small chances, never above what the shape can yield.
    """
    most = min(shape.longest, shape.nodes - 1)
    if most < 1:
        return 1.0
    share = min(max((tokens - 1) / most, 0.0), 1.0)
    return 1 + most * (1 - (1 - share) ** ease)


def contenders(
    shapes: Sequence[TreeShape],
    tokens: Tokens,
    seconds: Callable[[TreeShape], float],
    most: int = 5,
) -> tuple[TreeShape, ...]:
    """Plain decoding and the few shapes that are the fastest of all for some kind of text.

    Every shape is a graph of its own, made when it is first used: a few are as good as all, and one
    that is hardly faster than those that are there is none.
    """
    chosen = [TreeShape.plain()]
    for ease in (1.0, 0.5, 2.0, 0.7, 1.4, 4.0):

        def speed(shape: TreeShape, ease: float = ease) -> float:
            return expected(tokens(shape), shape, ease) / seconds(shape)

        best = max(shapes, key=speed)
        if speed(best) > _MARGIN * max(map(speed, chosen)) and len(chosen) < most:
            chosen.append(best)
    return tuple(chosen)
