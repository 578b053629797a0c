"""One decode step: draft, choose a tree, verify, accept, commit. One compiled graph per bucket.

Everything that varies from step to step is an array; the tree's shape, the caches' capacity and the
active sampling features are the bucket. Only the tokens go back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, LayerCache, Pass, Rows, capacity_of, new_caches
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import Arrays
from mlx_redrafter.drafters import Ask, Drafter, Verified
from mlx_redrafter.models import Target
from mlx_redrafter.models.features import Features
from mlx_redrafter.tree.accept import accept
from mlx_redrafter.tree.nodes import (
    DraftTree,
    best_nodes,
    chain,
    distinct,
    integers,
    joined,
    root_only,
    without_root,
)
from mlx_redrafter.tree.shape import TreeShape


class State(NamedTuple):
    """What stays on the device between steps; one pytree of arrays, absent parts are ().

    root (1,) int32     the last token: chosen, but not yet in the caches
    position (1,) int32 the root's
    caches              what every layer remembers
    drafts              every drafter's state
    history (C,) int32  the tokens by position, the root's included, where somebody reads them
    pending             that step's own rows by layer, and the slots (N,) int32 where they belong.
                        The next step puts them there before its own. Moving them at once would read
                        and write a slab back to back, and MLX copies a buffer whose reader is still
                        in flight.
    """

    root: mx.array
    position: mx.array
    caches: list[Kept]
    drafts: tuple[Any, ...] = ()
    history: mx.array | tuple[()] = ()
    pending: tuple[list[Rows], mx.array] | tuple[()] = ()


def nothing_pending(
    kinds: Sequence[LayerCache], caches: Sequence[Kept], shape: TreeShape
) -> tuple[list[Rows], mx.array] | tuple[()]:
    """What the first step of an answer finds pending: as after a step of its own shape."""
    if not waits(kinds, shape):
        return ()
    rows = [kind.nothing(kept, shape.nodes) for kind, kept in zip(kinds, caches, strict=True)]
    capacity = capacity_of(kinds, caches) or 1 << 30
    return rows, mx.full((shape.nodes,), capacity - 1, mx.int32)  # a slot that is not read yet


def waits(kinds: Sequence[LayerCache], shape: TreeShape) -> bool:
    """Does a step of this shape leave rows to be put into place? An accepted chain mostly is there
    already."""
    return not (shape.one_path and all(kind.in_place for kind in kinds))


@dataclass(frozen=True)
class StepSpec:
    """What a compiled step is specialised for (the capacity comes with the state's shapes).

    ``pending``: nodes of the step before, if its rows still have to be put into place.
    """

    shape: TreeShape
    features: frozenset[str]
    windows: tuple[tuple[str, int], ...]
    pending: int = 0


StepFunction = Callable[[State, Arrays], tuple[mx.array, State]]


def make_step(
    target: Target, drafters: Sequence[Drafter], spec: StepSpec, on_trace: Callable[[], None]
) -> StepFunction:
    """The uncompiled step of a bucket.

    Args:
        target: the model that decides every token.
        drafters: all that keep a state in it, whether this shape asks them or not.
        on_trace: called once per trace.

    Returns:
        step(state, arrays) -> (text (L+2,) int32: the root's token, the new ones, and END from
        there on; the next state).
    """
    shape = spec.shape
    layers = read_layers(drafters)

    def step(state: State, arrays: Arrays) -> tuple[mx.array, State]:
        on_trace()
        root, position, caches, states, history, pending = state
        draw = sampling.draw(arrays, position + 1, shape.depth)
        text_so_far = None if isinstance(history, tuple) else history
        tree = draft(drafters, states, Ask(root, position, text_so_far, shape, draw))

        run = Pass(caches, position, tree.ancestors, pending)
        read = verify(target, tree, run, layers)

        windows = {
            name: sampling.recent_tokens(tree, text_so_far, position, size)
            for name, size in spec.windows
            if text_so_far is not None
        }
        choices = sampling.sample(target.logits(read.hidden), tree, windows, arrays, position)
        last, count, text = accept(tree, choices)

        done = Verified(tree, read, last, count, text)
        drafts = tuple(d.commit(s, done) for d, s in zip(drafters, states, strict=True))
        if not isinstance(history, tuple):
            history = mx.slice_update(history, text, position, (0,))
        waiting = waits(target.caches, shape)
        pending = (run.rows, row_slots(tree, last, count, position)) if waiting else ()
        root = mx.take(choices, last) if shape.drafts else choices
        return text, State(root, position + count, run.caches, drafts, history, pending)

    return step


def read_layers(drafters: Sequence[Drafter]) -> tuple[int, ...]:
    """Layers of the target whose outputs some drafter reads."""
    wanted = {layer for drafter in drafters for layer in drafter.features or ()}
    return tuple(sorted(wanted))


def draft(drafters: Sequence[Drafter], states: Sequence[Any], ask: Ask) -> DraftTree:
    """The tree that the target will check."""
    shape = ask.shape
    if not shape.drafts:
        return root_only(ask.root)
    asked = [(d, s) for d, s in zip(drafters, states, strict=True) if d.part in shape.parts]
    found = [drafter.propose(state, ask) for drafter, state in asked]
    if shape.one_path:
        return chain(found[0][0].paths.reshape(-1))
    first, *others = found
    candidates = joined([*first, *(part for parts in others for part in without_root(parts))])
    if others:
        candidates = distinct(candidates)
    return best_nodes(candidates, shape.nodes)


def row_slots(tree: DraftTree, last: mx.array, count: mx.array, position: mx.array) -> mx.array:
    """Where the rows of a tree's N nodes belong: (N,) int32.

    Accepted ones behind the prefix by their depth; all others in one slot behind the next tree.
    """
    n = tree.tokens.shape[0]
    accepted = mx.take(tree.ancestors, last, axis=0).reshape(-1)
    # An array and not a number: one fused kernel serves every size.
    return position + mx.where(accepted, tree.depths, count + integers([n] * n))


def verify(target: Target, tree: DraftTree, run: Pass, layers: tuple[int, ...]) -> Features:
    """One pass of the target over the whole tree: N rows of features.

    Every node sees the prefix (slots below the root's position) and its own ancestors, whose rows
    are written to the slots from there on.
    """
    capacity = run.capacity(target.caches)
    positions = run.position + tree.depths  # (N,)
    mask, key_positions = tree.ancestors, positions
    if capacity is not None:
        slots = integers(range(capacity))  # (C,)
        n = positions.shape[0]
        prefix = mx.broadcast_to(slots < run.position, (n, capacity))
        mask = mx.slice_update(prefix, mask, run.position, (1,))
        key_positions = mx.slice_update(slots, positions, run.position, (0,))
    # A filler's negative token reads some row of the embedding; nobody reads what comes of it.
    hidden, outputs = target(tree.tokens, positions, mask, key_positions, run, layers)
    return Features(hidden, layers, outputs)


def blank_state(
    target: Target,
    drafters: Sequence[Drafter],
    shape: TreeShape,
    position: int,
    capacity: int,
    history: bool = True,
) -> State:
    """A state with nothing in it, as after a step of the same shape: for what measures steps."""
    caches = new_caches(target.caches, capacity, target.dtype)
    layers = read_layers(drafters)
    row = mx.zeros((1, target.config.hidden_size), target.dtype)
    read = Features(row, layers, (row,) * len(layers))
    return State(
        mx.array([1], mx.int32),
        mx.array([position], mx.int32),
        caches,
        tuple(drafter.begin(read) for drafter in drafters),
        mx.zeros((capacity,), mx.int32) if history else (),
        nothing_pending(target.caches, caches, shape),
    )
