"""Beam search over the drafter: a trellis of candidate nodes (ReDrafter, arXiv 2403.09919, 3).

Every level keeps W (parent, token) pairs. Their paths are the candidates, so every prefix is
one too, and nothing has to be de-duplicated afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafters import UNFITTED, Ask, Cell, Draw, Forgetful, Verified
from mlx_redrafter.drafters.calibration import Calibration
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models.features import Features
from mlx_redrafter.runtime.device import fused_kernels
from mlx_redrafter.tree.nodes import END, Candidates, integers
from mlx_redrafter.tree.shape import BEAMS, TreeShape

# On Metal a sort of up to this many values is one dispatch; wider ones are a merge sort in many.
SORT_WIDTH = 2048


def logsumexp(logits: mx.array) -> mx.array:
    """The logarithm of the sum of exponentials of every row: (R, Vd) -> (R, 1).

    MLX's own is one kernel on Metal; on a CPU it takes three times as long as steps that
    mx.compile makes kernels for this machine of (see compiler.py).
    """
    if fused_kernels():
        return mx.logsumexp(logits, axis=-1, keepdims=True)
    top = mx.max(logits, axis=-1, keepdims=True)
    return top + mx.log(mx.sum(mx.exp(logits - top), axis=-1, keepdims=True))


def k_smallest(x: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k smallest of every row without sorting the row, exactly.

    The k chunks with the smallest minima contain the k smallest values; only they are sorted.

    Args:
        x: (R, V).

    Returns:
        values (R, k) in rising order, indices (R, k) int32.
    """
    rows, width = x.shape
    if k == 1:
        best = mx.argmin(x, axis=-1, keepdims=True)
        return mx.take_along_axis(x, best, axis=-1), best.view(mx.int32)
    if width <= SORT_WIDTH:
        order = mx.argsort(x, axis=-1)[:, :k]
        return mx.take_along_axis(x, order, axis=-1), order.view(mx.int32)
    size = min(SORT_WIDTH // k, max(k, 2 ** round(math.log2(math.sqrt(width)))))
    count = -(-width // size)
    chunks = x
    if count * size != width:
        finite = mx.minimum(x, mx.finfo(x.dtype).max)  # so that padding is above everything
        chunks = mx.pad(finite, [(0, 0), (0, count * size - width)], constant_values=mx.inf)
    chunks = chunks.reshape(rows, count, size)
    _, near = k_smallest(chunks.min(-1), k)  # (R, k)
    inside = mx.take_along_axis(chunks, near[..., None], axis=1)  # (R, k, size)
    _, at = k_smallest(inside.reshape(rows, k * size), k)
    # The same as a gather, but part of the kernel that uses it.
    chunk = near[:, :1]
    for i in range(1, k):
        chunk = mx.where(at >= i * size, near[:, i : i + 1], chunk)
    index = chunk * size + at % size
    return mx.take_along_axis(x, index, axis=-1), index


def search(
    cell: Cell,
    context: mx.array,
    root: mx.array,
    shape: TreeShape,
    draw: Draw | None = None,
    trust: Calibration = UNFITTED,
) -> list[Candidates]:
    """Propose ``W * L`` candidates.

    With a draw the drafter searches for the very tokens that the target will draw: its logits get
    the noise that the target's will get at the same position, as far as it is to be trusted. A
    cost is minus the log-softmax of these perturbed values, summed along the path.

    Args:
        cell: see :class:`~mlx_redrafter.drafters.Cell`.
        context: (Dc,) the drafter's context of this step.
        root: (1,) int32.
        shape: width ``W``, depth ``L`` and candidate mode.
        draw: of the positions after the root, None for greedy.
        trust: counts under a draw only.

    Returns:
        The root, then W candidates per level.
    """
    state, fixed = cell.start(context)
    draws = None if draw is None else [draw]
    return _searched(cell, state, fixed, root, shape, draws, trust)[0]


def search_all(
    cell: JoiningCell,
    contexts: mx.array,
    roots: mx.array,
    shape: TreeShape,
    draws: Sequence[Draw] | None = None,
    trust: Calibration = UNFITTED,
) -> list[list[Candidates]]:
    """The same for several sequences, whose beams are asked together: contexts (B, Dc), roots (B,),
    a draw for each or none at all."""
    state, fixed = cell.starts(contexts)
    return _searched(cell, state, fixed, roots, shape, draws, trust)


def _searched(
    cell: Cell,
    state: Any,
    fixed: mx.array,
    roots: mx.array,
    shape: TreeShape,
    draws: Sequence[Draw] | None,
    trust: Calibration,
) -> list[list[Candidates]]:
    """The candidates of every sequence. Rows are beams, those of a sequence next to each other."""
    width, columns, count = shape.width, shape.longest + 2, roots.shape[0]
    place = integers(range(columns)).reshape(1, -1)
    costs, picks, parents = mx.array([0.0] * count), roots, integers([0])
    paths = mx.where(place == integers([0]), roots.reshape(-1, 1), END)
    lost = 0.0 if draws is None else -math.log(trust.share)  # what no draft is worth more than
    parts, above = [(paths, costs)], list[mx.array]()  # the beam that each beam goes on from
    for level in range(shape.depth):
        if level == 1 and width > 1 and count > 1:
            fixed = mx.repeat(fixed, width, axis=0)
        logits, state = (cell.follow if level else cell.step)(picks, state, fixed)
        logits = logits.astype(mx.float32)  # (R, Vd), R = B at the first level
        if width > logits.shape[-1]:
            raise OptionError(
                f"beam width {width} is more than the drafter's {logits.shape[-1]} tokens: "
                "use a smaller width"
            )
        if draws is not None:
            logits = _drawn(logits, draws, level, cell.vocabulary, trust)
        if width == 1:
            costs, picks = _likeliest(logits, costs, lost)
        else:
            costs, parents, picks = _cheapest(logits, costs, width, count, lost)
            rows = parents
            if count > 1:
                first = np.arange(count * width) // width * (paths.shape[0] // count)
                rows = parents + integers(first)
            state, paths = chosen(state, rows), chosen(paths, rows)
        tokens = cell.token_ids(picks).reshape(-1, 1)
        paths = mx.where(place == integers([level + 1]), tokens, paths)
        parts.append((paths, costs))
        above.append(parents)
    return [
        _of_one([_share(*part, i, count) for part in parts], above, shape, i) for i in range(count)
    ]


def _share(paths: mx.array, costs: mx.array, i: int, count: int) -> tuple[mx.array, mx.array]:
    """What is the i-th sequence's."""
    if count == 1:
        return paths, costs
    size = costs.shape[0] // count
    mine = slice(i * size, (i + 1) * size)
    return paths[mine], costs[mine]


def _of_one(
    parts: Sequence[tuple[mx.array, mx.array]], above: list[mx.array], shape: TreeShape, i: int
) -> list[Candidates]:
    """A sequence's candidates of its parts."""
    depths = [(0,), *((level + 1,) * shape.width for level in range(shape.depth))]
    levels = [Candidates(*part, depth) for part, depth in zip(parts, depths, strict=True)]
    if shape.mode != "beams":
        return levels
    mine = slice(i * shape.width, (i + 1) * shape.width)
    return _alive(levels, above if len(above[0]) == shape.width else [rows[mine] for rows in above])


def _drawn(
    logits: mx.array, draws: Sequence[Draw], level: int, vocabulary: mx.array, trust: Calibration
) -> mx.array:
    """Logits (R, Vd) as they are drawn from, and as sure as they may be."""
    logits, weight = logits * trust.sharpness, trust.sharpness * trust.noise
    if len(draws) == 1:
        return logits + (draws[0].temperature * weight) * draws[0].noise(level, vocabulary)
    noise = mx.concatenate([draw.noise(level, vocabulary) for draw in draws])[:, None]
    weights = mx.stack([draw.temperature for draw in draws]).reshape(-1, 1, 1) * weight
    return (logits.reshape(len(draws), -1, logits.shape[-1]) + weights * noise).reshape(
        logits.shape
    )


def chosen(state: Any, parents: mx.array) -> Any:
    """Of an array, or a tuple of them, the rows of the beams that go on. One row is what all beams
    have in common, and needs no copies."""
    if isinstance(state, tuple):
        return tuple(chosen(part, parents) for part in state)
    return mx.take(state, parents, axis=0) if state.shape[0] > 1 else state


def lineage(above: mx.array | None, beams: int) -> mx.array:
    """Which rows of all levels so far each beam follows, itself last: (R, M + R) bool.

    Args:
        above: (R or 1, M) of the beams that it goes on from; None: there were none.
        beams: ``R``.
    """
    itself = integers(range(beams)).reshape(-1, 1) == integers(range(beams))
    if above is None:
        return itself
    return mx.concatenate([mx.broadcast_to(above, (beams, above.shape[1])), itself], axis=1)


def _likeliest(logits: mx.array, costs: mx.array, lost: float) -> tuple[mx.array, mx.array]:
    """The one beam's new cost and token."""
    # Rounding must not make a longer path cheaper than its prefix.
    best = mx.max(logits, axis=-1, keepdims=True)
    costs = costs + mx.maximum(_total(logits, lost) - best, 0.0).reshape(-1)
    return costs, mx.argmax(logits, axis=-1).view(mx.int32)


def _total(logits: mx.array, lost: float) -> mx.array:
    """What costs are counted from: (R, Vd) -> (R, 1)."""
    return logsumexp(logits) + lost if lost else logsumexp(logits)


def _cheapest(
    logits: mx.array, costs: mx.array, width: int, count: int, lost: float
) -> tuple[mx.array, mx.array, mx.array]:
    """Costs, parents and tokens of the W beams of every sequence that go on."""
    joint = mx.maximum(_total(logits, lost) - (logits - costs[:, None]), costs[:, None])
    best, index = k_smallest(joint.reshape(count, -1), width)
    costs, size, index = best.reshape(-1), logits.shape[-1], index.reshape(1, -1)
    pairs = mx.where(mx.array([[True], [False]]), index // size, index % size)  # (2, W)
    return costs, _row(pairs, 0), _row(pairs, 1)


def _alive(levels: list[Candidates], above: list[mx.array]) -> list[Candidates]:
    """Only what a beam of the last level passes through keeps its cost."""
    alive, kept = integers([1]) > 0, levels[-1:]
    for part, parents in zip(levels[-2:0:-1], above[:0:-1], strict=True):
        beams = integers(range(part.costs.shape[0])).reshape(-1, 1)
        alive = mx.any((parents == beams) & alive, axis=-1)
        kept.insert(0, part._replace(costs=mx.where(alive, part.costs, mx.inf)))
    return [levels[0], *kept]


def _row(x: mx.array, i: int) -> mx.array:
    """x[i] as a view, where indexing with a number is a gather."""
    i %= x.shape[0]
    return x[i : i + 1].reshape(-1)


class SearchingCell(Cell, Protocol):
    """A cell, which layers its context is made of, and how far it is trusted."""

    features: tuple[int, ...]
    calibration: Calibration

    def searched(self, depth: int) -> Cell: ...


class JoiningCell(Cell, Protocol):
    """A cell that takes the beams of several sequences at once."""

    def starts(self, contexts: mx.array) -> tuple[Any, mx.array]:
        """As `start`: (B, Dc) -> a row of state for each, and of what stays the same."""
        ...


class BeamDrafter(Forgetful):
    """A drafter that searches with a cell of its own. It keeps nothing between steps but what it
    reads of the position that predicted the root; see `drafters.Drafter`."""

    part = BEAMS
    features: tuple[int, ...] = ()
    joins = False
    """Is its cell a `JoiningCell`?"""

    def begin(self: SearchingCell, read: Features) -> mx.array:
        """(1, *): what it reads of the last position."""
        return read.of(self.features)

    def searched(self: SearchingCell, depth: int) -> Cell:
        """What a search of so many levels asks."""
        return self

    def propose(self: SearchingCell, state: mx.array, ask: Ask) -> list[Candidates]:
        context = self.context(state)[0]
        cell = self.searched(ask.shape.depth)
        levels = search(cell, context, ask.root, ask.shape, ask.draw, self.calibration)
        return levels[-1:] if ask.shape.one_path else levels

    def propose_all(
        self: SearchingCell, states: Sequence[mx.array], asks: Sequence[Ask]
    ) -> list[list[Candidates]]:
        """What is proposed to several sequences, which ask for one shape, all drawn or none."""
        contexts, shape = self.context(mx.concatenate(list(states))), asks[0].shape
        roots = mx.concatenate([ask.root for ask in asks])
        draws = [ask.draw for ask in asks if ask.draw is not None]
        cell = cast(JoiningCell, self.searched(shape.depth))
        found = search_all(cell, contexts, roots, shape, draws or None, self.calibration)
        return [levels[-1:] if shape.one_path else levels for levels in found]

    def commit(self: SearchingCell, state: mx.array, done: Verified) -> mx.array:
        read = done.read.of(self.features)
        return mx.take(read, done.last, axis=0) if done.tree.tokens.shape[0] > 1 else read
