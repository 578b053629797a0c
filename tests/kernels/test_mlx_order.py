"""`exact` adds up a row as MLX's own kernel for a single row does, whose text is in the wheel."""

from __future__ import annotations

import re
from pathlib import Path

import mlx
import mlx.core as mx
import pytest
from emulated import MISSING, Emulator, Instance
from kernel_cases import Product, product, same

from mlx_redrafter.kernels.products import Order
from mlx_redrafter.kernels.source import Kernel, Launch
from mlx_redrafter.runtime.compiler import cpuinfo

HEADER = next(iter(Path(next(iter(mlx.__path__))).rglob("metal/kernels/quantized.h")), None)
FUNCTIONS = ("get_pack_factor", "get_bytes_per_pack", "load_vector", "load_vector_safe", "qdot",
             "qdot_safe", "qmv_fast_impl", "qmv_impl")  # fmt: skip
SINGLE = Kernel("mlx_single", ("x", "w", "scales", "biases"), ("y",))
# MLX's text has plain pointers: nothing is checked in it.
BODY = """
auto raw = [](auto p) {{ return (const decltype(p[0])*)p.array->bytes.data(); }};
auto in = raw(x);
const int K = x_shape[1], N = w_shape[0];
uint3 place = threadgroup_position_in_grid;
{function}<S, {group}, {bits}{more}>(
    raw(w), raw(scales), raw(biases), raw(x), (S*)y.array->bytes.data(), K, N, place,
    simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
y.array->written.assign(y.array->count, 1);
"""

pytestmark = [
    pytest.mark.skipif(MISSING, reason="needs Linux and g++"),
    pytest.mark.skipif(HEADER is None, reason="this MLX comes without the text of its kernels"),
]


def functions() -> str:
    """MLX's, whole, with what they need of its other headers."""
    assert HEADER is not None
    text = HEADER.read_text()
    found = []
    for name in FUNCTIONS:
        match = re.search(
            rf"^template <[^>]*>\n[^;{{}}#]*\b{name}\([^{{]*\{{.*?^}}", text, re.M | re.S
        )
        assert match is not None, name
        found.append(match.group())
    head = "#undef constant\n#define constant\n#define METAL_FUNC inline\n"
    head += "constexpr int SIMD_SIZE = 32;\n"
    clamp = "inline int clamp(int x, int low, int high) { return min(max(x, low), high); }\n"
    clamp += "inline float select(float no, float yes, bool which) { return which ? yes : no; }"
    return re.sub(r"\[\[\w+\]\]", "", "\n".join([head, clamp, *found]))


def single(case: Product, function: str, row: int) -> tuple[Launch, str]:
    """One row as MLX does it, in float32 as cases of `exact` are."""
    like = case.exact(Order(1, False), row)
    grid = (32, 2 * -(-case.weights.w.shape[0] // 8), 1)
    constants = {"T": mx.float32, "S": mx.float32}
    wide = [x.astype(mx.float32) if x.dtype == case.x.dtype else x for x in like.inputs]
    more = ", false" if function == "qmv_fast_impl" else ""
    text = BODY.format(function=function, group=case.group, bits=case.bits, more=more)
    return Launch(SINGLE, wide, constants, grid, (32, 2, 1), like.shapes, like.dtypes), text


CASES = [
    (product(3, 1024, 16, 4, 64, mx.float16), "qmv_fast_impl", 2),
    (product(2, 288, 24, 4, 32, mx.float16), "qmv_impl", 1),
    (product(2, 512, 8, 8, 128, mx.bfloat16), "qmv_fast_impl", 2),
    (product(2, 288, 20, 8, 32, mx.bfloat16), "qmv_impl", 1),
]


@pytest.mark.parametrize("once", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bits_of_mlx(tmp_path: Path, once: bool) -> None:
    """With a compiler that joins no product with a sum, and with one that does."""
    if once and not any(line.startswith("flags") and " fma " in line for line in cpuinfo()):
        pytest.skip("this processor joins none")
    mine = [case.exact(Order(packs, once)) for case, _, packs in CASES]
    others = [case.exact(Order(3 - packs, once)) for case, _, packs in CASES]
    rows = [(i, row) for i, (case, _, _) in enumerate(CASES) for row in range(case.x.shape[0])]
    theirs = [single(*CASES[i][:2], row) for i, row in rows]
    instances = [Instance.of(launch) for launch in [*mine, *others]]
    instances += [Instance.of(launch, text) for launch, text in theirs]
    emulator = Emulator(tmp_path, instances, functions(), joined=once)
    found, alone = (
        emulator.run([*mine, *others]),
        [emulator.run([launch], 1, [text])[0] for launch, text in theirs],
    )
    assert {run.error for run in [*found, *alone]} == {"ok"}
    for (i, row), run in zip(rows, alone, strict=True):
        assert same(found[i].outputs[0][row : row + 1], run.outputs[0]), CASES[i][1]
    pairs = zip(found, found[len(mine) :], strict=False)
    assert not any(same(one.outputs[0], other.outputs[0]) for one, other in pairs)
