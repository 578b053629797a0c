"""Walk the draft tree with the target's own choices.

At a node the target's token for the next position is known; if a child carries it, go there;
otherwise it is the bonus token. The draft decides how many tokens come out of a pass, never which.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_redrafter.tree.nodes import END, DraftTree, integers


def accept(tree: DraftTree, choices: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The longest branch that the target would have written itself.

    Args:
        tree: ``N`` nodes, no two with the same path.
        choices: (N,) int32, the target's token after every node.

    Returns:
        last (1,) int32: the slot of the deepest accepted node. count (1,) int32: how many tokens
        come out of the step. text (L+2,) int32: the root's token, then these: the accepted drafts
        and the bonus token; then END.
    """
    tokens, depths, ancestors, paths = tree
    n = tokens.shape[0]
    if n == 1:
        return integers([0]), integers([1]), mx.concatenate([tokens, choices])
    following = mx.take(paths[:, 1:], depths, axis=1)  # (N, N): what path i holds after node j
    itself = mx.array(np.eye(n, dtype=bool))
    accepted = mx.all((following == choices) | ~ancestors | itself, axis=-1)
    last = mx.argmax(mx.where(accepted, depths, -1), keepdims=True).view(mx.int32)
    depth, bonus = mx.take(depths, last), mx.take(choices, last)
    path = mx.take(paths, last, axis=0).reshape(-1)
    place = integers(range(paths.shape[1]))
    text = mx.where(place <= depth, path, mx.where(place == depth + 1, bonus, END))
    return last, depth + 1, text
