"""How much to draft in each step: what chooses the shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlx_redrafter.tree.shape import TreeShape


class Policy(Protocol):
    """Chooses the shape of every step of one answer."""

    @property
    def shapes(self) -> Sequence[TreeShape]:
        """All that it may choose."""
        ...

    def choose(self, position: int) -> TreeShape:
        """The shape of the next step to launch, with about so many tokens in the cache.

        One step may be in flight and not yet recorded.
        """
        ...

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        """A step has produced so many tokens, ``seconds`` after the step before; None: unknown.
        experts: how many its nodes chose, over all layers; 0: there are none."""
        ...


class Fixed:
    """Always the same shape."""

    def __init__(self, shape: TreeShape) -> None:
        self.shapes = (shape,)

    def choose(self, position: int) -> TreeShape:
        return self.shapes[0]

    def record(
        self, shape: TreeShape, produced: int, seconds: float | None, experts: int = 0
    ) -> None:
        pass
