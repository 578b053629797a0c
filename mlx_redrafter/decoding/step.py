"""One decode step: draft, choose a tree, verify, accept, commit. One compiled graph per bucket.

Everything that varies from step to step is an array; the tree's shape, the caches' capacity and the
active sampling features are the bucket. Only the tokens go back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, LayerCache, Pass, Rows, capacity_of, new_caches
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.drafting import draft
from mlx_redrafter.decoding.grammar import Held, committed
from mlx_redrafter.decoding.sampling import Arrays
from mlx_redrafter.drafters import Ask, Drafter, Verified
from mlx_redrafter.models import Target
from mlx_redrafter.models.decoder import Functions, Part
from mlx_redrafter.models.experts import distinct as distinct_experts
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.models.layers import Routed
from mlx_redrafter.models.stacked import StackPass
from mlx_redrafter.tree.accept import accept
from mlx_redrafter.tree.nodes import (
    END,
    DraftTree,
    chain,
    integers,
)
from mlx_redrafter.tree.shape import TreeShape
from mlx_redrafter.tree.told import GRAMMAR, Proposed, only, told


class State(NamedTuple):
    """What stays on the device between steps; one pytree of arrays, absent parts are ().

    root (1,) int32     the last token: chosen, but not yet in the caches
    position (1,) int32 the root's
    caches              what every layer remembers, the target's before the drafters'; nothing where
                        it lies in a stack (`cache.stack`)
    drafts              every drafter's state
    history (C,) int32  the tokens by position, the root's included, where somebody reads them
    pending             the last step's rows by layer, and the slots (N,) int32 where they belong.
                        The next step puts them there before its own. Moving them at once would read
                        and write a slab back to back, and MLX copies a buffer whose reader is still
                        in flight.
    held                what a choice of this step can be made again from; the next one takes none
    """

    root: mx.array
    position: mx.array
    caches: list[Kept]
    drafts: tuple[Any, ...] = ()
    history: mx.array | tuple[()] = ()
    pending: tuple[list[Rows], mx.array] | tuple[()] = ()
    held: Held | tuple[()] = ()


def nothing_pending(
    kinds: Sequence[LayerCache], caches: Sequence[Kept], shape: TreeShape
) -> tuple[list[Rows], mx.array] | tuple[()]:
    """What the first step of an answer finds pending: as after a step of its own shape."""
    if not any(waits(kind, shape) for kind in kinds):
        return ()
    rows = [
        kind.nothing(kept, shape.nodes) if waits(kind, shape) else ()
        for kind, kept in zip(kinds, caches, strict=True)
    ]
    capacity = capacity_of(kinds, caches) or 1 << 30
    return rows, mx.full((shape.nodes,), capacity - 1, mx.int32)  # a slot that is not read yet


def waits(kind: LayerCache, shape: TreeShape) -> bool:
    """Does a step of this shape leave a layer's rows to be put into place? An accepted chain mostly
    is there already."""
    return not (shape.one_path and kind.in_place)


@dataclass(frozen=True)
class StepSpec:
    """What a compiled step is specialised for (the capacity comes with the state's shapes).

    ``pending``: nodes of the step before, if its rows still have to be put into place. ``awake``:
    do drafters that keep rows take part? ``held``: can a choice be made again? ``given``: right
    drafts are in `Arrays`, as "given" (L,). ``margins``: are `sampling.near_ties` counted?
    ``told``: see `tree.told`.
    """

    shape: TreeShape
    features: frozenset[str]
    windows: tuple[tuple[str, int], ...]
    pending: int = 0
    awake: bool = True
    held: bool = False
    given: bool = False
    margins: bool = False
    told: bool = False


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
        there on; what is told; with margins one number more; of several nodes and a target with
        experts one more, how many the nodes chose; the next state).
    """
    layers, counted = read_layers(drafters), bool(target.routes) and spec.shape.drafts

    def step(state: State, arrays: Arrays) -> tuple[mx.array, State]:
        on_trace()
        begun = drafted(drafters, opening(target, drafters, spec, state, arrays))
        chosen: list[mx.array] = []
        routed = chosen.append if counted else None
        (read,) = verify(target, [(begun.tree, begun.run)], layers, routed)
        logits = target.logits(read.hidden)
        text, state, _ = finish(target, drafters, spec, begun, read, logits, arrays)
        if counted:
            text = mx.concatenate([text, distinct_experts(chosen).reshape(1)])
        return text, state

    return step


class Begun(NamedTuple):
    """A step whose tree is drafted and not yet checked: see `Opened`."""

    tree: DraftTree
    proposed: Proposed
    opened: Opened

    @property
    def run(self) -> Pass:
        return self.opened.run

    @property
    def position(self) -> mx.array:
        return self.opened.ask.position


class Opened(NamedTuple):
    """A step before anything is drafted. run, others: its passes over the target's caches and over
    every drafter's; states: the drafters'; common: see `Target.common`; given: drafts that are
    known to be right."""

    ask: Ask
    run: Pass
    others: list[Pass]
    states: tuple[Any, ...]
    history: mx.array | tuple[()]
    common: Callable[..., Sequence[mx.array]]
    given: mx.array | None = None


def opening(
    target: Target, drafters: Sequence[Drafter], spec: StepSpec, state: State, arrays: Arrays
) -> Opened:
    """What drafters are asked in a step, and with what."""
    root, position, caches, states, history, pending, _ = state
    draw = sampling.draw(arrays, position + 1, spec.shape.depth)
    text_so_far = None if isinstance(history, tuple) else history
    run, *others = passes([target, *drafters], caches, position, pending)
    ask = Ask(root, position, text_so_far, spec.shape, draw)
    given = arrays["given"] if spec.given else None
    return Opened(ask, run, others, states, history, target.common, given)


def drafted(
    drafters: Sequence[Drafter], opened: Opened, proposed: Mapping[int, Any] | None = None
) -> Begun:
    """Draft the tree. proposed: by the number of a drafter what it proposes, if it was asked."""
    if opened.given is None:
        tree, of = draft(drafters, opened.states, opened.others, opened.ask, proposed or {})
    else:
        path = mx.concatenate([opened.ask.root, opened.given, integers([END])])
        tree, of = chain(path), only(path, GRAMMAR)
    tree = DraftTree(*opened.common(*tree))
    opened.run.ancestors = tree.ancestors
    return Begun(tree, of, opened)


def finish(
    target: Target,
    drafters: Sequence[Drafter],
    spec: StepSpec,
    begun: Begun,
    read: Features,
    logits: mx.array,
    arrays: Arrays,
) -> tuple[mx.array, State, mx.array]:
    """Accept what the target says of a tree's nodes, logits (N, V): as of `make_step`, and the
    slots (N,) where the nodes belong."""
    tree, proposed, (ask, run, others, states, history, _, _) = begun
    position = ask.position
    windows = {
        name: sampling.recent_tokens(tree, history, position, size)
        for name, size in spec.windows
        if not isinstance(history, tuple)
    }
    near: list[mx.array] = []
    (choices,) = target.common(
        sampling.sample(logits, tree, windows, arrays, position, near.append)
    )
    if spec.given:
        choices = mx.concatenate([arrays["given"], choices[-1:]])
    last, count, text = accept(tree, choices)

    done = Verified(tree, read, last, count, text, choices, position)
    drafts = committed(drafters, states, done, others)
    if not isinstance(history, tuple):
        history = mx.slice_update(history, text, position, (0,))
    caches, rows = joined_passes([target, *drafters], [run, *others])
    kinds, slots = all_caches(target, drafters), row_slots(tree, last, count, position)
    waiting = [waits(kind, spec.shape) for kind in kinds[: len(rows)]]
    pending: tuple[list[Rows], mx.array] | tuple[()] = ()
    if any(waiting):
        pending = [r if w else () for r, w in zip(rows, waiting, strict=True)], slots
    root = mx.take(choices, last) if spec.shape.drafts else choices
    if spec.told:
        text = mx.concatenate([text, told(proposed, tree, choices)])
    if spec.margins:
        text = mx.concatenate([text, (near[0] & mx.take(tree.ancestors, last, axis=0)).sum(-1)])
    held = holding(drafters, done, logits, states) if spec.held else ()
    after = State(root, position + count, caches, drafts, history, pending, held)
    return text, after, slots


def holding(
    drafters: Sequence[Drafter], done: Verified, logits: mx.array, states: tuple[Any, ...]
) -> Held:
    """What a choice of a step can be made again from."""
    read = done.read
    outputs = tuple(read.outputs[read.layers.index(layer)] for layer in read_layers(drafters))
    return Held(
        logits, done.tree, read.hidden, outputs, done.choices, done.last, done.position, states
    )


class Remembering(Protocol):
    """The target, or a drafter."""

    @property
    def caches(self) -> Sequence[LayerCache]: ...


def all_caches(target: Target, drafters: Sequence[Drafter]) -> list[LayerCache]:
    """What every layer remembers: the target's, then the drafters'."""
    everyone: list[Remembering] = [target, *drafters]
    return [kind for one in everyone for kind in one.caches]


def passes(
    those: Sequence[Remembering],
    caches: Sequence[Kept],
    position: mx.array,
    pending: tuple[Sequence[Rows], mx.array] | tuple[()],
) -> list[Pass]:
    """A pass for each, with its share of the caches; position and pending: see `Pass`."""
    result, start = [], 0
    for one in those:
        stop = start + len(one.caches)
        mine = (pending[0][start:stop], pending[1]) if pending else ()
        result.append(Pass(caches[start:stop], position, None, mine))
        start = stop
    return result


def joined_passes(
    those: Sequence[Remembering], runs: Sequence[Pass]
) -> tuple[list[Kept], list[Rows]]:
    """The caches after passes, and the rows that wait."""
    for one, run in zip(those, runs, strict=True):
        run.settle(one.caches)
    return [kept for r in runs for kept in r.caches], [rows for r in runs for rows in r.rows]


def settled(kinds: Sequence[LayerCache], state: State) -> list[Kept]:
    """A state's caches with what was pending in its place."""
    run = Pass(state.caches, state.position, None, state.pending)
    run.settle(kinds)
    return run.caches


def absorbing(
    drafters: Sequence[Drafter],
) -> Callable[[Chunk, Sequence[Kept]], list[Kept]] | None:
    """What adds a part of the prompt to the drafters' caches; None where they have none."""
    keeping = [drafter for drafter in drafters if drafter.caches]
    if not keeping:
        return None

    def absorb(chunk: Chunk, caches: Sequence[Kept]) -> list[Kept]:
        runs = passes(keeping, caches, chunk.positions[:1], ())
        for drafter, own in zip(keeping, runs, strict=True):
            drafter.absorb(chunk, own)
        return joined_passes(keeping, runs)[0]

    return absorb


def read_layers(drafters: Sequence[Drafter]) -> tuple[int, ...]:
    """Layers of the target whose outputs some drafter reads."""
    wanted = {layer for drafter in drafters for layer in drafter.features or ()}
    return tuple(sorted(wanted))


def row_slots(tree: DraftTree, last: mx.array, count: mx.array, position: mx.array) -> mx.array:
    """Where the rows of a tree's N nodes belong: (N,) int32.

    Accepted ones behind the prefix by their depth; all others in one slot behind the next tree.
    """
    n = tree.tokens.shape[0]
    accepted = mx.take(tree.ancestors, last, axis=0).reshape(-1)
    # An array and not a number: one fused kernel serves every size.
    return position + mx.where(accepted, tree.depths, count + integers([n] * n))


def verify(
    target: Target,
    trees: Sequence[tuple[DraftTree, Pass]],
    layers: tuple[int, ...],
    routed: Routed | None = None,
    stacks: Sequence[StackPass] = (),
) -> list[Features]:
    """One pass of the target over whole trees, of one sequence each: their N rows of features.

    Every node sees the prefix (slots below the root's position) and its own ancestors, whose rows
    are written to the slots from there on. routed: see `Functions`; stacks: see `Target.together`.
    """
    parts = [_part(target, tree, run) for tree, run in trees]
    found = target.together(parts, layers, Functions(routed=routed), stacks)
    return [Features(hidden, layers, outputs) for hidden, outputs in found]


def _part(target: Target, tree: DraftTree, run: Pass) -> Part:
    capacity = run.capacity(target.caches) if run.there else None
    positions = run.position + tree.depths  # (N,)
    mask, key_positions = tree.ancestors, positions
    if capacity is not None:
        slots = integers(range(capacity))  # (C,)
        n = positions.shape[0]
        prefix = mx.broadcast_to(slots < run.position, (n, capacity))
        mask = mx.slice_update(prefix, mask, run.position, (1,))
        key_positions = mx.slice_update(slots, positions, run.position, (0,))
    # A filler's negative token reads some row of the embedding; nobody reads what comes of it.
    return Part(tree.tokens, positions, mask, key_positions, run)


def blank_state(
    target: Target,
    drafters: Sequence[Drafter],
    shape: TreeShape,
    position: int,
    capacity: int,
    history: bool = True,
) -> State:
    """A state with nothing in it, as after a step of the same shape: for what measures steps."""
    kinds = all_caches(target, drafters)
    caches = new_caches(kinds, capacity, target.dtype)
    layers = read_layers(drafters)
    row = mx.zeros((1, target.config.hidden_size), target.dtype)
    read = Features(row, layers, (row,) * len(layers))
    return State(
        mx.array([1], mx.int32),
        mx.array([position], mx.int32),
        caches,
        tuple(drafter.begin(read) for drafter in drafters),
        mx.zeros((capacity,), mx.int32) if history else (),
        nothing_pending(kinds, caches, shape),
    )
