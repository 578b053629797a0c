"""The graph of a function as MLX would run it on Metal, traced on any machine.

On a CPU ``mx.fast`` and ``mx.dequantize`` fall apart into primitives while the graph is built. Here
one opaque primitive, that nothing fuses with and the step does not use otherwise, stands for each
of these kernels. Nothing is evaluated: what comes out is only counted.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

# What stands for a kernel, by the name it has in a drawn graph.
STAND_INS = {
    "CumMax": "ScaledDotProductAttention",
    "CumMin": "RoPE",
    "CumProd": "RMSNorm",
    "Convolution": "Dequantize",
}
_SCANS = {0: "CumMax", 1: "CumMin", 2: "CumSum", 3: "CumProd", 4: "CumLogaddexp"}  # MLX's numbers
_NODE = re.compile(r'\{ (\d+) \[label ="([^"]+)", shape=rectangle\]')
_EDGE = re.compile(r'^"[^"]+" -> (\d+)$', re.MULTILINE)


@dataclass(frozen=True)
class Primitive:
    """One primitive of the traced graph: names and shapes of what goes in and out.

    ``arguments`` are MLX's: axes of a transpose, bounds of a slice, and so on.
    """

    kind: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Graph:
    """One function, twice: ``fused`` (kind, number of inputs) as mx.compile runs it; ``traced``
    as it was before, in order, with shapes."""

    fused: list[tuple[str, int]]
    traced: list[Primitive]


def _rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
    return _after(mx.cumprod(x, -1), weight)


def _rope(x: mx.array, dims: int, **options: Any) -> mx.array:
    return _after(mx.cummin(x, -1), options.get("offset"), options.get("freqs"))


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array | None = None, **_: Any
) -> mx.array:
    return _after(mx.cummax(q, -1), k, v, mask)


def _dequantize(
    w: mx.array, scales: mx.array, biases: mx.array | None = None, group_size: int = 64, *_: Any,
    **__: Any,
) -> mx.array:  # fmt: skip
    size = scales.shape[-1] * group_size
    filters = mx.array(np.zeros((size, 1, 1), np.float32), scales.dtype)
    rows = mx.conv1d(scales.reshape(-1, 1, scales.shape[-1])[..., :1], filters)
    return _after(rows.reshape(*scales.shape[:-1], size), w, biases)


def _after(x: mx.array, *others: Any) -> mx.array:
    """x, and an edge to it from everything else that the kernel reads."""
    return mx.depends(x, [other for other in others if isinstance(other, mx.array)])


@contextlib.contextmanager
def metal_shaped() -> Iterator[None]:
    """Within it models are loaded and graphs built as on Metal; evaluating them is meaningless."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in [
            (mx, "default_device", lambda: mx.Device(mx.gpu)),
            (mx.fast, "rms_norm", _rms_norm),
            (mx.fast, "rope", _rope),
            (mx.fast, "scaled_dot_product_attention", _attention),
            (mx, "dequantize", _dequantize),
        ]:
            stack.enter_context(patch.object(owner, name, value))
        yield


def graph(function: Callable[..., list[mx.array]], *inputs: mx.array) -> Graph:
    """Trace a function of evaluated arrays, within :func:`metal_shaped`."""
    mx.eval(inputs)
    return Graph(_fused(function, *inputs), list(traced(function, *inputs)))


def traced(function: Callable[..., Any], *inputs: mx.array) -> Iterator[Primitive]:
    """Every primitive that a function traces to, before fusion."""
    entries: list[dict[str, Any]] = []
    mx.export_function(entries.append, function, *inputs)
    for entry in entries:
        if entry["type"] != "primitive":
            continue
        kind, arguments = entry["name"], tuple(entry["arguments"])
        if kind == "Scan":
            kind = _SCANS[arguments[0]]
        kind = STAND_INS.get(kind, kind)
        ends = [tuple((name, tuple(shape)) for name, shape, _ in entry[end])
                for end in ("inputs", "outputs")]  # fmt: skip
        yield Primitive(kind, ends[0], ends[1], arguments)


def _fused(function: Callable[..., Any], *inputs: mx.array) -> list[tuple[str, int]]:
    """The primitives that mx.compile leaves."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *mx.compile(function)(*inputs))
    text = drawing.getvalue()
    number_of_inputs: dict[str, int] = {}
    for node in _EDGE.findall(text):
        number_of_inputs[node] = number_of_inputs.get(node, 0) + 1
    nodes: dict[str, str] = dict(_NODE.findall(text))
    # What follows a space is of no interest: "View float32", "Scatter Sum".
    kinds = {node: kind.split()[0] for node, kind in nodes.items()}
    return [
        (STAND_INS.get(kind, kind), number_of_inputs.get(node, 0)) for node, kind in kinds.items()
    ]
