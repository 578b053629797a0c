"""Recurrences over the nodes of a tree in closed form: the state is read once, for all of them.

The delta rule (Gated DeltaNet, KDA): with log gates summed along a node's path, G, and A_ij =
beta_i exp(G_i - G_j) k_i.k_j for its proper ancestors j, what node i adds is delta = (1 + A)^-1
beta (v - exp(G) S k), the WY form of arXiv 2412.06464 with the ancestor mask in place of the
causal one. Mamba2 adds dt x along B and needs no inverse (arXiv 2405.21060).
"""

from __future__ import annotations

import mlx.core as mx

from mlx_redrafter.cache.recurrent import Tape


def delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    gates: mx.array,
    beta: mx.array,
    state: mx.array,
    ancestors: mx.array,
) -> tuple[mx.array, Tape]:
    """q, k (N, H, Dk), v (N, H, Dv), gates (N, H) or (N, H, Dk) as logarithms, beta (N, H), state
    (1, H, Dv, Dk), ancestors (N, N) -> outputs (N, H, Dv), tape."""
    q, k, v = (x.astype(mx.float32).transpose(1, 0, 2) for x in (q, k, v))
    gates = gates.astype(mx.float32)
    gates = (gates if gates.ndim == 3 else gates[..., None]).transpose(1, 0, 2)
    total = ancestors.astype(mx.float32) @ gates  # (H, N, 1 or Dk)
    kk, qk = _decayed(k, k, total, ancestors), _decayed(q, k, total, ancestors)
    weight = beta.astype(mx.float32).T[..., None]
    n = ancestors.shape[0]
    above = weight * kk * (1 - mx.eye(n))
    before = state[0].astype(mx.float32).swapaxes(1, 2)  # (H, Dk, Dv)
    delta = _solve(above, weight * (v - (mx.exp(total) * k) @ before))
    out = (mx.exp(total) * q) @ before + qk @ delta
    return out.transpose(1, 0, 2), (total, k, delta)


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
    out = out + mx.exp(total) * (c @ state[0].astype(mx.float32).swapaxes(1, 2))
    return out.transpose(1, 0, 2), (total, b, added)


def _decayed(q: mx.array, k: mx.array, total: mx.array, ancestors: mx.array) -> mx.array:
    """Products (H, N, N) of every node with its ancestors, decayed along the way."""
    below = mx.where(
        ancestors[None, :, :, None], total[:, :, None] - total[:, None], mx.array(-mx.inf)
    )
    decay = mx.exp(below)  # (H, N, N, 1 or Dk)
    if decay.shape[-1] == 1:
        return decay[..., 0] * (q @ k.swapaxes(1, 2))
    return mx.sum(q[:, :, None] * k[:, None] * decay, axis=-1)


def _solve(above: mx.array, right: mx.array) -> mx.array:
    """(1 + above)^-1 right, where above (H, N, N) is nilpotent: (1 - A)(1 + A^2)(1 + A^4)..."""
    reach, power = 1, -above
    while reach < above.shape[-1]:
        right = right + power @ right
        power, reach = power @ power, 2 * reach
    return right
