"""The draft tree: which candidates the target checks in one pass, and who may see whom.

A candidate is the path that leads to it. Worked example, width 2, depth 2, four nodes: beam search
proposes four paths behind the root "I"; the root and the best three become the tree (costs are
negative joint log-probabilities):

    candidate   "I"   "I am"   "I was"   "I am a"   "I was the"
    cost        0     0.4      1.5       0.9        2.0

    slot        0 "I"    1 "am"   2 "a"    3 "was"
    depths      0        1        2        1
    ancestors   x...     xx..     xxx.     x..x      (row i: what node i may attend to)

A node sees those whose path is a prefix of its own. The chosen set is closed: a path never costs
less than its prefixes, and of equal costs the shorter path goes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from mlx_redrafter import checks
from mlx_redrafter.errors import OptionError

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
        lookup: tokens drafted from the text itself besides (see ``lookup.py``); 0 is off.
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
    def longest(self) -> int:
        """Drafted tokens of the longest path."""
        return max(self.depth, self.lookup)

    @property
    def one_path(self) -> bool:
        """Is the tree a chain, whatever is drafted?"""
        return self.width == 1 and not (self.depth and self.lookup)

    def without_drafter(self) -> TreeShape:
        """What can be drafted from the text alone."""
        return TreeShape(1, 0, self.lookup + 1, lookup=self.lookup) if self.lookup else self.plain()

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


class Candidates(NamedTuple):
    """Proposed paths, from any source, every one with all its prefixes.

    paths (K, L+2) int32: the root's token, then drafted tokens, then END; the last column is always
    END. costs (K,) float32, the negative joint log-probability, never below that of a prefix;
    infinite: not valid. depths: drafted tokens on each path, known before anything is drafted.
    """

    paths: mx.array
    costs: mx.array
    depths: tuple[int, ...]


class DraftTree(NamedTuple):
    """tokens (N,) int32; depths (N,) int32; ancestors (N, N) bool, self included; paths (N, L+2)
    int32 as those of the candidates. Slot 0 is the root. A filler, which stands where there was no
    valid candidate, has NEVER for its tokens: nothing matches it."""

    tokens: mx.array
    depths: mx.array
    ancestors: mx.array
    paths: mx.array


END, NEVER = -1, -2


def integers(values: Iterable[int]) -> mx.array:
    """A constant (n,) int32 of the graph: mx.arange would be computed anew in every step."""
    return mx.array(np.fromiter(values, np.int32))


def root_only(root: mx.array) -> DraftTree:
    """The tree of plain decoding. root (1,) int32."""
    return DraftTree(root, integers([0]), mx.array([[True]]), root.reshape(1, 1))


def prefixes(path: mx.array) -> mx.array:
    """One path (L+2,) and all its prefixes, from the root on: (L+1, L+2)."""
    columns = path.shape[0]
    return mx.where(mx.array(np.tri(columns - 1, columns, dtype=bool)), path, integers([END]))


def chain(path: mx.array) -> DraftTree:
    """The tree of one path (L+2,); everything but the tokens is known beforehand."""
    n = path.shape[0] - 1
    depths, ancestors = integers(range(n)), mx.array(np.tri(n, dtype=bool))
    return DraftTree(path[:n], depths, ancestors, prefixes(path))


def joined(parts: Sequence[Candidates]) -> Candidates:
    """All parts in one."""
    depths = tuple(depth for part in parts for depth in part.depths)
    return Candidates(
        mx.concatenate([part.paths for part in parts]),
        mx.concatenate([part.costs for part in parts]),
        depths,
    )


def distinct(candidates: Candidates) -> Candidates:
    """Every path once, at the least of its costs; the others are not valid."""
    paths, costs, depths = candidates
    same = mx.all(paths[:, None] == paths[None], axis=-1)  # (K, K)
    least = mx.min(mx.where(same, costs, mx.inf), axis=-1)
    first = mx.argmax(same, axis=-1).view(mx.int32) == integers(range(len(depths)))
    return Candidates(paths, mx.where(first, least, mx.inf), depths)


_Number = TypeVar("_Number", float, mx.array)


def rising(cost: _Number, depth: _Number) -> _Number:
    """Costs that rise strictly along a path: however a sort treats ties, a parent comes before its
    child. The preference for shorter paths is a thousandth and changes nothing else."""
    return cost + (cost + 1) * (depth * (1 / 1024))


def best_nodes(candidates: Candidates, nodes: int) -> DraftTree:
    """The ``nodes`` candidates of lowest cost (OPT-Tree's rule: optimal for a fixed N, since the
    expected tokens of a step are one plus the sum of path probabilities), the root the first."""
    paths, costs, lengths = candidates
    depths = integers(lengths)
    # An array and not a number: one fused kernel serves every shape.
    root = mx.array(np.arange(paths.shape[1]) == 0)
    paths = mx.where((costs.reshape(-1, 1) < mx.inf) | root, paths, integers([NEVER]))
    if len(lengths) > nodes:
        chosen = mx.argsort(rising(costs, mx.array(lengths, mx.float32)))[:nodes]
        paths, depths = mx.take(paths, chosen, axis=0), mx.take(depths, chosen)
    # Over (N, N, L+2): is the second path a prefix of the first?
    ancestors = mx.all((paths[None] == END) | (paths[None] == paths[:, None]), axis=-1)
    tokens = mx.take_along_axis(paths, depths.reshape(-1, 1), axis=1).reshape(-1)
    return DraftTree(tokens, depths, ancestors, paths)
