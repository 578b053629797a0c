"""Walk the draft tree with the target's own choices.

At a node the target's token for the next position is known; if a child carries it, go there;
otherwise it is the bonus token. The draft decides how many tokens come out of a pass, never which.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_redrafter.decoding.tree import DraftTree, integers


def walk(tree: DraftTree, choices: mx.array, depth: int) -> tuple[mx.array, mx.array]:
    """The longest branch that the target would have written itself.

    Args:
        tree: ``N`` nodes, no two children of a node with the same token.
        choices: (N,) int32, the target's token after every node.
        depth: ``L``, the deepest a node can be.

    Returns:
        path (L+1,) int32: the slot of the accepted node at each depth, the root first; entries
        past the end repeat slot 0. count (1,) int32: accepted nodes, root included; as many
        tokens come out of the step: ``choices[path[:count]]``.
    """
    tokens, parents, depths, ancestors = tree
    n = tokens.shape[0]
    if n == 1:
        return integers([0]), integers([1])
    matches = tokens == mx.take(choices, parents)  # (N,)
    first = mx.array(np.arange(n) == 0)
    accepted = mx.all(matches | first | ~ancestors, axis=-1)  # (N,) every ancestor matches
    last = mx.argmax(mx.where(accepted, depths, -1))
    on_path = mx.take(ancestors, last, axis=0)  # (N,)
    levels = integers(range(depth + 1)).reshape(-1, 1)
    path = mx.argmax(on_path & (depths == levels), axis=-1)
    return path.view(mx.int32), mx.take(depths, last).reshape(1) + 1
