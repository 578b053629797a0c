"""The target's pass over one node and over eight, of a dense model, experts and a hybrid.

From shapes alone: bytes are those of the sizes themselves, dispatches are counted on thin models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from mlx_redrafter.bench.counts import kinds, parts, sizes
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.drafters.lookup import Lookup
from mlx_redrafter.terminal import tables
from mlx_redrafter.tree.shape import TreeShape

_MB = 1e6
# Of thin models: from the first number on every layer adds as many kernels as the one four before.
_LAYERS = (8, 12)


def passes(tree: TreeShape, context: int) -> dict[str, dict[str, Any]]:
    """By base and number of nodes: dispatches of the verify pass, of the head and of moving what
    was accepted, and bytes; of weights the fewest and the most, which only experts tell apart."""
    shapes = (TreeShape.plain(), tree)
    found: dict[str, dict[str, Any]] = {}
    for name, config in kinds.BASES.items():
        target = kinds.base_of(config)
        less, more = (_counted(config, shapes, n) for n in _LAYERS)
        further = (target.config.num_layers - _LAYERS[0]) / (_LAYERS[1] - _LAYERS[0])
        found[name] = {}
        for i, shape in enumerate(shapes):
            least, most = (
                sizes.read(target, None, shape, context, alike) for alike in (True, False)
            )
            found[name][str(shape.nodes)] = {
                "dispatches": round(less[i] + further * (more[i] - less[i])),
                "weight_bytes": [least.target, most.target],
                "kept_bytes": least.kv,
            }
    return found


def _counted(config: Mapping[str, Any], shapes: tuple[TreeShape, ...], layers: int) -> list[int]:
    """Dispatches of the passes of a model with so many layers."""
    thin = kinds.thin({**config, "num_hidden_layers": layers, "vocab_size": 4096})
    drafter = kinds.usual(thin)
    kinds.evaluated(drafter)
    drafters: list[Drafter] = [Lookup(), drafter.bind(thin)]
    counts = [parts.count(thin, drafters, shape) for shape in shapes]
    return [sum(one.parts.get(part, (0, 0))[1] for part in parts.VERIFY) for one in counts]


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
