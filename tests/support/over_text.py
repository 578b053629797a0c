"""What drafters without rows say over true tokens, many positions at once."""

from __future__ import annotations

import mlx.core as mx

from mlx_redrafter.drafters.levels import LevelDrafter
from mlx_redrafter.drafters.recurrent import ReDrafter


def logits(
    drafter: ReDrafter | LevelDrafter, context: mx.array, tokens: mx.array
) -> list[mx.array]:
    """What a drafter as it is loaded says over true tokens.

    context (R, D), tokens (R, K) -> K arrays (R, Vd): what follows the k-th token. K is at most
    the ``levels`` that it was made for.
    """
    result = []
    if isinstance(drafter, LevelDrafter):
        state = drafter.first(context, tokens.shape[1])
        for k in range(tokens.shape[1]):
            out, state = drafter.level(k, tokens[:, k], state)
            result.append(out)
        return result
    state, fixed = drafter.starts(context)
    for k in range(tokens.shape[1]):
        out, state = drafter.step(tokens[:, k], state, fixed)
        result.append(out)
    return result
