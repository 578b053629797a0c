"""Speed by width, depth and nodes: which tree is best on this machine?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_redrafter.bench.speed.compare import Comparison, Encoded, Turn
from mlx_redrafter.bench.speed.summary import ALL
from mlx_redrafter.bench.speed.ways import AUTOMATIC, Way, ours
from mlx_redrafter.budget.yields import LOOKUP
from mlx_redrafter.tree.shape import TreeShape

WIDTHS, DEPTHS, NODES = (1, 2, 3, 4), (1, 2, 3, 4), (3, 5, 8, 12)
BLOCK = 6  # shapes per turn: plain decoding, which they are compared with, is never far


def grid() -> list[TreeShape]:
    """Every width x depth with every number of nodes; lookup among the candidates, as in all shapes
    that the policy may choose."""
    return [
        TreeShape(width, depth, nodes, lookup=LOOKUP)
        for width in WIDTHS
        for depth in DEPTHS
        for nodes in NODES
        if nodes > depth and nodes <= 1 + width * depth + LOOKUP and (depth > 1 or width == 1)
    ]


def turns(
    comparison: Comparison, shapes: Sequence[TreeShape], usual: Way, prompts: Sequence[Encoded]
) -> Iterator[Turn]:
    """The shapes in blocks, each with plain and the automatic choice among them; all blocks of
    a prompt before the next prompt."""
    model, length, seed = comparison.model, comparison.max_tokens, comparison.seed
    blocks = [shapes[i : i + BLOCK] for i in range(0, len(shapes), BLOCK)]
    for number, prompt in enumerate(prompts):
        for block in blocks:
            mine = (ours(model, s, length, seed, sparse=comparison.sparse) for s in block)
            comparison.others = [usual, *mine]
            yield from comparison.turns([prompt], number)


def cells(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], Mapping[str, Any]]:
    """By (width, depth) the row of the fastest number of nodes, over all prompts."""
    found: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in rows:
        shape = row["shape"]
        if row["group"] != ALL or row["way"] == AUTOMATIC or not shape or shape["nodes"] == 1:
            continue
        key = (shape["width"], shape["depth"])
        if key not in found or row["times_plain"] > found[key]["times_plain"]:
            found[key] = row
    return found


def best(found: Mapping[tuple[int, int], Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the fastest cell."""
    return max(found.values(), key=lambda row: row["times_plain"], default=None)
