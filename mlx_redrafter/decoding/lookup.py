"""Drafts from the text itself: what followed the last tokens where they stood before.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) inside the compiled step,
and one tree with the recurrent drafter's candidates: the two are right in different places.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_redrafter.decoding.tree import Candidates

# How often the first token, and each one after a right one, is right, by the tokens that match:
# answers of the built-in model, greedy and sampled (docs/decisions.md).
_FIRST = (0.17, 0.48, 0.56, 0.80)
_NEXT = (0.60, 0.68, 0.74, 0.88)
LONGEST = len(_FIRST)
_FARTHEST = 1 << 28  # beyond every position; not the capacity, which would be in a kernel's source


def search(history: mx.array, root: mx.array, position: mx.array, length: int) -> Candidates:
    """The continuation of the longest, then latest, earlier match of up to four last tokens.

    A match so near that its continuation reaches the present goes on periodically.

    Args:
        history: (C,) int32, tokens by position; those from ``position`` on do not matter.
        root: (1,) int32, the token at ``position`` (1,).
        length: drafted tokens.

    Returns:
        Candidates, K = ``length``, one after the other; token -1 and score -inf without a match.
    """
    slots = mx.arange(history.shape[0], dtype=mx.int32)
    text = mx.slice_update(history, root, position, (0,))
    run = slots < position
    matched = mx.zeros(slots.shape, mx.int32)
    for back in range(LONGEST):
        here = mx.take(text, mx.maximum(position - back, 0))
        there = mx.take(text, mx.maximum(slots - back, 0))
        run = run & (there == here) & (slots >= back)
        matched = matched + run
    best = mx.argmax(matched * _FARTHEST + slots * (matched > 0), keepdims=True)
    best = best.astype(mx.int32)
    size = mx.take(matched, best)  # (1,)
    steps = mx.arange(length, dtype=mx.int32)
    tokens = mx.take(text, best + 1 + steps % mx.maximum(position - best, 1))
    first, following = ([math.log(p) for p in table] for table in (_FIRST, _NEXT))
    kind = mx.maximum(size - 1, 0)
    scores = mx.take(mx.array(first), kind) + steps * mx.take(mx.array(following), kind)
    found = size > 0
    return Candidates(mx.where(found, tokens, -1), steps - 1, mx.where(found, scores, -mx.inf))


def merge(beams: Candidates, chain: Candidates, width: int) -> Candidates:
    """A trellis of beams, W per level, and a chain from the same root, each path only once.

    Where a beam is the beginning of the chain it gets the better score of the two, and the chain
    goes on from there.
    """
    count, length = beams.tokens.shape[0], chain.tokens.shape[0]
    # Arrays, and no numbers in the source of fused kernels: these serve every shape.
    level = np.arange(count) // width
    near = mx.array(np.minimum(level, length - 1), mx.int32)
    same = beams.tokens == mx.take(chain.tokens, near)
    same = same & mx.array(level < length)
    jump, reach = beams.parents, 1
    while reach < min(count // width, length):
        above = mx.maximum(jump, 0)
        same = same & (mx.take(same, above) | (jump < 0))
        jump = mx.where(jump < 0, -1, mx.take(jump, above))
        reach *= 2
    at = same[None] & mx.array(level == np.arange(length)[:, None])  # (L, K), one a row at most
    held = mx.any(at, axis=-1)
    own = mx.arange(count, count + length, dtype=mx.int32)
    place = mx.where(held, mx.argmax(at, axis=-1).astype(mx.int32), own)
    parents = mx.concatenate([mx.full((1,), -1, mx.int32), place[:-1]])
    raised = mx.maximum(beams.scores, mx.take(chain.scores, near))
    return Candidates(
        mx.concatenate([beams.tokens, chain.tokens]),
        mx.concatenate([beams.parents, parents]),
        mx.concatenate(
            [mx.where(same, raised, beams.scores), mx.where(held, -mx.inf, chain.scores)]
        ),
    )
