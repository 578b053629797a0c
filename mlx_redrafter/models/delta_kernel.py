"""The delta rule of a tree by one kernel on Metal, where it was found right and faster there.

`python -m mlx_redrafter.models.delta_kernel NAME ...` asks the GPU: a line of JSON for each.
"""

from __future__ import annotations

import json
import sys
import time
from typing import NamedTuple

import mlx.core as mx

from mlx_redrafter.cache.lineage import Lineage
from mlx_redrafter.cache.recurrent import Tape

from ..kernels import delta, verdicts
from ..kernels.verdicts import GAIN, Say, Verdict
from .forms import Rule, delta_rule

PROBE = "mlx_redrafter.models.delta_kernel"
NODES = (1, 4, 8, 16)  # to measure with
NEAR = 1e-4  # of the largest number
_LAYERS, _REPEATS = 24, 5


class Heads(NamedTuple):
    """Of a layer's state: heads of keys and of values, and their sizes."""

    keys: int
    values: int
    key_size: int
    value_size: int


def rule(
    qk: mx.array,
    v: mx.array,
    gates: mx.array,
    beta: mx.array,
    state: mx.array,
    lineage: Lineage,
) -> tuple[mx.array, Tape]:
    """`forms.delta_rule` by the kernel, where there is one for it."""
    if gates.ndim != 2 or lineage.n > delta.MOST_NODES:
        return delta_rule(qk, v, gates, beta, state, lineage)
    wide = state.astype(mx.float32)
    launch = delta.delta(qk, v, gates.astype(mx.float32), beta, lineage.ancestors, wide)
    out, total, added = launch.run()
    return out, (total, mx.split(qk, 2, axis=1)[1].squeeze(1), added)


def pays(heads: Heads, say: Say) -> bool:
    """Has this GPU the kernel right, and faster for every number of nodes? One form serves all of
    them, or what a draft computes would not be what plain decoding does."""
    if not delta.possible(heads.key_size, heads.value_size):
        return False
    name = named(heads)
    found = verdicts.found([name], PROBE, say).get(name, Verdict())
    return bool(found.gains) and min(found.gains.values()) >= GAIN


def named(heads: Heads) -> str:
    """As it is written down: delta-16-32-128-128."""
    return "-".join(["delta", *map(str, heads)])


def examined(name: str) -> Verdict:
    """What the kernel gains against the closed form in MLX's operations."""
    heads = Heads(*map(int, name.split("-")[1:]))
    mx.random.seed(0)
    try:
        if not all(_right(heads, nodes) for nodes in (1, 2, 7, 16, 32)):
            return Verdict()
        return Verdict({nodes: _gain(heads, nodes) for nodes in NODES})
    except (RuntimeError, ValueError) as error:
        return Verdict(error=f"{name}: {' '.join(str(error).split())[:200]}")


def rows_of(heads: Heads, nodes: int) -> tuple[list[mx.array], Lineage]:
    """qk, v, gates, beta and state, for a tree of two branches."""
    qk = mx.random.normal((heads.keys, 2, nodes, heads.key_size))
    qk = qk * mx.rsqrt(mx.sum(qk * qk, axis=-1, keepdims=True))
    v = mx.random.normal((nodes, heads.values, heads.value_size)).astype(mx.bfloat16)
    gates = -mx.random.uniform(0, 1, (nodes, heads.values))
    beta = mx.random.uniform(0, 1, (nodes, heads.values)).astype(mx.bfloat16)
    state = mx.random.normal((1, heads.values, heads.value_size, heads.key_size))
    place = mx.arange(nodes)
    side = (place[:, None] - place[None]) % 2 == 0
    ancestors = (place[:, None] >= place[None]) & (side | (place[None] == 0))
    return [qk, v, gates, beta, state], Lineage(ancestors)


def _right(heads: Heads, nodes: int) -> bool:
    rows, lineage = rows_of(heads, nodes)
    pairs = zip(_flat(rule, rows, lineage), _flat(delta_rule, rows, lineage), strict=True)
    return all(
        bool(mx.all(mx.abs(one - other) <= NEAR * mx.max(mx.abs(other)) + 1e-6).item())
        for one, other in pairs
    )


def _flat(function: Rule, rows: list[mx.array], lineage: Lineage) -> list[mx.array]:
    out, tape = function(*rows, lineage)
    return [out, *tape]


def _gain(heads: Heads, nodes: int) -> float:
    """As the layers of a model do it: one after the other, each with a state of its own."""
    rows, lineage = rows_of(heads, nodes)
    states = [rows[4] + i for i in range(_LAYERS)]
    mx.eval(rows, states, lineage.ancestors)

    def seconds(function: Rule) -> float:
        def chain(v: mx.array, ancestors: mx.array, states: list[mx.array]) -> mx.array:
            tree = Lineage(ancestors)
            for state in states:
                out = function(rows[0], v, rows[2], rows[3], state, tree)[0]
                v = out.astype(v.dtype)
            return v

        compiled = mx.compile(chain)
        mx.eval(compiled(rows[1], lineage.ancestors, states))
        best = float("inf")
        for _ in range(_REPEATS):
            start = time.perf_counter()
            mx.eval(compiled(rows[1], lineage.ancestors, states))
            best = min(best, time.perf_counter() - start)
        return best

    return round(seconds(delta_rule) / seconds(rule), 3)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(json.dumps({"name": given, **examined(given).as_dict()}), flush=True)
