"""One decode step: draft, choose a tree, verify, accept, commit. One compiled graph per bucket.

Everything that varies from step to step is an array; the tree's shape, the KV capacity and the
active sampling features are the bucket. Only ``[count, tokens...]`` goes back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.decoding import beam, lookup, sampling
from mlx_redrafter.decoding.accept import walk
from mlx_redrafter.decoding.sampling import Arrays
from mlx_redrafter.decoding.tree import DraftTree, TreeShape, best_nodes, chain, root_only
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.models import Decoder, cache

State = dict[str, Any]
"""What stays on the device between steps:

root (1,) int32     the last token: chosen, but not yet in the cache
seen                what the drafter reads of the position that predicted the root: the target's
                    last hidden state (1, D) and one (1, D) per context layer; () without a drafter
position (1,) int32 the root's
kv                  one slab per layer
history (C,) int32  the tokens by position (penalties and lookup only)
pending             (after a tree only) that step's own rows, (1, 2*Hkv, N, Dh) per layer; the path
                    (R+1,) and count (1,) that it accepted, R: ``Bucket.reach``. The next step
                    writes the accepted ones into the slab together with its own. Moving them at
                    once would read and write a slab back to back, and MLX copies a buffer whose
                    reader is still in flight.
"""


def make_state(
    root: mx.array,
    seen: tuple[mx.array, ...],
    position: mx.array,
    kv: list[mx.array],
    history: mx.array | None = None,
    pending: tuple[list[mx.array], mx.array, mx.array] | None = None,
) -> State:
    """Always the same keys in the same order: another order is another graph to mx.compile."""
    state: State = {"root": root, "seen": seen, "position": position, "kv": kv}
    if history is not None:
        state["history"] = history
    if pending is not None:
        state["pending"] = pending
    return state


def nothing_pending(kv: list[mx.array], shape: TreeShape, reach: int) -> tuple | None:
    """What the first step of an answer finds pending: as after a step of its own shape."""
    if shape.one_path:
        return None  # an accepted chain is already in its place
    _, heads, _, size = kv[0].shape
    rows = [mx.zeros((1, heads, shape.nodes, size), slab.dtype) for slab in kv]
    return rows, mx.zeros((reach + 1,), mx.int32), mx.zeros((1,), mx.int32)


@dataclass(frozen=True)
class Bucket:
    """What a compiled step is specialised for (the KV capacity comes with the state's shapes).

    ``reach`` is the longest path of all shapes that the answer may use, if longer than this one's;
    ``pending`` the nodes of the step before, if its rows still have to be put into place.
    """

    shape: TreeShape
    features: frozenset[str]
    windows: tuple[tuple[str, int], ...]
    reach: int = 0
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
        step(state, arrays) -> (emitted (R+2,) int32, or (2,) without drafts: the count, then
        tokens of which the first ``count`` are valid; the next state).
    """
    shape = bucket.shape
    reach = max(bucket.reach, shape.longest)
    layers = drafter.context_layers if drafter is not None else ()

    def step(state: State, arrays: Arrays) -> tuple[mx.array, State]:
        on_trace()
        root, position = state["root"], state["position"]
        noise = None
        if "sample" in bucket.features:
            noise = sampling.gumbel(
                arrays["seed"], position + 1, shape.longest + 1, target.config.vocab_size
            )

        tree = draft(drafter, state, shape, arrays.get("temp"), noise)

        write = writer(state, shape.nodes)
        hidden, inner, kv = verify(target, tree, position, state["kv"], write, layers)

        windows = {
            name: sampling.recent_tokens(tree, state["history"], position, size, shape.longest)
            for name, size in bucket.windows
        }
        choices = sampling.choose(target.logits(hidden), tree, windows, arrays, noise)
        path, count = walk(tree, choices, reach)

        emitted = mx.take(choices, path)  # (R+1,)
        last = mx.take(path, count - 1)  # (1,)
        seen: tuple[mx.array, ...] = ()
        history = pending = None
        if drafter is not None:
            seen = (hidden, *inner)
            if shape.drafts:
                seen = tuple(mx.take(x, last, axis=0) for x in seen)
        if "history" in state:
            accepted = mx.take(tree.tokens, path)
            history = mx.slice_update(state["history"], accepted, position, (0,))
        if not shape.one_path:
            pending = (write.rows, path, count)
        root = mx.take(choices, last)
        new = make_state(root, seen, position + count, kv, history, pending)
        return mx.concatenate([count, emitted]), new

    return step


def draft(
    drafter: Drafter | None,
    state: State,
    shape: TreeShape,
    temperature: mx.array | None,
    noise: mx.array | None,
) -> DraftTree:
    """The tree that the target will check."""
    root = state["root"]
    looked = found = None
    if shape.lookup:
        looked = lookup.search(state["history"], root, state["position"], shape.lookup)
    if drafter is not None and shape.depth:
        hidden, *inner = state["seen"]
        context = drafter.context(hidden, tuple(inner))[0]
        found = beam.search(drafter, context, root, shape, temperature, noise)
    if found is not None and looked is not None:
        both = lookup.merge(found, looked, shape.width)
        return best_nodes(root, both, shape.nodes, shape.longest)
    candidates = found if found is not None else looked
    if candidates is None:
        return root_only(root)
    if shape.one_path:
        return chain(root, candidates)
    return best_nodes(root, candidates, shape.nodes, shape.longest)


def writer(state: State, nodes: int) -> cache.Write:
    """How a step's keys and values, so many rows, get into the slabs."""
    position = state["position"]
    if "pending" not in state:
        return cache.Append(position)
    rows, path, count = state["pending"]
    before, longest = rows[0].shape[2], path.shape[0]
    # Row c, for c accepted: their places in the path, then those of this step's own rows. Looked
    # up and not computed: numbers of a shape inside a fused kernel would be one more to compile.
    number, accepted = np.arange(longest + nodes), np.arange(longest + 1)[:, None]
    own = longest + np.minimum(number - accepted, nodes - 1)
    order = mx.array(np.where(number < accepted, number, own), mx.int32)
    every = mx.concatenate([path, mx.arange(before, before + nodes, dtype=mx.int32)])
    return cache.Commit(position - count, mx.take(every, mx.take(order, count, axis=0)[0]), rows)


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
    slots = mx.arange(kv[0].shape[2], dtype=mx.int32)  # (C,)
    positions = position + tree.depths  # (N,)
    n = positions.shape[0]
    prefix = mx.broadcast_to((slots < position)[None], (n, slots.shape[0]))
    mask = mx.slice_update(prefix, tree.ancestors, position, (1,))
    key_positions = mx.slice_update(slots, positions, position, (0,))
    tokens = mx.maximum(tree.tokens, 0)  # fillers carry -1
    return target(tokens, positions, mask, key_positions, kv, write, layers)
