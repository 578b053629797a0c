"""Beam search over the drafter: a trellis of candidate nodes (ReDrafter, arXiv 2403.09919, 3).

Every level keeps W (parent, token) pairs. Those pairs are the candidates, so beginnings are
shared by construction and nothing has to be de-duplicated afterwards.
"""

from __future__ import annotations

import math

import mlx.core as mx

from mlx_redrafter.decoding.tree import Candidates, TreeShape
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models.rope import fused_kernels

# On Metal a sort of up to this many values is one dispatch; wider ones are a merge sort in many.
SORT_WIDTH = 2048


def mass(logits: mx.array) -> mx.array:
    """The logarithm of the sum of exponentials of every row: (R, Vd) -> (R, 1).

    MLX's own is one kernel on Metal; on a CPU it takes three times as long as steps that
    mx.compile makes kernels for this machine of (see kernels.py).
    """
    if fused_kernels():
        return mx.logsumexp(logits, axis=-1, keepdims=True)
    top = mx.max(logits, axis=-1, keepdims=True)
    return top + mx.log(mx.sum(mx.exp(logits - top), axis=-1, keepdims=True))


def least(x: mx.array, k: int) -> tuple[mx.array, mx.array]:
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
    _, near = least(chunks.min(-1), k)  # (R, k)
    inside = mx.take_along_axis(chunks, near[..., None], axis=1)  # (R, k, size)
    _, at = least(inside.reshape(rows, k * size), k)
    # The same as a gather, but part of the kernel that uses it.
    chunk = near[:, :1]
    for i in range(1, k):
        chunk = mx.where(at >= i * size, near[:, i : i + 1], chunk)
    index = chunk * size + at % size
    return mx.take_along_axis(x, index, axis=-1), index


def search(
    drafter: Drafter,
    context: mx.array,
    root: mx.array,
    shape: TreeShape,
    temperature: mx.array | None = None,
    noise: mx.array | None = None,
) -> Candidates:
    """Propose ``W * L`` candidate nodes.

    With noise the drafter searches for the very draw that the target will make: its logits, at
    the target's temperature, get the noise that the target's will get at the same position. A
    score is the log-softmax of these perturbed values, so it never rises along a path.

    Args:
        drafter: see :class:`~mlx_redrafter.drafters.Drafter`.
        context: (Dc,) the drafter's context of this step.
        root: (1,) int32.
        shape: width ``W``, depth ``L`` and candidate mode.
        temperature: scalar array, None for greedy.
        noise: (L, V) for the positions after the root, None for greedy.

    Returns:
        Candidates, K = W * L, level by level.
    """
    width = shape.width
    state, fixed = drafter.start(context)
    costs = mx.array([0.0])  # a cost is a negative score: sorts are rising
    levels: list[tuple[mx.array, mx.array]] = []  # (beam above, draft token) (2, W), costs (W,)
    for level in range(shape.depth):
        if level == 0:
            logits, state = drafter.step(root, state, fixed)  # (R, Vd), R = 1 at the first level
        else:
            logits, state = drafter.follow(_row(levels[-1][0], -1), state, fixed)
        logits = logits.astype(mx.float32)
        if width > logits.shape[-1]:
            raise OptionError(
                f"beam width {width} is more than the drafter's {logits.shape[-1]} tokens: "
                "use a smaller width"
            )
        if noise is not None and temperature is not None:
            logits = logits / temperature + drafter.select(noise[level])
        if width == 1:
            if shape.lookup:  # alone the score of a chain is of no use
                costs = mass(logits).reshape(-1) - (mx.max(logits, axis=-1) - costs)
            pairs = mx.argmax(logits, axis=-1, keepdims=True).view(mx.int32)
        else:
            joint = mass(logits) - (logits - costs[:, None])
            best, index = least(joint.reshape(1, -1), width)
            costs, size = best.reshape(-1), logits.shape[-1]
            pairs = mx.where(mx.array([[True], [False]]), index // size, index % size)  # (2, W)
            state = mx.take(state, _row(pairs, 0), axis=0)
        levels.append((pairs, costs))
    return _numbered(drafter, levels, shape)


def _numbered(
    drafter: Drafter, levels: list[tuple[mx.array, mx.array]], shape: TreeShape
) -> Candidates:
    """All levels in one list: candidate ``level * W + beam``; the root is -1."""
    width, depth = shape.width, shape.depth
    pairs = mx.concatenate([pairs for pairs, _ in levels], axis=1)  # (2, K), a chain's (1, K)
    scores = -mx.concatenate([costs for _, costs in levels])
    above = [(level - 1) * width if level else -1 for level in range(depth) for _ in range(width)]
    parents = mx.array(above, mx.int32)
    if width == 1:
        return Candidates(drafter.token_ids(pairs.reshape(-1)), parents, scores)
    parents = _row(pairs, 0) + parents
    if shape.mode == "beams":
        scores = mx.where(
            _surviving([_row(pairs, 0) for pairs, _ in levels], width), scores, -mx.inf
        )
    return Candidates(drafter.token_ids(_row(pairs, 1)), parents, scores)


def _row(x: mx.array, i: int) -> mx.array:
    """x[i] as a view, where indexing with a number is a gather."""
    i %= x.shape[0]
    return x[i : i + 1].reshape(-1)


def _surviving(parents: list[mx.array], width: int) -> mx.array:
    """Which candidates (K,) a beam of the last level passes through; parents (W,) per level."""
    alive = [mx.ones((width,), mx.bool_)]
    for below in reversed(parents[1:]):
        alive.append(mx.any((below == mx.arange(width)[:, None]) & alive[-1], axis=-1))
    return mx.concatenate(alive[::-1])
