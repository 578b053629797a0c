"""Drafts from the text itself: what followed the last tokens where they stood before.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) inside the compiled step,
for one tree with the recurrent drafter's candidates: the two are right in different places.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafters import Ask, Forgetful, Verified
from mlx_redrafter.models.features import Features
from mlx_redrafter.tree.nodes import END, FILLER, Candidates, integers, prefixes
from mlx_redrafter.tree.shape import TEXT

# How often the first token, and each one after a right one, is right, by the tokens that match:
# answers of the built-in model, greedy and sampled (docs/decisions.md).
_FIRST = (0.17, 0.48, 0.56, 0.80)
_NEXT = (0.60, 0.68, 0.74, 0.88)
LONGEST = len(_FIRST)
_FARTHEST = 1 << 28  # beyond every position; not the capacity, which would be in a kernel's source


class Lookup(Forgetful):
    """Drafts from the text itself; a `drafters.Drafter` that every model has and that keeps
    nothing: the step's history is all it reads."""

    part = TEXT
    features = None

    def begin(self, read: Features) -> tuple[()]:
        return ()

    def propose(self, state: tuple[()], ask: Ask) -> list[Candidates]:
        assert ask.history is not None, "the step keeps the tokens where somebody reads them"
        columns = ask.shape.longest + 2
        if ask.shape.one_path:
            path = follow(ask.history, ask.position, columns)[0]
            return [Candidates(path[None], mx.array([0.0]), (ask.shape.lookup,))]
        return [search(ask.history, ask.position, ask.shape.lookup, columns)]

    def commit(self, state: tuple[()], done: Verified) -> tuple[()]:
        return ()


def search(history: mx.array, position: mx.array, length: int, columns: int) -> Candidates:
    """The continuation of the longest, then latest, earlier match of up to four last tokens.

    A match so near that its continuation reaches the present goes on periodically.

    Args:
        history: (C,) int32, tokens by position; those behind ``position`` (1,), the root's, do not
            matter.
        length: drafted tokens.
        columns: of the candidates' paths, at least ``length`` + 2.

    Returns:
        Candidates, K = ``columns`` - 1: the root, then one path after the other, each a token
        longer. Beyond ``length``, and without a match, the cost is infinite.
    """
    path, size = follow(history, position, columns)
    costs = mx.take(_costs(length, columns - 1), size, axis=0).reshape(-1)
    return Candidates(prefixes(path), costs, tuple(range(columns - 1)))


def follow(history: mx.array, position: mx.array, columns: int) -> tuple[mx.array, mx.array]:
    """The root and what stood behind the match: path (columns,), which ends with END, or goes on
    with FILLER where nothing matched; how many tokens matched (1,)."""
    capacity = history.shape[0]
    slots = integers(range(LONGEST - 1, capacity))  # matches that end earlier are let go
    last = mx.take(history, mx.maximum(position - integers(range(LONGEST)), 0))
    run = slots < position
    matched = mx.array(0, mx.int32)
    for back in range(LONGEST):
        there = history[LONGEST - 1 - back : capacity - back]
        run = run & (there == last[back : back + 1])
        matched = matched + run
    rank = matched * _FARTHEST + mx.where(matched > 0, slots, 0)
    best = mx.argmax(rank, keepdims=True).view(mx.int32)
    size = mx.take(rank, best) // _FARTHEST  # (1,)
    best = best + (LONGEST - 1)
    place = integers(range(columns))
    # The root is where it is; the first draft stands behind the match, and so on.
    ahead = best + 1 + (place - 1) % mx.maximum(position - best, 1)
    path = mx.take(history, mx.where(place > 0, ahead, position))
    path = mx.where((size > 0) | (place < 1), path, FILLER)
    return mx.where(place == integers([columns - 1]), END, path), size


def _costs(length: int, rows: int) -> mx.array:
    """(LONGEST + 1, rows) float32: by the tokens that match, the costs of a chain and its root."""
    table = np.full((LONGEST + 1, rows), np.inf, np.float32)
    table[:, 0] = 0.0
    first, following = (-np.log(np.array(table, np.float32)) for table in (_FIRST, _NEXT))
    drafted = np.arange(length, dtype=np.float32)
    table[1:, 1 : length + 1] = first[:, None] + drafted * following[:, None]
    return mx.array(table)
