"""One decode step: draft, choose a tree, verify, accept, commit. One compiled graph per bucket.

Everything that varies from step to step is an array; the tree's shape, the KV capacity and the
active sampling features are the bucket. Only the tokens go back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_redrafter.decoding import beam, lookup, sampling
from mlx_redrafter.decoding.accept import walk
from mlx_redrafter.decoding.sampling import Arrays
from mlx_redrafter.decoding.tree import (
    Candidates,
    DraftTree,
    TreeShape,
    best_nodes,
    chain,
    distinct,
    integers,
    joined,
    root_only,
)
from mlx_redrafter.drafters import Drafter, seen
from mlx_redrafter.models import Decoder, cache

State = dict[str, Any]
"""What stays on the device between steps:

root (1,) int32     the last token: chosen, but not yet in the cache
position (1,) int32 the root's
kv                  one slab per layer
seen                (with a drafter only) what it reads of the position that predicted the root: the
                    outputs of its context layers side by side (1, *), or the target's last hidden
                    state
history (C,) int32  the tokens by position, the root's included (penalties and lookup only)
pending             (after a tree only) that step's own rows, (1, 2*Hkv, N, Dh) per layer, and the
                    slots (N,) int32 where they belong. The next step writes them there before its
                    own. Moving them at once would read and write a slab back to back, and MLX
                    copies a buffer whose reader is still in flight.
"""


def make_state(
    root: mx.array,
    seen: mx.array | None,
    position: mx.array,
    kv: list[mx.array],
    history: mx.array | None = None,
    pending: tuple[list[mx.array], mx.array] | None = None,
) -> State:
    """Always the same keys in the same order: another order is another graph to mx.compile."""
    state: State = {"root": root, "position": position, "kv": kv}
    if seen is not None:
        state["seen"] = seen
    if history is not None:
        state["history"] = history
    if pending is not None:
        state["pending"] = pending
    return state


def nothing_pending(kv: list[mx.array], shape: TreeShape) -> tuple | None:
    """What the first step of an answer finds pending: as after a step of its own shape."""
    if shape.one_path:
        return None  # an accepted chain is already in its place
    _, heads, capacity, size = kv[0].shape
    rows = [mx.zeros((1, heads, shape.nodes, size), slab.dtype) for slab in kv]
    return rows, mx.full((shape.nodes,), capacity - 1, mx.int32)  # a slot that is not read yet


@dataclass(frozen=True)
class Bucket:
    """What a compiled step is specialised for (the KV capacity comes with the state's shapes).

    ``pending``: nodes of the step before, if its rows still have to be put into place.
    """

    shape: TreeShape
    features: frozenset[str]
    windows: tuple[tuple[str, int], ...]
    pending: int = 0


StepFunction = Callable[[State, Arrays], tuple[mx.array, State]]


def make_step(
    target: Decoder, drafter: Drafter | None, bucket: Bucket, on_trace: Callable[[], None]
) -> StepFunction:
    """The uncompiled step of a bucket.

    Args:
        target: the model that decides every token.
        drafter: None where none is used, in no step of the answer.
        on_trace: called once per trace.

    Returns:
        step(state, arrays) -> (text (L+2,) int32: the root's token, the new ones, and END from
        there on; the next state).
    """
    shape = bucket.shape
    layers = drafter.context_layers if drafter is not None else ()
    drafted = integers(range(target.config.vocab_size))
    if drafter is not None:
        drafted = drafter.select(drafted)
        mx.eval(drafted)

    def step(state: State, arrays: Arrays) -> tuple[mx.array, State]:
        on_trace()
        root, position = state["root"], state["position"]
        noise = sampling.noise(arrays, position + 1, shape.depth, drafted)
        tree = draft(drafter, state, shape, arrays.get("temp"), noise)

        write = writer(state, shape.nodes)
        hidden, inner, kv = verify(target, tree, position, state["kv"], write, layers)

        windows = {
            name: sampling.recent_tokens(tree, state["history"], position, size)
            for name, size in bucket.windows
        }
        choices = sampling.choose(target.logits(hidden), tree, windows, arrays, position)
        last, count, text = walk(tree, choices)

        history = pending = read = None
        if drafter is not None:
            read = seen(hidden, inner)
            read = mx.take(read, last, axis=0) if shape.drafts else read
        if "history" in state:
            history = mx.slice_update(state["history"], text, position, (0,))
        if not shape.one_path:
            pending = (write.rows, row_slots(tree, last, count, position))
        root = mx.take(choices, last) if shape.drafts else choices
        new = make_state(root, read, position + count, kv, history, pending)
        return text, new

    return step


def draft(
    drafter: Drafter | None,
    state: State,
    shape: TreeShape,
    temperature: mx.array | None = None,
    noise: beam.Noise | None = None,
) -> DraftTree:
    """The tree that the target will check."""
    root, columns = state["root"], shape.longest + 2
    if not shape.drafts:
        return root_only(root)
    if shape.one_path and shape.lookup:
        return chain(lookup.follow(state["history"], state["position"], columns)[0])
    found: list[Candidates] = []
    if drafter is not None and shape.depth:
        context = drafter.context(state["seen"])[0]
        found = beam.search(drafter, context, root, shape, temperature, noise)
        if shape.one_path:
            return chain(found[-1].paths.reshape(-1))
    if shape.lookup:
        looked = lookup.search(state["history"], state["position"], shape.lookup, columns)
        found = [looked, *found[1:]]  # the root once
    candidates = joined(found)
    if shape.lookup and shape.depth:
        candidates = distinct(candidates)
    return best_nodes(candidates, shape.nodes)


def writer(state: State, nodes: int) -> cache.Write:
    """How a step's keys and values, so many rows, get into the slabs."""
    position = state["position"]
    if "pending" not in state:
        return cache.Append(position)
    rows, slots = state["pending"]
    return cache.Commit(position, slots, rows)


def row_slots(tree: DraftTree, last: mx.array, count: mx.array, position: mx.array) -> mx.array:
    """Where the rows of a tree's N nodes belong: (N,) int32.

    Accepted ones behind the prefix by their depth; all others in one slot behind the next tree.
    """
    n = tree.tokens.shape[0]
    accepted = mx.take(tree.ancestors, last, axis=0).reshape(-1)
    # An array and not a number: one fused kernel serves every size.
    return position + mx.where(accepted, tree.depths, count + integers([n] * n))


def verify(
    target: Decoder,
    tree: DraftTree,
    position: mx.array,
    kv: list[mx.array],
    write: cache.Write,
    layers: tuple[int, ...],
) -> tuple[mx.array, tuple[mx.array, ...], list[mx.array]]:
    """One pass of the target over the whole tree.

    Every node sees the prefix (slots below ``position``) and its own ancestors, whose rows are
    written to the slots from ``position`` on.

    Returns:
        hidden (N, D), one (N, D) per layer in ``layers``, the slabs with N more rows.
    """
    slots = integers(range(kv[0].shape[2]))  # (C,)
    positions = position + tree.depths  # (N,)
    n = positions.shape[0]
    prefix = mx.broadcast_to(slots < position, (n, slots.shape[0]))
    mask = mx.slice_update(prefix, tree.ancestors, position, (1,))
    key_positions = mx.slice_update(slots, positions, position, (0,))
    # A filler's negative token reads some row of the embedding; nobody reads what comes of it.
    return target(tree.tokens, positions, mask, key_positions, kv, write, layers)
