"""Where an mlx_lm module takes its tokens for one row after the other, and what it does instead.

A patch is in place only while a pass is traced, and only for the thread that traces it. mlx_lm
0.32's names; `tests/models/test_adapter.py` holds every type that has them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.ssm import compute_dt

from mlx_redrafter.models import forms
from mlx_redrafter.models.running import Running

Patch = Callable[[Running, Callable[..., Any]], Callable[..., Any]]
_ONE_AT_A_TIME = threading.RLock()


class Place(NamedTuple):
    """An attribute of a module or a class, and what replaces it, made from the pass and from what
    is there."""

    owner: Any
    name: str
    patch: Patch


@contextlib.contextmanager
def patched(run: Running, places: Sequence[Place]) -> Iterator[None]:
    """Within, this thread finds the replacements."""
    with _ONE_AT_A_TIME, contextlib.ExitStack() as undo:
        thread = threading.get_ident()
        for owner, name, patch in places:
            stock = getattr(owner, name)
            new = patch(run, stock)
            here = _for_thread(thread, new, stock) if callable(new) else new
            if name in vars(owner):
                undo.callback(setattr, owner, name, stock)
            else:  # of a parent class, which may be exchanged too
                undo.callback(delattr, owner, name)
            setattr(owner, name, here)
        yield


def _for_thread(
    thread: int, new: Callable[..., Any], stock: Callable[..., Any]
) -> Callable[..., Any]:
    def either(*args: Any, **options: Any) -> Any:
        return (new if threading.get_ident() == thread else stock)(*args, **options)

    return either


def rope(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """One position for every node: nodes stand on the batch axis."""

    def call(x: mx.array, *args: Any, offset: Any = 0, **options: Any) -> mx.array:
        several = isinstance(offset, mx.array) and offset.size == run.n > 1
        if not several or x.shape[0] == run.n:
            return stock(x, *args, offset=offset, **options)
        rows = x[:, None] if x.ndim == 3 else x
        out = stock(rows.transpose(2, 1, 0, 3), *args, offset=offset, **options)
        out = out.transpose(2, 1, 0, 3)
        return out[:, 0] if x.ndim == 3 else out

    return call


def attention(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Nodes that stand for sequences read one sequence's keys and values."""

    def call(q: mx.array, k: mx.array, v: mx.array, *args: Any, **options: Any) -> mx.array:
        if not (run.branching and q.shape[0] == run.n and k.shape[0] == 1):
            return stock(q, k, v, *args, **options)
        mask = options.pop("mask")
        out = stock(
            q.transpose(2, 1, 0, 3), k, v, *args, mask=mask.transpose(2, 1, 0, 3), **options
        )
        return out.transpose(2, 1, 0, 3)

    return call


def absorbed(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Latent attention expands its cache for more than one token: nodes stand for sequences of
    one, so that a tree is computed as single tokens are, and the latents are read as they lie."""

    def turned(x: Any) -> Any:
        if not isinstance(x, mx.array):
            return x
        if x.ndim == 3 and x.shape[:2] == (1, run.n):
            return x.transpose(1, 0, 2)
        return x[:, None, None] if x.ndim == 2 and x.shape[0] == run.n else x

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if not run.branching:
            return stock(self, *args, **options)
        options = {name: turned(x) for name, x in options.items()}
        return stock(self, *map(turned, args), **options).transpose(1, 0, 2)

    return call


def routed(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Which experts a layer chose: what a pass costs depends on how many."""

    def call(self: Any, x: mx.array, indices: mx.array) -> mx.array:
        run.chosen.append(indices)
        out: mx.array = stock(self, x, indices)
        return out

    return call


def conv1d(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """A short convolution reads what comes before a node on its own path."""

    def call(self: nn.Conv1d, x: mx.array) -> mx.array:
        kept = x.shape[1] - run.n
        if self.padding or kept != self.weight.shape[1] - 1 or x.shape[0] != 1 or not kept:
            return stock(self, x)
        slot = run.slot_of_rows(kept, x.shape[2])
        out = stock(self, run.last_rows(slot, x[:, kept:]))
        return out.transpose(1, 0, 2) if run.tree else out

    return call


def gated_delta(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Gated DeltaNet and KDA."""

    def call(
        q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, A_log: mx.array,
        dt_bias: mx.array, state: mx.array, mask: Any = None, **options: Any,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        out, left = forms.gated_delta(
            stock, (q, k, v, a, b), (A_log, dt_bias), state, run.lineage, run.closed, **options
        )
        if run.closed:
            gates = a.shape[-1] if a.ndim == 4 else 1
            run.taped(state, left, gates, v.shape[2] // k.shape[2])
        else:
            run.state(state, cast(mx.array, left))
        return out, state

    return call


def stepped(
    run: Running,
    state: mx.array,
    step: Callable[[int, mx.array], tuple[mx.array, mx.array]],
    axis: int = 1,
) -> mx.array:
    """The outputs of N nodes; see `forms.stepped`."""
    assert run.lineage is not None
    out, states = forms.stepped(run.lineage, state, step, axis)
    run.state(state, states)
    return out


def ssm(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba2."""

    def call(
        x: mx.array, A_log: mx.array, B: mx.array, C: mx.array, D: mx.array, dt: mx.array,
        dt_bias: mx.array, state: mx.array, time_step_limit: Any = (0.001, 100.0),
        mask: Any = None, lengths: Any = None,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        def rows(at: slice, before: mx.array) -> Any:
            return stock(
                x[:, at], A_log, B[:, at], C[:, at], D, dt[:, at], dt_bias, before, time_step_limit
            )

        if run.lineage is None:
            out, after = rows(slice(None), state)
            if run.closed:
                run.taped(state, after, 1)
            else:
                run.state(state, after)
            return out, after
        if run.closed:
            steps, rates = compute_dt(dt, dt_bias, time_step_limit)[0], -mx.exp(A_log)
            rates, seen = rates.astype(steps.dtype), run.lineage.ancestors
            out, tape = forms.mamba2(x[0], steps, rates, B[0], C[0], state, seen)
            run.taped(state, tape, 1)
            return (out[None] + x * D.reshape(1, 1, -1, 1)).astype(x.dtype), state
        return stepped(run, state, lambda i, before: rows(slice(i, i + 1), before)), state

    return call


def query_scales(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Ministral 3 and Mistral 4 scale queries by their position."""

    def call(size: int, offset: Any, beta: float, limit: int) -> mx.array:
        if not run.branching:
            return stock(size, offset, beta, limit)
        scales = 1 + beta * mx.log(1 + mx.floor(run.positions / limit))
        return scales[:, None]

    return call


def capture(module: nn.Module) -> Patch:
    """Keep what a module puts out as the final hidden states."""

    def patch(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            out = stock(self, *args, **options)
            if self is module:
                run.hidden = out
            return out

        return call

    return patch


def layers(modules: Sequence[nn.Module]) -> Patch:
    """Keep what layers put out."""
    numbers = {id(module): i for i, module in enumerate(modules)}

    def patch(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            out = stock(self, *args, **options)
            if id(self) in numbers:
                run.outputs[numbers[id(self)]] = out[0] if isinstance(out, tuple) else out
            return out

        return call

    return patch
