"""Answers that follow a grammar.

The token at a position is the argmax of (filtered log p + noise) over the legal tokens; where the
filters left none of these, over all that are legal. What was chosen without the mask, if it is
legal, is that token: so a step runs as ever, the host reads its text, and only where a token is not
legal is the choice made again, at that node and with the same noise. Masks are not needed before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_redrafter.cache.layer import Pass, Rows
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import Arrays
from mlx_redrafter.drafters import Drafter, Verified
from mlx_redrafter.models.features import Features
from mlx_redrafter.tree.nodes import END, DraftTree, integers

MOST_FORCED = 8  # tokens of a step that were known before; every number is a graph of its own
_LEAST = -3e38  # below the score of every token that the filters left


class Place(Protocol):
    """Where an answer stands in its grammar."""

    end: int
    """The token that ends an answer; there may be others."""

    @property
    def over(self) -> bool:
        """Was the end taken?"""
        ...

    def take(self, tokens: Sequence[int]) -> int:
        """Go on with tokens up to the first that is not legal, or that nothing can follow but the
        end: with how many."""
        ...

    def mask(self) -> npt.NDArray[np.uint32]:
        """The legal tokens, a bit each, the lowest of a word first: (V / 32,), rounded up."""
        ...

    def forced(self, most: int) -> list[int]:
        """The next tokens, as many as are certain, up to the end; it stays where it is."""
        ...


class Grammar(Protocol):
    """What an answer may be."""

    def begin(self) -> Place:
        """For one answer."""
        ...


class Held(NamedTuple):
    """What a step leaves so that the choice at a node can be made again: the logits (N, V), and the
    rest as in `Verified`; outputs: of the layers that the drafters read. states: the drafters',
    before the step."""

    logits: mx.array
    tree: DraftTree
    hidden: mx.array
    outputs: tuple[mx.array, ...]
    choices: mx.array
    last: mx.array
    position: mx.array
    states: tuple[Any, ...]


class Chosen(NamedTuple):
    """What a choice that was made again changes of a step; see `step.State`. token (1,);
    produced (1,), its tokens; text (L+2,); rows: by the drafters' layers."""

    token: mx.array
    produced: mx.array
    text: mx.array
    drafts: tuple[Any, ...]
    rows: list[Rows]


Again = Callable[[Held, Any, Arrays, mx.array, mx.array], Chosen]


class Leaving(Pass):
    """A pass of a step that was done, to which drafters leave their rows once more."""

    fresh = False  # what is to be read was read

    def __init__(self, position: mx.array, layers: int) -> None:
        super().__init__([()] * layers, position)


def again(
    drafters: Sequence[Drafter],
    windows: Sequence[tuple[str, int]],
    layers: tuple[int, ...],
    held: Held,
    history: Any,
    arrays: Arrays,
    bits: mx.array,
    depth: mx.array,
) -> Chosen:
    """The choice behind the node at a depth (1,) of the accepted path, among the legal tokens.

    Args:
        windows: of the penalties, as in `StepSpec`.
        layers: those of ``held.outputs``.
        history: as in `State`.
        bits: (V / 32,) uint32, see `Place.mask`.
    """
    tree, position, n = held.tree, held.position, held.hidden.shape[0]
    path = mx.take(tree.ancestors, held.last, axis=0).reshape(-1)
    at = mx.argmax(path & (tree.depths == depth), keepdims=True).view(mx.int32)
    node = DraftTree(*(mx.take(part, at, axis=0) for part in tree))
    recent = {
        name: sampling.recent_tokens(node, history, position, size)
        for name, size in windows
        if not isinstance(history, tuple)
    }
    token = choose(mx.take(held.logits, at, axis=0), node, recent, arrays, position, bits)
    if n == 1:
        text = mx.concatenate([tree.tokens, token])
    else:
        place = integers(range(tree.paths.shape[1]))
        text = mx.where(place == depth + 1, token, END)
        text = mx.where(place <= depth, node.paths.reshape(-1), text)
    choices = mx.where(integers(range(n)) == at, token, held.choices)
    read = Features(held.hidden, layers, held.outputs)
    done = Verified(tree, read, at, depth + 1, text, choices, position)
    passes = [Leaving(position, len(drafter.caches)) for drafter in drafters]
    drafts = committed(drafters, held.states, done, passes)
    return Chosen(token, depth + 1, text, drafts, [r for run in passes for r in run.rows])


def choose(
    logits: mx.array,
    node: DraftTree,
    windows: dict[str, mx.array],
    arrays: Arrays,
    position: mx.array,
    bits: mx.array,
) -> mx.array:
    """The rule above for one node; arguments as of `sampling.sample`, bits as of `again`: (1,)."""
    every = integers(range(logits.shape[-1]))
    legal = (mx.take(bits, every >> 5) >> (every & 31).astype(mx.uint32)) & 1 > 0
    logits = sampling.penalise(logits.astype(mx.float32), windows, arrays)
    kept = logits
    if "seed" in arrays:
        keys = sampling.noise_keys(arrays["seed"], position + 1 + node.depths)
        drawn = sampling.gumbel(keys, every)
        kept = sampling.restrict(logits, arrays) / arrays["temp"] + drawn
        logits = logits / arrays["temp"] + drawn
    # Comparisons are false for what is not a number: it counts as least, and a legal token is left.
    kept = mx.where(legal & (kept > -mx.inf), kept, -mx.inf)
    others = mx.where(legal, mx.where(logits > _LEAST, logits, _LEAST), -mx.inf)
    scores = mx.where(mx.max(kept) > -mx.inf, kept, others)
    return mx.argmax(scores, axis=-1).view(mx.int32)


def committed(
    drafters: Sequence[Drafter], states: Sequence[Any], done: Verified, passes: Sequence[Pass]
) -> tuple[Any, ...]:
    """The drafters' states after a step."""
    every = zip(drafters, states, passes, strict=True)
    return tuple(drafter.commit(state, done._replace(own=own)) for drafter, state, own in every)
