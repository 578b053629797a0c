"""Estimated Metal dispatches of a graph: a table by kind, and the copies that layouts force.

The sources are files of MLX 0.32 under ``mlx/backend``; a dispatch here is a kernel launch there.
An estimate holds for slabs that nobody else holds, for matrix products that MLX does not split, and
for attention over less than 1024 tokens (beyond, it may take two passes).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from mlx_redrafter.bench.counts.graph import Graph, Primitive

# Only another look at the same buffer: common/common.cpp, and Slice and Split in gpu/slicing.cpp.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Flatten",
    "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip

# Launches of one primitive with inputs as its kernel likes them.
DISPATCHES = {
    "AddMM": 1,  # metal/matmul.cpp
    "Arange": 1,  # metal/primitives.cpp
    "ArgReduce": 1,  # metal/primitives.cpp
    "ArgSort": 1,  # metal/sort.cpp: one block, up to 2048 wide; more: see _sort
    "Sort": 1,
    "ArgPartition": 1,  # metal/sort.cpp: is a sort
    "Partition": 1,
    "Dequantize": 1,  # metal/quantized.cpp: fast::Quantize
    "DynamicSlice": 2,  # gpu/primitives.cpp: the offset is a kernel of its own
    "DynamicSliceUpdate": 2,  # the same; the base is donated or see _base_copied
    "Full": 1,  # gpu/primitives.cpp: a copy of one number
    "Gather": 1,  # metal/indexing.cpp
    "GatherAxis": 1,  # metal/indexing.cpp
    "GatherMM": 1,  # metal/matmul.cpp
    "GatherQMM": 1,  # metal/quantized.cpp
    "LogSumExp": 1,  # metal/logsumexp.cpp
    "Matmul": 1,  # metal/matmul.cpp
    "Pad": 2,  # gpu/slicing.cpp: fill and copy
    "QuantizedMatmul": 1,  # metal/quantized.cpp
    "RMSNorm": 1,  # metal/normalization.cpp
    "RandomBits": 1,  # metal/primitives.cpp
    "RoPE": 1,  # metal/rope.cpp
    "ScaledDotProductAttention": 1,  # metal/scaled_dot_product_attention.cpp: vector or full kernel
    "Scatter": 1,  # metal/indexing.cpp; the base as above
    "ScatterAxis": 1,
    "SliceUpdate": 1,  # metal/indexing.cpp
    "Softmax": 1,  # metal/softmax.cpp
    # metal/reduce.cpp: one launch, two for all of a large array, see _reduce
    "And": 1, "Max": 1, "Min": 1, "Or": 1, "Prod": 1, "Sum": 1,
    # metal/scan.cpp
    "CumSum": 1, "CumLogaddexp": 1,
    # metal/unary.cpp, binary.cpp, ternary.cpp, copy.cpp: element by element, those mx.compile left
    "Abs": 1, "Add": 1, "AsType": 1, "BitwiseAnd": 1, "BitwiseBinary": 1, "BitwiseInvert": 1,
    "BitwiseOr": 1, "BitwiseXor": 1, "Cos": 1, "Divide": 1, "Equal": 1, "Exp": 1, "Floor": 1,
    "FloorDivide": 1, "Greater": 1, "GreaterEqual": 1, "LeftShift": 1, "Less": 1, "LessEqual": 1,
    "Log": 1, "Log1p": 1, "LogicalAnd": 1, "LogicalNot": 1, "LogicalOr": 1, "Maximum": 1,
    "Minimum": 1, "Multiply": 1, "Negative": 1, "NotEqual": 1, "Power": 1, "Reciprocal": 1,
    "Remainder": 1, "RightShift": 1, "Round": 1, "Rsqrt": 1, "Select": 1, "Sigmoid": 1, "Sign": 1,
    "Sin": 1, "Sqrt": 1, "Square": 1, "Subtract": 1, "Tanh": 1,
}  # fmt: skip
FUSED = "Compiled"  # the beginning of a fused kernel's name: metal/compiled.cpp, one launch

_BLOCK = 2048  # metal/sort.cpp: what one threadgroup sorts
_ALL_REDUCE = 4096  # metal/reduce.cpp: what one threadgroup reduces


def dispatches(graph: Graph) -> Counter[str]:
    """Launches by kind of primitive; ``copy before X`` are those a kernel's input needs."""
    found: Counter[str] = Counter()
    for kind, inputs in graph.fused:
        if kind in VIEWS:
            continue
        # gpu/slicing.cpp: a concatenation copies its inputs one by one.
        found[kind] += inputs if kind == "Concatenate" else DISPATCHES.get(kind, 1)
    found.update(_Layouts(graph.traced).extra)
    return found


def unknown(graph: Graph) -> set[str]:
    """Kinds that the table lacks; they count as one launch each."""
    known = VIEWS | DISPATCHES.keys() | {"Concatenate"}
    return {kind for kind, _ in graph.fused if kind not in known and not kind.startswith(FUSED)}


def widest_sort(graph: Graph) -> int:
    """Of all sorts in the graph, the longest row."""
    sorts = [p for p in graph.traced if p.kind in ("ArgSort", "Sort", "ArgPartition", "Partition")]
    return max((p.inputs[0][1][-1] for p in sorts), default=0)


