"""The draft tree: which candidates the target checks in one pass, and who may see whom.

Worked example, width 2, depth 2, four nodes. Beam search proposes a trellis of candidates; the
best three join the root (scores are joint log-probabilities):

    candidate   0 "a"    1 "the"    2 "a cat"    3 "the dog"
    parent      root     root       0            1
    score       -0.4     -1.5       -0.9         -2.0

    slot        0 root   1 "a"      2 "the"      3 "cat"
    parents     0        0          0            1
    depths      0        1          1            2
    ancestors   x...     xx..       x.x.         xx.x       (row i: what node i may attend to)

The chosen set is closed under parents because a child's joint score never exceeds its parent's
and ties go to the lower candidate number, which is the shallower one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

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
        limits = {
            "beam width": (self.width, 1, 16),
            "beam length": (self.depth, 0 if self.lookup else 1, 16),
            "lookup": (self.lookup, 0, 16),
        }
        for name, (value, low, high) in limits.items():
            if not low <= value <= high:
                raise OptionError(f"{name} {value} is not possible: use {low} to {high}")
        if self.mode not in MODES:
            raise OptionError(f"candidate mode {self.mode!r} is unknown: use {' or '.join(MODES)}")
        most = 1 + self.width * self.depth + self.lookup
        if not 1 <= self.nodes <= most:
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
    """Proposed nodes, shallow ones first, from any source.

    tokens (K,) int32; parents (K,) int32, another candidate's number or -1 for the root; scores
    (K,) float32, joint log-probability along the path, never above the parent's; -inf: not valid.
    """

    tokens: mx.array
    parents: mx.array
    scores: mx.array


class DraftTree(NamedTuple):
    """tokens (N,) int32 (-1: filler that nothing matches); parents (N,) int32, the root is its own
    parent; depths (N,) int32; ancestors (N, N) bool, self included. Slot 0 is the root."""

    tokens: mx.array
    parents: mx.array
    depths: mx.array
    ancestors: mx.array


def integers(values: Iterable[int]) -> mx.array:
    """A constant (n,) int32 of the graph: mx.arange would be computed anew in every step."""
    return mx.array(np.fromiter(values, np.int32))


def root_only(root: mx.array) -> DraftTree:
    """The tree of plain decoding. root (1,) int32."""
    zero = integers([0])
    return DraftTree(root, zero, zero, mx.array([[True]]))


def chain(root: mx.array, candidates: Candidates) -> DraftTree:
    """Candidates that follow one another; everything but the tokens is known beforehand."""
    n = candidates.tokens.shape[0] + 1
    return DraftTree(
        mx.concatenate([root, candidates.tokens]),
        integers([0, *range(n - 1)]),
        integers(range(n)),
        mx.array(np.tri(n, dtype=bool)),
    )


def best_nodes(root: mx.array, candidates: Candidates, nodes: int, depth: int) -> DraftTree:
    """The root and the ``nodes - 1`` candidates of highest joint score (OPT-Tree's rule: optimal
    for a fixed N, since the expected tokens of a step are one plus the sum of path probabilities).

    root (1,) int32; candidates of at most ``depth`` levels. Works on K x K and N x N arrays only.
    """
    tokens, parents, scores = candidates
    k = tokens.shape[0]
    if k == nodes - 1:
        slot = integers(range(1, nodes))
        chosen_scores = scores
    else:
        lower = mx.array(np.tri(k, k=-1, dtype=bool))  # (K, K): the candidates with lower numbers
        column = scores.reshape(k, 1)
        ahead = ((scores > column) | ((scores == column) & lower)).sum(-1)
        # An array and not a number: one fused kernel serves every size.
        picked = ahead < integers([nodes - 1] * k)  # (K,)
        slot = (picked & lower).sum(-1) + 1  # of those that are picked
        wanted = integers(range(1, nodes)).reshape(-1, 1)
        chosen = mx.argmax(picked & (slot == wanted), axis=-1)  # (N-1,)
        tokens, parents = mx.take(tokens, chosen), mx.take(parents, chosen)
        chosen_scores = mx.take(scores, chosen)
    valid = chosen_scores > -mx.inf
    # A parent of -1, the root, looks at the last entry, which does not matter.
    parent_slot = mx.where(valid & (parents >= 0), mx.take(slot, parents), 0)
    node_tokens = mx.concatenate([root, mx.where(valid, tokens, -1)])
    return _with_ancestors(node_tokens, mx.concatenate([integers([0]), parent_slot]), depth)


def _with_ancestors(tokens: mx.array, parents: mx.array, depth: int) -> DraftTree:
    """Transitive closure by pointer doubling: after k rounds a node sees 2^k ancestors."""
    n = tokens.shape[0]
    own = mx.array(np.eye(n, dtype=bool))
    # One round needs no look at a matrix: a node sees itself and its parent.
    ancestors = own | (parents.reshape(n, 1) == integers(range(n)))
    jump, reach = mx.take(parents, parents), 2
    while reach <= depth:
        ancestors = ancestors | mx.take(ancestors, jump, axis=0)
        jump = mx.take(jump, jump)
        reach *= 2
    return DraftTree(tokens, parents, ancestors.sum(-1) - 1, ancestors)
