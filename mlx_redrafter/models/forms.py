"""Recurrences over the nodes of a tree, in two forms.

By steps, each of which goes on from its parent's state: to the bit what single tokens give. Closed:
the state is read once for all nodes.

The delta rule (Gated DeltaNet, KDA): with log gates summed along a node's path, G, and A_ij =
beta_i exp(G_i - G_j) k_i.k_j for its proper ancestors j, what node i adds is delta = (1 + A)^-1
beta (v - exp(G) S k), the WY form of arXiv 2412.06464 with the ancestor mask in place of the
causal one. Mamba2 adds dt x along B and needs no inverse (arXiv 2405.21060).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.cache.lineage import Lineage
from mlx_redrafter.cache.recurrent import Tape

Rule = Callable[..., tuple[mx.array, Tape]]


class Walk:
    """The states of a tree's nodes, each made from its parent's.

    Args:
        start: (1, ...), before the root.
    """

    def __init__(self, lineage: Lineage, start: mx.array) -> None:
        self.lineage, self.start, self.done = lineage, start, 0
        self.states: mx.array | None = None  # (N, ...), of the nodes that are done

    def before(self) -> mx.array:
        """The state that the next node goes on from."""
        if self.states is None:
            return self.start
        return mx.take(self.states, self.lineage.parents[self.done : self.done + 1], axis=0)

    def after(self, state: mx.array) -> bool:
        """What the node made of it; was it the last?"""
        if self.states is None:
            self.states = mx.broadcast_to(state, (self.lineage.n, *state.shape[1:]))
        else:
            self.states = mx.slice_update(self.states, state, mx.array([self.done]), (0,))
        self.done += 1
        return self.done == self.lineage.n


def stepped(
    lineage: Lineage,
    start: mx.array,
    step: Callable[[int, mx.array], tuple[mx.array, mx.array]],
    axis: int = 1,
) -> tuple[mx.array, mx.array]:
    """The outputs of N nodes, joined along an axis, and the states (N, ...) behind them."""
    walk, out = Walk(lineage, start), []
    for i in range(lineage.n):
        y, after = step(i, walk.before())
        walk.after(after)
        out.append(y)
    assert walk.states is not None
    return mx.concatenate(out, axis=axis), walk.states


def gated_delta(
    stock: Callable[..., tuple[mx.array, mx.array]],
    rows: tuple[mx.array, mx.array, mx.array, mx.array, mx.array],
    rates: tuple[mx.array, mx.array],
    state: mx.array,
    lineage: Lineage | None,
    closed: bool,
    **options: Any,
) -> tuple[mx.array, mx.array | Tape]:
    """Gated DeltaNet and KDA over a tree, or over a chunk of a prompt.

    Args:
        stock: mlx_lm's gated_delta_update, with these options.
        rows: its q, k, v, a and b, (1, N, ...).
        rates: A_log and dt_bias.
        lineage: None: a chunk.

    Returns:
        outputs (1, N, H, Dv), and what the state's cache is extended by.
    """
    if lineage is None:
        return stock(*rows, *rates, state, **options)
    if not closed:

        def step(i: int, before: mx.array) -> tuple[mx.array, mx.array]:
            return stock(*(x[:, i : i + 1] for x in rows), *rates, before, **options)

        return stepped(lineage, state, step)
    q, k, v, a, b = (x.squeeze(0) for x in rows)
    joined = (mx.stack([q, k], axis=1), v, a, b)
    out, tape = closed_delta(joined, rates, state, lineage, **options)
    return out[None].astype(q.dtype), tape


def closed_delta(
    rows: tuple[mx.array, mx.array, mx.array, mx.array],
    rates: tuple[mx.array, mx.array],
    state: mx.array,
    lineage: Lineage,
    scale: float = 1.0,
    rule: Rule | None = None,
    **options: Any,
) -> tuple[mx.array, Tape]:
    """`gated_delta` over a tree in closed form: outputs (N, H, Dv), tape.

    Args:
        rows: queries and keys as one, (N, 2, Hk, Dk), v, a and b (N, ...).
        scale: queries are still to be multiplied by its square, and keys by it.
        rule: what computes it in place of `delta_rule`.
    """
    qk, v, a, b = rows
    beta = mx.sigmoid(b) * (2.0 if options.get("allow_neg_eigval") else 1.0)
    gates = _log_gates(*rates, a, options.get("lower_bound"))
    scales = mx.array([scale**2, scale])[:, None, None]
    # (Hk, 2, N, Dk): in this order by the same kernel.
    qk = qk.transpose(2, 1, 0, 3).astype(mx.float32) * scales
    return (rule or delta_rule)(qk, v, gates, beta, state, lineage)


def _log_gates(A_log: mx.array, dt_bias: mx.array, a: mx.array, lower: float | None) -> mx.array:
    """The logarithm of mlx_lm's gates: of what may be 0 none can be taken."""
    if lower is not None:
        rate = mx.exp(A_log.astype(mx.float32))
        return lower * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    return -mx.exp(A_log.astype(mx.float32)) * nn.softplus(a + dt_bias).astype(mx.float32)


