"""Layers that keep a state of fixed size: the rows of a short convolution, and recurrences.

A sequence can be cut only where a snapshot of a state was taken. What the nodes of a tree do to it
waits, and the next pass takes in those that were accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_redrafter.cache.layer import Pass

Tape = tuple[mx.array, mx.array, mx.array]
"""What N nodes do to a state of H heads: log gates summed along the path (H, N, 1 or Dk), keys
(Hk, N, Dk), each of as many heads as there are for one, and what is added along them (H, N, Dv)."""


@dataclass(frozen=True)
class State:
    """Of a recurrence, as it is after every node: N states wait. A `cache.layer.LayerCache`.

    Args:
        shape: of one sequence's state, which has one row.
        dtype: of the state; None: what the model computes with.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype | None
    in_place = False
    cuts_anywhere = False
    ahead = 0

    def empty(self, capacity: int, dtype: mx.Dtype, rows: int = 1) -> mx.array:
        return mx.zeros((rows * self.shape[0], *self.shape[1:]), self.dtype or dtype)

    def grow(self, kept: mx.array, capacity: int) -> mx.array:
        return kept

    def capacity(self, kept: mx.array) -> None:
        return None

    def nothing(self, kept: mx.array, nodes: int) -> mx.array | Tape:
        return mx.zeros((nodes, *kept.shape[1:]), kept.dtype)

    def commit(
        self, kept: mx.array, pending: mx.array, slots: mx.array, position: mx.array
    ) -> mx.array:
        """pending (N', ...): the state is that after the last accepted node."""
        accepted, last = _accepted(slots, position)
        after = pending if len(pending) == 1 else mx.take(pending, last, axis=0)
        return mx.where(mx.any(accepted), after, kept)

    def extend(
        self, kept: mx.array, rows: mx.array, to: Pass
    ) -> tuple[mx.array, mx.array | tuple[()], None]:
        """rows: the states after the N nodes of a tree, or the one after a chunk of a prompt."""
        rows = rows.astype(kept.dtype)
        return (rows, (), None) if to.ancestors is None else (kept, rows, None)


@dataclass(frozen=True)
class TapedState(State):
    """Of a recurrence whose state (1, H, Dv, Dk) is made from a tape: it is read and written once
    a pass, however many nodes it has.

    Args:
        gates: of a head; 1, or Dk.
        sharing: heads that have one key.
    """

    gates: int = 1
    sharing: int = 1

    def nothing(self, kept: mx.array, nodes: int) -> Tape:
        heads, values, size = kept.shape[1:]
        total, key, delta = (
            mx.zeros((count, nodes, width), mx.float32)
            for count, width in (
                (heads, self.gates), (heads // self.sharing, size), (heads, values)
            )
        )  # fmt: skip
        return total, key, delta

    def commit(  # type: ignore[override]
        self, kept: mx.array, pending: Tape, slots: mx.array, position: mx.array
    ) -> mx.array:
        accepted, last = _accepted(slots, position)
        total, keys, delta = pending
        count, n = keys.shape[:2]
        grouped = (count, self.sharing)
        total, delta = (x.reshape(*grouped, n, -1) for x in (total, delta))
        state = kept.astype(mx.float32).reshape(*grouped, *kept.shape[2:])
        if n == 1:
            after = mx.exp(total) * state + delta.swapaxes(2, 3) * keys[:, None]
        else:
            end = mx.take(total, last, axis=2)  # (Hk, R, 1, 1 or Dk)
            weight = mx.exp(mx.minimum(end - total, 0)) * accepted[:, None]
            after = mx.exp(end) * state + delta.swapaxes(2, 3) @ (keys[:, None] * weight)
        after = mx.where(mx.any(accepted), after, state)
        return after.reshape(kept.shape).astype(kept.dtype)

    def extend(  # type: ignore[override]
        self, kept: mx.array, rows: mx.array | Tape, to: Pass
    ) -> tuple[mx.array, mx.array | Tape | tuple[()], None]:
        """rows: the tape of a tree's nodes, or the state after a chunk of a prompt."""
        if isinstance(rows, tuple):
            return kept, rows, None
        return rows.astype(kept.dtype), (), None


@dataclass(frozen=True)
class LastRows(State):
    """The last rows of a sequence, as a short convolution reads them: (1, K-1, C)."""

    def extend(  # type: ignore[override]
        self, kept: mx.array, rows: mx.array, to: Pass
    ) -> tuple[mx.array, mx.array | tuple[()], mx.array]:
        """rows (1, N, C); what is read: for every node of a tree its own last rows (N, K, C), of a
        chunk the kept rows and these (1, K-1+N, C)."""
        every = mx.concatenate([kept, rows.astype(kept.dtype)], axis=1)
        if to.lineage is None:
            return every[:, -kept.shape[1] :], (), every
        windows = to.lineage.windows(every.squeeze(0))
        return kept, windows[:, 1:], windows


def _accepted(slots: mx.array, position: mx.array) -> tuple[mx.array, mx.array]:
    """Which nodes (N',) were accepted, and the last of them, (1,)."""
    accepted = slots < position
    last = mx.argmax(mx.where(accepted, slots, mx.array(-1, slots.dtype)), keepdims=True)
    return accepted, last
