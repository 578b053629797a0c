"""From what the drafters propose to the tree that the target will check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_redrafter.cache.layer import Pass
from mlx_redrafter.drafters import Ask, Drafter
from mlx_redrafter.tree.nodes import (
    DraftTree,
    best_nodes,
    chain,
    distinct,
    joined,
    root_only,
    without_root,
)
from mlx_redrafter.tree.told import Proposed, only


def draft(
    drafters: Sequence[Drafter],
    states: Sequence[Any],
    passes: Sequence[Pass],
    ask: Ask,
    proposed: Mapping[int, Any],
) -> tuple[DraftTree, Proposed]:
    """The tree that the target will check, and what it was chosen from.

    Args:
        drafters, states, passes: those that take part, the state of each, and its own pass.
        proposed: see `step.drafted`.
    """
    shape = ask.shape
    if not shape.drafts:
        return root_only(ask.root), only(ask.root)
    asked = [i for i, drafter in enumerate(drafters) if drafter.part in shape.parts]
    found = [
        proposed[i]
        if i in proposed
        else drafters[i].propose(states[i], ask._replace(own=passes[i]))
        for i in asked
    ]
    if shape.one_path:
        path = found[0][0].paths.reshape(-1)
        return chain(path), only(path, drafters[asked[0]].part)
    first, *others = found
    rest = [without_root(parts) for parts in others]
    names = [
        drafters[i].part for i, own in zip(asked, [first, *rest], strict=True)
        for part in own for _ in part.depths
    ]  # fmt: skip
    candidates = joined([*first, *(part for parts in rest for part in parts)])
    if others:
        candidates = distinct(candidates)
    return best_nodes(candidates, shape.nodes), Proposed(candidates, names)
