"""A step's draft tree in plain numbers, for those who want to look at it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_redrafter.tree.nodes import END, FILLER, Candidates, DraftTree, integers, prefixes
from mlx_redrafter.tree.shape import BEAMS, TEXT

GRAMMAR = "grammar"  # what it leaves no choice about is no draft of anybody
_PARTS = ("", BEAMS, TEXT, GRAMMAR)


class Proposed(NamedTuple):
    """What a tree was chosen from: candidates, and the part of the tree that each is of."""

    candidates: Candidates
    parts: Sequence[str]


@dataclass(frozen=True)
class ToldNode:
    """A candidate. The root, which was decided before, is the first one.

    Args:
        token: its own.
        parent: the number of the node before it; -1: the root's.
        cost: negative joint log-probability of its path; None: the drafter says none.
        part: what proposed it, as of `TreeShape.parts`, or GRAMMAR; empty: the root.
        checked: was it in the tree that the target saw?
        kept: is it part of the text?
        choice: the target's own token behind it; None: it was not checked.
    """

    token: int
    parent: int
    cost: float | None
    part: str
    checked: bool
    kept: bool
    choice: int | None


@dataclass(frozen=True)
class ToldTree:
    """All candidates of a step, parents before their children, and the bonus token."""

    nodes: tuple[ToldNode, ...]
    bonus: int


def only(path: mx.array, part: str = "") -> Proposed:
    """What the tree of one path (L+2,), or of the root alone (1,), was chosen from. A chain's
    drafter says no costs."""
    if path.shape[0] == 1:
        return Proposed(Candidates(path.reshape(1, 1), mx.array([0.0]), (0,)), [part])
    rows = path.shape[0] - 1
    costs = mx.array([0.0, *[math.nan] * (rows - 1)])
    return Proposed(Candidates(prefixes(path), costs, tuple(range(rows))), [part] * rows)


def told(proposed: Proposed, tree: DraftTree, choices: mx.array) -> mx.array:
    """Everything about K candidates and N nodes in one array (M,) int32, which `read` reads.

    choices: (N,) int32, the target's token after every node.
    """
    paths, costs, _ = proposed.candidates
    sizes = integers([*paths.shape, tree.tokens.shape[0]])
    bits = costs.astype(mx.float32).view(mx.int32)
    parts = integers(map(_PARTS.index, proposed.parts))
    checked = tree.paths.reshape(-1)
    return mx.concatenate([sizes, paths.reshape(-1), bits, parts, checked, choices])


def read(numbers: Sequence[int], text: Sequence[int]) -> ToldTree:
    """The tree of what `told` made.

    Args:
        text: the root's token, those that were accepted, and the bonus.
    """
    count, columns, size = numbers[:3]
    ends = np.cumsum([3, count * columns, count, count, size * columns, size])
    table = np.array(numbers, np.int32)
    paths, costs, parts, checked, choices = (table[a:b] for a, b in pairwise(ends))
    chosen = dict(zip(_paths(checked, columns), choices.tolist(), strict=True))
    kept, places, nodes = tuple(text[:-1]), dict[tuple[int, ...], int](), list[ToldNode]()
    all_costs = costs.view(np.float32).tolist()
    found = zip(_paths(paths, columns), all_costs, parts.tolist(), strict=True)
    for path, cost, number in sorted(found, key=lambda one: len(one[0])):
        if FILLER in path or cost == math.inf or path in places:
            continue
        places[path] = len(nodes)
        value = None if math.isnan(cost) else cost
        choice, own = chosen.get(path), kept[: len(path)] == path
        parent, part = places.get(path[:-1], -1), _PARTS[number] if len(path) > 1 else ""
        nodes.append(ToldNode(path[-1], parent, value, part, path in chosen, own, choice))
    return ToldTree(tuple(nodes), text[-1])


def _paths(flat: np.ndarray, columns: int) -> Iterable[tuple[int, ...]]:
    """Rows without what is behind their end."""
    for row in flat.reshape(-1, columns).tolist():
        yield tuple(row[: row.index(END)] if END in row else row)
