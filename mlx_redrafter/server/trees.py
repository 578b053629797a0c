"""A draft tree as clients are told it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_redrafter.tree.told import ToldTree

Spell = Callable[[list[int]], str]


def shown(tree: ToldTree, spell: Spell) -> dict[str, Any]:
    """Plain values; ``spell`` makes text of tokens."""
    nodes = [
        {
            "text": spell([node.token]),
            "parent": node.parent,
            "cost": None if node.cost is None else round(node.cost, 4),
            "part": node.part,
            "checked": node.checked,
            "kept": node.kept,
            "choice": None if node.choice is None else spell([node.choice]),
        }
        for node in tree.nodes
    ]
    return {"nodes": nodes, "bonus": spell([tree.bonus])}
