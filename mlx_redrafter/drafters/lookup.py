"""Drafts from the text itself: what followed the last tokens where they stood before, or where
they stand in what the answer is predicted to be.

Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) inside the compiled step,
for one tree with the recurrent drafter's candidates: the two are right in different places.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_redrafter.cache.slabs import capacity_for
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


State = tuple[()] | mx.array


class Lookup(Forgetful):
    """Drafts from the text itself; a `drafters.Drafter` that every model has and that keeps
    nothing: the step's history is all it reads, and its state is what `foretold` gives, if a
    prediction came with the request."""

    part = TEXT
    features = None

    def begin(self, read: Features) -> tuple[()]:
        return ()

    def propose(self, state: State, ask: Ask) -> list[Candidates]:
        assert ask.history is not None, "the step keeps the tokens where somebody reads them"
        columns = ask.shape.longest + 2
        predicted = None if isinstance(state, tuple) else state
        if ask.shape.one_path:
            path = follow(ask.history, ask.position, columns, predicted)[0]
            return [Candidates(path[None], mx.array([0.0]), (ask.shape.lookup,))]
        return [search(ask.history, ask.position, ask.shape.lookup, columns, predicted)]

    def commit(self, state: State, done: Verified) -> State:
        return state


def foretold(prompt: Sequence[int], prediction: Sequence[int]) -> mx.array:
    """A predicted answer as `follow` searches it: (C,) int32, every token at the position that it
    has if the answer is just that, behind the prompt's last ones, so that the first step finds it;
    FILLER elsewhere, and at the end."""
    known = [*prompt[-LONGEST:], *prediction]
    start = len(prompt) - len(prompt[-LONGEST:])
    room = capacity_for(start + len(known) + 1)
    return mx.array([FILLER] * start + known + [FILLER] * (room - start - len(known)), mx.int32)


def search(
    history: mx.array,
    position: mx.array,
    length: int,
    columns: int,
    predicted: mx.array | None = None,
) -> Candidates:
    """The continuation of the longest, then latest, earlier match of up to four last tokens.

    A match so near that its continuation reaches the present goes on periodically.

    Args:
        history: (C,) int32, tokens by position; those behind ``position`` (1,), the root's, do not
            matter.
        length: drafted tokens.
        columns: of the candidates' paths, at least ``length`` + 2.
        predicted: see `follow`.

    Returns:
        Candidates, K = ``columns`` - 1: the root, then one path after the other, each a token
        longer. Beyond ``length``, and without a match, the cost is infinite.
    """
    path, size = follow(history, position, columns, predicted)
    costs = mx.take(_costs(length, columns - 1), size, axis=0).reshape(-1)
    return Candidates(prefixes(path), costs, tuple(range(columns - 1)))


def follow(
    history: mx.array, position: mx.array, columns: int, predicted: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """The root and what stood behind the match: path (columns,), which ends with END, or goes on
    with FILLER where nothing matched; how many tokens matched (1,).

    predicted: what the answer may be, as `foretold` has it. Of equally long matches it has the
    better one, and there the one nearest to the root's own position: what was inserted or left out
    so far is little. Such a match is trusted as the longest is.
    """
    end = LONGEST - 1  # matches that end earlier are let go
    last = mx.take(history, mx.maximum(position - integers(range(LONGEST)), 0))
    slots = integers(range(end, history.shape[0]))
    matched = _matched(history, last, slots < position)
    rank, text = matched * _FARTHEST + mx.where(matched > 0, slots, 0), history
    if predicted is not None:
        slots = integers(range(end, predicted.shape[0] - 1))
        matched = _matched(predicted, last, predicted[LONGEST:] >= 0)
        near = _FARTHEST - 1 - mx.abs(slots - position)  # above every slot of the history
        foreseen = matched * _FARTHEST + mx.where(matched > 0, near, 0)
        rank, text = mx.concatenate([rank, foreseen]), mx.concatenate([history, predicted])
    best = mx.argmax(rank, keepdims=True).view(mx.int32)
    size = mx.take(rank, best) // _FARTHEST  # (1,)
    place = integers(range(columns))
    # The root is where it is; the first draft stands behind the match, and so on: periodically,
    # where that reaches the present.
    ahead = best + end + 1 + (place - 1) % mx.maximum(position - best - end, 1)
    if predicted is not None:
        within = best > history.shape[0] - 1 - end
        beyond = mx.minimum(best + 2 * end + place, text.shape[0] - 1)
        ahead, size = mx.where(within, beyond, ahead), mx.where(within, LONGEST, size)
    path = mx.take(text, mx.where(place > 0, ahead, position))
    path = mx.where((size > 0) | (place < 1), path, FILLER)
    return mx.where(place == integers([columns - 1]), END, path), size


def _matched(text: mx.array, last: mx.array, run: mx.array) -> mx.array:
    """How many of the ``last`` tokens (LONGEST,), the latest first, stand before and at each slot
    from LONGEST - 1 on where ``run`` (n,) holds: (n,) int32."""
    found, n = mx.array(0, mx.int32), run.shape[0]
    for back in range(LONGEST):
        at = LONGEST - 1 - back
        run = run & (text[at : at + n] == last[back : back + 1])
        found = found + run
    return found


def _costs(length: int, rows: int) -> mx.array:
    """(LONGEST + 1, rows) float32: by the tokens that match, the costs of a chain and its root."""
    table = np.full((LONGEST + 1, rows), np.inf, np.float32)
    table[:, 0] = 0.0
    first, following = (-np.log(np.array(table, np.float32)) for table in (_FIRST, _NEXT))
    drafted = np.arange(length, dtype=np.float32)
    table[1:, 1 : length + 1] = first[:, None] + drafted * following[:, None]
    return mx.array(table)
