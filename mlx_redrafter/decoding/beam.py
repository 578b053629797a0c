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

# On Metal a sort of up to this many values is one dispatch; wider ones are a merge sort in many.
SORT_WIDTH = 2048


def top_k(x: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k largest of every row without sorting the row, exactly.

    The k chunks with the largest maxima contain the k largest values; only they are sorted.

    Args:
        x: (R, V).

    Returns:
        values (R, k) in falling order, indices (R, k) int32.
    """
    rows, width = x.shape
    if k == 1:
        best = mx.argmax(x, axis=-1, keepdims=True)
        return mx.take_along_axis(x, best, axis=-1), best.astype(mx.int32)
    if width <= SORT_WIDTH:
        order = mx.argsort(-x, axis=-1)[:, :k].astype(mx.int32)
        return mx.take_along_axis(x, order, axis=-1), order
    size = min(SORT_WIDTH // k, max(k, 2 ** round(math.log2(math.sqrt(width)))))
    count = -(-width // size)
    chunks = x
    if count * size != width:
        finite = mx.maximum(x, mx.finfo(x.dtype).min)  # so that padding is below everything
        chunks = mx.pad(finite, [(0, 0), (0, count * size - width)], constant_values=-mx.inf)
    chunks = chunks.reshape(rows, count, size)
    _, best_chunks = top_k(chunks.max(-1), k)  # (R, k)
    inside = mx.take_along_axis(chunks, best_chunks[..., None], axis=1)  # (R, k, size)
    _, at = top_k(inside.reshape(rows, k * size), k)
    chunk = mx.take_along_axis(best_chunks, at // size, axis=-1)
    indices = (chunk * size + at % size).astype(mx.int32)
    return mx.take_along_axis(x, indices, axis=-1), indices


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
    tokens, scores = root, mx.zeros((1,), mx.float32)
    levels: list[Candidates] = []  # with parents numbered within the level above
    for level in range(shape.depth):
        logits, state = drafter.step(tokens, state, fixed)  # (R, Vd), R = 1 at the first level
        logits = logits.astype(mx.float32)
        if width > logits.shape[-1]:
            raise OptionError(
                f"beam width {width} is more than the drafter's {logits.shape[-1]} tokens: "
                "use a smaller width"
            )
        if noise is not None and temperature is not None:
            logits = logits / temperature + drafter.select(noise[level])
        if width == 1:
            picks, beam = mx.argmax(logits, axis=-1).astype(mx.int32), mx.zeros((1,), mx.int32)
            if shape.lookup:  # alone the score of a chain is of no use
                scores = scores + mx.max(logits, axis=-1) - mx.logsumexp(logits, axis=-1)
        else:
            values, picks = top_k(logits, width)  # (R, W)
            joint = scores[:, None] + values - mx.logsumexp(logits, axis=-1, keepdims=True)
            scores, order = _best(joint, width)
            beam = order // width  # (W,)
            picks = mx.take(picks.reshape(-1), order)
            state = mx.take(state, beam, axis=0)
        tokens = drafter.token_ids(picks)
        levels.append(Candidates(tokens, beam, scores))
    if shape.mode == "beams" and width > 1:
        levels = _surviving(levels, width)
    return _numbered(levels, width)


def _numbered(levels: list[Candidates], width: int) -> Candidates:
    """All levels in one list: candidate ``level * W + beam``; the root is -1."""
    tokens, beams, scores = (mx.concatenate(list(part)) for part in zip(*levels, strict=True))
    above = [(level - 1) * width if level else -1 for level in range(len(levels))]
    return Candidates(tokens, beams + mx.repeat(mx.array(above, mx.int32), width), scores)


def _best(joint: mx.array, width: int) -> tuple[mx.array, mx.array]:
    """The W best of R x W joint scores, in falling order, and where they were."""
    flat = joint.reshape(-1)
    order = mx.argsort(-flat)[:width]
    return mx.take(flat, order), order.astype(mx.int32)


def _surviving(levels: list[Candidates], width: int) -> list[Candidates]:
    """Drop (score -inf) every candidate that no beam of the last level passes through."""
    kept = [levels[-1]]
    alive = mx.ones((width,), mx.bool_)
    for level in range(len(levels) - 2, -1, -1):
        below = levels[level + 1].parents  # (W,)
        alive = mx.any((below[None] == mx.arange(width)[:, None]) & alive[None], axis=-1)
        tokens, parents, scores = levels[level]
        kept.append(Candidates(tokens, parents, mx.where(alive, scores, -mx.inf)))
    return kept[::-1]