class _Layouts:
    """Follows how arrays lie in memory, with NumPy's views in place of MLX's, and counts launches
    beyond the table's: copies before kernels that need another layout, sorts of many blocks."""

    def __init__(self, primitives: list[Primitive]) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.readers = Counter(name for p in primitives for name in {n for n, _ in p.inputs})
        self.extra: Counter[str] = Counter()
        for primitive in primitives:
            for kind in self._before(primitive):
                self.extra[kind] += 1
            for name, array in self._after(primitive):
                self.arrays[name] = array

    def _inputs(self, primitive: Primitive) -> list[np.ndarray]:
        # Nobody reads or writes these bytes: the system never provides the memory.
        return [
            self.arrays.setdefault(name, np.empty(shape, np.int8))
            for name, shape in primitive.inputs
        ]

    def _after(self, p: Primitive) -> Iterator[tuple[str, np.ndarray]]:
        """The layouts of a primitive's outputs."""
        inputs = self._inputs(p)
        shapes = [shape for _, shape in p.outputs]
        if p.kind == "Transpose":
            views = [inputs[0].transpose(p.arguments[0])]
        elif p.kind == "Slice":
            ranges = zip(*p.arguments, strict=True)
            views = [inputs[0][tuple(slice(*bounds) for bounds in ranges)]]
        elif p.kind == "Split":
            views = np.split(inputs[0], p.arguments[0], p.arguments[1])
        elif p.kind in ("Broadcast", "BroadcastAxes"):
            views = [np.broadcast_to(inputs[0], shapes[0])]
        elif p.kind in ("ExpandDims", "Squeeze", "Reshape", "Flatten", "Unflatten"):
            views = [inputs[0].reshape(shapes[0])]
        elif p.kind in ("Copy", "StopGradient", "Depends"):
            views = inputs[: len(shapes)]
        elif p.kind == "ScaledDotProductAttention" and shapes[0][2] > 8:
            # The full kernel leaves its output (B, N, H, Dh) behind the name (B, H, N, Dh).
            rows = np.empty([shapes[0][i] for i in (0, 2, 1, 3)], np.int8)
            views = [rows.transpose(0, 2, 1, 3)]
        else:
            views = [np.empty(shape, np.int8) for shape in shapes]
        return zip((name for name, _ in p.outputs), views, strict=True)

    def _before(self, p: Primitive) -> Iterator[str]:
        """One name per launch beyond the table's."""
        inputs = self._inputs(p)
        copy = f"copy before {p.kind}"
        if p.kind in ("Reshape", "Flatten", "Unflatten"):
            view = inputs[0].reshape(p.outputs[0][1])
            if view.size and not np.may_share_memory(view, inputs[0]):
                yield "copy by Reshape"  # gpu/copy.h: reshape_gpu
        elif p.kind == "ScaledDotProductAttention":
            # The stand-in reads the queries only: keys and values are whole rows of a slab.
            if not _attention_takes(inputs[0]):
                yield copy
        elif p.kind == "RoPE":
            if not _rope_takes(inputs[0]):
                yield copy
        elif p.kind in ("RMSNorm", "Softmax", "LogSumExp", "QuantizedMatmul"):
            if not inputs[0].flags.c_contiguous:
                yield copy
        elif p.kind in ("Matmul", "AddMM"):
            operands = inputs[:2] if p.kind == "Matmul" else inputs[1:3]
            yield from (copy for x in operands if not _matmul_takes(x))
        elif p.kind in ("DynamicSliceUpdate", "SliceUpdate", "Scatter", "ScatterAxis"):
            if self.readers[p.inputs[0][0]] > 1 or not inputs[0].flags.c_contiguous:
                yield f"copy of the base of {p.kind}"  # common/utils.h: set_copy_output_data
        elif p.kind in ("ArgSort", "Sort", "ArgPartition", "Partition"):
            yield from [f"merging in {p.kind}"] * (_sort(inputs[0].shape[-1]) - 1)
        elif p.kind == "Reduce" and inputs[0].size > _ALL_REDUCE and _size(p.outputs[0][1]) == 1:
            yield "second pass of Reduce"


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _sort(width: int) -> int:
    """metal/sort.cpp: blocks, then merges of pairs, two launches each."""
    blocks = -(-width // _BLOCK)
    return 1 if blocks == 1 else 2 + 2 * math.ceil(math.log2(blocks))


def _attention_takes(q: np.ndarray) -> bool:
    """metal/scaled_dot_product_attention.cpp: q_copy_unless, is_matrix_contiguous."""
    if q.flags.c_contiguous or q.shape[2] > 8:
        return q.strides[3] == 1
    return q.strides[1:] == (q.shape[3], q.shape[3] * q.shape[1], 1)


def _rope_takes(x: np.ndarray) -> bool:
    """metal/rope.cpp: in place, few axes, or heads and tokens exchanged."""
    if x.flags.c_contiguous or x.ndim == 3 or (x.ndim == 4 and x.shape[0] == 1):
        return True
    _, heads, tokens, dim = x.shape
    return x.ndim == 4 and x.strides[:3] == (heads * tokens * dim, dim, heads * dim)


def _matmul_takes(x: np.ndarray) -> bool:
    """metal/matmul.cpp: check_transpose."""
    if x.flags.c_contiguous or x.ndim < 2:
        return True
    return 1 in x.strides[-2:] and 0 not in x.strides[-2:]
