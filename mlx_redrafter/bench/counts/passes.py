"""The target's pass over one node and over eight, of a dense model, experts and a hybrid.

From shapes alone: bytes are those of the sizes themselves, dispatches are counted on thin models.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mlx_redrafter.bench.counts import kinds, parts, sizes
from mlx_redrafter.drafters.lookup import Lookup
from mlx_redrafter.terminal import tables
from mlx_redrafter.tree.shape import TreeShape

_MB = 1e6


def passes(tree: TreeShape, context: int) -> dict[str, dict[str, Any]]:
    """By base and number of nodes: dispatches of the verify pass, of the head and of moving what
    was accepted, and bytes; of weights the fewest and the most, which only experts tell apart."""
    found: dict[str, dict[str, Any]] = {}
    for name, config in kinds.BASES.items():
        thin, target = kinds.thin(config), kinds.base_of(config)
        drafter = kinds.usual(thin)
        kinds.evaluated(drafter)
        found[name] = {}
        for shape in (TreeShape.plain(), tree):
            counts = parts.count(thin, [Lookup(), drafter.bind(thin)], shape)
            least, most = (
                sizes.read(target, None, shape, context, alike) for alike in (True, False)
            )
            found[name][str(shape.nodes)] = {
                "dispatches": sum(counts.parts.get(part, (0, 0))[1] for part in parts.VERIFY),
                "unknown_kinds": sorted(counts.unknown),
                "weight_bytes": [least.target, most.target],
                "kept_bytes": least.kv,
            }
    return found


def table(found: dict[str, dict[str, Any]]) -> Table:
    """As a person reads it."""
    result = tables.table(
        "a pass, 4 bits", "nodes", "dispatches", "MB of weights", "MB of KV and states"
    )
    for name, by_nodes in found.items():
        for nodes, row in by_nodes.items():
            least, most = (f"{size / _MB:.0f}" for size in row["weight_bytes"])
            weights = least if least == most else f"{least} to {most}"
            kept = f"{row['kept_bytes'] / _MB:.0f}"
            result.add_row(name, nodes, str(row["dispatches"]), weights, kept)
    return result
