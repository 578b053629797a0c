"""Drafts from the text itself: what followed the last tokens where they stood before.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) inside the compiled step,
and one tree with the recurrent drafter's candidates: the two are right in different places.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_redrafter.decoding.tree import Candidates, integers

# How often the first token, and each one after a right one, is right, by the tokens that match:
# answers of the built-in model, greedy and sampled (docs/decisions.md).
_FIRST = (0.17, 0.48, 0.56, 0.80)
_NEXT = (0.60, 0.68, 0.74, 0.88)
LONGEST = len(_FIRST)
_FARTHEST = 1 << 28  # beyond every position; not the capacity, which would be in a kernel's source


def search(history: mx.array, position: mx.array, length: int) -> Candidates:
    """The continuation of the longest, then latest, earlier match of up to four last tokens.

    A match so near that its continuation reaches the present goes on periodically.

    Args:
        history: (C,) int32, tokens by position; those behind ``position`` (1,) do not matter.
        length: drafted tokens.

    Returns:
        Candidates, K = ``length``, one after the other; token -1 and score -inf without a match.
    """
    capacity = history.shape[0]
    slots = integers(range(capacity))
    last = mx.take(history, mx.maximum(position - integers(range(LONGEST)), 0))
    before = mx.pad(history, (LONGEST - 1, 0), constant_values=-1)  # which is no token
    run = slots < position
    matched = mx.array(0, mx.int32)
    for back in range(LONGEST):
        there = before[LONGEST - 1 - back :][:capacity]
        run = run & (there == last[back : back + 1])
        matched = matched + run
    rank = matched * _FARTHEST + mx.where(matched > 0, slots, 0)
    best = mx.argmax(rank, keepdims=True).view(mx.int32)
    size = mx.take(rank, best) // _FARTHEST  # (1,)
    ahead = integers(range(length))
    tokens = mx.take(history, best + 1 + ahead % mx.maximum(position - best, 1))
    scores = mx.take(_scores(length), size, axis=0).reshape(-1)
    return Candidates(mx.where(size > 0, tokens, -1), integers(range(-1, length - 1)), scores)


def _scores(length: int) -> mx.array:
    """(LONGEST + 1, length) float32: by the tokens that match, the scores of a chain."""
    first, following = (np.log(np.array(table, np.float32)) for table in (_FIRST, _NEXT))
    table = first[:, None] + np.arange(length, dtype=np.float32) * following[:, None]
    return mx.array(np.concatenate([np.full((1, length), -np.inf, np.float32), table]))


def merge(beams: Candidates, chain: Candidates, width: int) -> Candidates:
    """A trellis of beams, W per level, and a chain from the same root, each path only once.

    Where a beam is the beginning of the chain it gets the better score of the two, and the chain
    goes on from there.
    """
    count, length = beams.tokens.shape[0], chain.tokens.shape[0]
    # Arrays, and no numbers in the source of fused kernels: these serve every shape.
    levels = np.arange(count) // width
    level = integers(np.minimum(levels, length - 1))  # what of the chain is on a beam's level
    same = (beams.tokens == mx.take(chain.tokens, level)) & mx.array(levels < length)
    jump, reach = beams.parents, 1
    while reach < min(count // width, length):
        # The root's children, with parent -1, look at the last entry, which does not matter.
        same = same & (mx.take(same, jump) | (jump < 0))
        jump = mx.where(jump < 0, -1, mx.take(jump, jump))
        reach *= 2
    at = same & mx.array(levels == np.arange(length)[:, None])  # (L, K), one per row at most
    held = mx.any(at, axis=-1)
    own = integers(range(count, count + length))
    place = mx.where(held, mx.argmax(at, axis=-1).view(mx.int32), own)
    raised = mx.maximum(beams.scores, mx.take(chain.scores, level))
    return Candidates(
        mx.concatenate([beams.tokens, chain.tokens]),
        mx.concatenate([beams.parents, integers([-1]), place[:-1]]),
        mx.concatenate(
            [mx.where(same, raised, beams.scores), mx.where(held, -mx.inf, chain.scores)]
        ),
    )
