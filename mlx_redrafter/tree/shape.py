"""How much is drafted in a step, and from what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import checks

BEAMS, TEXT = "beams", "text"
"""The parts of a tree: what a drafter searches for, and what the text itself says."""

MODES = ("trellis", "beams")


@dataclass(frozen=True)
class TreeShape:
    """How much is drafted in a step.

    Args:
        width: beam width ``W``; 1 is a chain.
        depth: drafted tokens ``L`` along a path, the root not counted (Apple's ``beam_length``
            counts it: theirs is ``depth + 1``).
        nodes: tokens ``N`` that the target checks in one pass, root included. 1 is plain decoding.
        mode: ``trellis`` keeps every token that beam search ever held as a candidate; ``beams``
            only those on beams that survive to the last level (Apple's candidate set).
        lookup: tokens drafted from the text itself besides (see ``drafters/lookup.py``); 0 is off.
    """

    width: int = 3
    depth: int = 4
    nodes: int = 8
    mode: str = "trellis"
    lookup: int = 0

    def __post_init__(self) -> None:
        least = {"width": 1, "lookup": 0, "depth": 0 if self.lookup else 1}
        for name, low in least.items():
            label = {"width": "beam width", "depth": "beam length"}.get(name, name)
            value = checks.whole(label, getattr(self, name), low, 16)
            object.__setattr__(self, name, value)
        object.__setattr__(self, "nodes", checks.whole("nodes", self.nodes, 1))
        if self.mode not in MODES:
            raise OptionError(f"candidate mode {self.mode!r} is unknown: use {' or '.join(MODES)}")
        most = 1 + self.width * self.depth + self.lookup
        if self.nodes > most:
            looked = f" and lookup {self.lookup}" if self.lookup else ""
            raise OptionError(
                f"{self.nodes} nodes are not possible with beam width {self.width}, beam length "
                f"{self.depth}{looked}: use 1 to {most} (1 + width x length + lookup)"
            )
        object.__setattr__(self, "lookup", min(self.lookup, self.nodes - 1))
        if self.nodes == 1 or self.depth == 0:
            object.__setattr__(self, "width", 1)
            object.__setattr__(self, "depth", 0)
        elif self.width == 1 or self.nodes <= self.depth:
            # Deeper levels could never be chosen: a path of N nodes has N - 1 drafts.
            object.__setattr__(self, "depth", min(self.depth, self.nodes - 1))

    @classmethod
    def plain(cls) -> TreeShape:
        """N = 1: no drafting, one token a step, through the same code."""
        return cls(width=1, depth=1, nodes=1)

    @classmethod
    def chain(cls, depth: int) -> TreeShape:
        """``depth`` drafted tokens in a row."""
        return cls(width=1, depth=depth, nodes=depth + 1)

    @property
    def drafts(self) -> bool:
        return self.nodes > 1

    @property
    def parts(self) -> tuple[str, ...]:
        """Which drafters it asks: ``BEAMS``, ``TEXT``, both or none."""
        return (BEAMS,) * (self.depth > 0) + (TEXT,) * (self.lookup > 0)

    @property
    def longest(self) -> int:
        """Drafted tokens of the longest path."""
        return max(self.depth, self.lookup)

    @property
    def one_path(self) -> bool:
        """Is the tree a chain, whatever is drafted?"""
        return self.width == 1 and not (self.depth and self.lookup)

    def only(self, parts: Iterable[str]) -> TreeShape:
        """What is left of it where nothing drafts the other parts."""
        left = set(parts).intersection(self.parts)
        if left == set(self.parts):
            return self
        if left == {TEXT}:
            return TreeShape(1, 0, self.lookup + 1, lookup=self.lookup)
        if left == {BEAMS}:
            nodes = min(self.nodes, 1 + self.width * self.depth)
            return TreeShape(self.width, self.depth, nodes, self.mode)
        return self.plain()

    def __str__(self) -> str:
        if not self.drafts:
            return "plain"
        if self.depth == 0:
            return f"lookup of {self.lookup}"
        if self.one_path:
            return f"chain of {self.depth}"
        kind = "" if self.mode == "trellis" else f", {self.mode}"
        kind += f", lookup {self.lookup}" if self.lookup else ""
        return f"beam {self.width}x{self.depth}, {self.nodes} nodes{kind}"


DEFAULT = TreeShape(lookup=7)