def delta_rule(
    qk: mx.array,
    v: mx.array,
    gates: mx.array,
    beta: mx.array,
    state: mx.array,
    lineage: Lineage,
) -> tuple[mx.array, Tape]:
    """qk (Hk, 2, N, Dk), v (N, H, Dv), gates (N, H) or (N, H, Dk) as logarithms, beta (N, H), state
    (1, H, Dv, Dk) -> outputs (N, H, Dv), tape.

    A state is multiplied by queries and keys at once, and keys are not repeated for their heads.
    """
    groups, _, n, size = qk.shape
    each, width = v.shape[1] // groups, v.shape[2]

    def by_group(x: mx.array) -> mx.array:
        """(N, H, *) -> (Hk, R, N, *)"""
        return x.reshape(n, groups, each, -1).transpose(1, 2, 0, 3).astype(mx.float32)

    if n > 1:
        gates = lineage.ancestors.astype(mx.float32) @ gates.reshape(n, -1)
    total = by_group(gates)  # along every path, (Hk, R, N, 1 or Dk)
    grown, weight, v = mx.exp(total), by_group(beta), by_group(v)
    before = state.squeeze(0).astype(mx.float32).reshape(groups, each, width, size)
    before = before.swapaxes(2, 3)
    if total.shape[-1] == 1:
        rows = qk.reshape(groups, 1, 2 * n, size)
        read = rows @ before  # (Hk, R, 2N, Dv)
        products = rows @ rows[:, :, n:].swapaxes(2, 3)  # (Hk, 1, 2N, N)
        of_queries, of_keys = (grown * part for part in mx.split(read, 2, axis=2))
        decay = _decay(total, lineage.ancestors)[..., 0] if n > 1 else mx.array(1.0)
        qs, ks = (decay * part for part in mx.split(products, 2, axis=2))
    else:
        both = qk[:, None] * grown[:, :, None]  # (Hk, R, 2, N, Dk)
        read = both.reshape(groups, each, 2 * n, size) @ before
        of_queries, of_keys = mx.split(read, 2, axis=2)
        q, k = (part for part in mx.split(qk, 2, axis=1))  # (Hk, 1, N, Dk)
        decay = _decay(total, lineage.ancestors)
        qs, ks = (mx.sum(x[:, :, :, None] * k[:, :, None] * decay, axis=-1) for x in (q, k))
    delta = weight * (v - of_keys)
    if n == 1:
        out = of_queries + qs * delta
    else:
        delta = _solve(mx.where(lineage.above, weight * ks, mx.array(0.0)), delta)
        out = mx.addmm(of_queries, qs, delta)
    keys = mx.split(qk, 2, axis=1)[1].squeeze(1)
    tape = total.reshape(-1, n, total.shape[-1]), keys, delta.reshape(-1, n, width)
    return out.transpose(2, 0, 1, 3).reshape(n, -1, width), tape


def mamba2(
    x: mx.array,
    steps: mx.array,
    rates: mx.array,
    b: mx.array,
    c: mx.array,
    state: mx.array,
    ancestors: mx.array,
) -> tuple[mx.array, Tape]:
    """x (N, H, Dh), steps (N, H), rates (H,) below 0, b, c (N, G, Ds), state (1, H, Dh, Ds),
    ancestors (N, N) -> outputs (N, H, Dh) without what passes by the state, tape."""
    repeats = x.shape[1] // b.shape[1]
    b, c = (mx.repeat(y.astype(mx.float32).transpose(1, 0, 2), repeats, axis=0) for y in (b, c))
    total = ancestors.astype(mx.float32) @ (steps * rates).T[..., None]  # (H, N, 1)
    added = (steps[..., None] * x.astype(mx.float32)).transpose(1, 0, 2)  # (H, N, Dh)
    out = _decayed(c, b, total, ancestors) @ added
    out = out + mx.exp(total) * (c @ state.squeeze(0).astype(mx.float32).swapaxes(1, 2))
    return out.transpose(1, 0, 2), (total, b, added)


def _decayed(q: mx.array, k: mx.array, total: mx.array, ancestors: mx.array) -> mx.array:
    """Products (H, N, N) of every node with its ancestors, decayed along the way."""
    return _decay(total, ancestors)[..., 0] * (q @ k.swapaxes(1, 2))


def _decay(total: mx.array, ancestors: mx.array) -> mx.array:
    """total (..., N, G) -> what is left of every ancestor at a node, (..., N, N, G)."""
    below = total[..., :, None, :] - total[..., None, :, :]
    return mx.exp(mx.where(ancestors[:, :, None], below, mx.array(-mx.inf)))


def _solve(above: mx.array, right: mx.array) -> mx.array:
    """(1 + above)^-1 right, where above (..., N, N) is nilpotent: (1 - A)(1 + A^2)(1 + A^4)..."""
    reach, power = 1, -above
    while True:
        right = mx.addmm(right, power, right)
        reach *= 2
        if reach >= above.shape[-1]:
            return right
        power = power @ power
