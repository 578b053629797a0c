"""The kernels on a real GPU: that Apple's compiler takes them, and what they give. Needs a Mac."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest
from emulated import written
from kernel_cases import Product, product

from mlx_redrafter.kernels import probe, products, source
from mlx_redrafter.kernels.delta import delta
from mlx_redrafter.kernels.products import Order, Shape
from mlx_redrafter.kernels.source import Launch
from mlx_redrafter.models import delta_kernel

ORDERS = [Order(packs, once) for packs in (1, 2) for once in (True, False)]
PREAMBLE = """#include <metal_stdlib>
using namespace metal;
typedef half float16_t;
typedef bfloat bfloat16_t;
"""

metal = pytest.mark.metal
on_gpu = pytest.mark.skipif(not mx.metal.is_available(), reason="needs Metal")


def cases() -> list[Product]:
    return [
        product(rows, 320, 72, width, 64, dtype)
        for rows in (1, 2, 5, 8, 13, 16)
        for width in (4, 8)
        for dtype in (mx.float16, mx.bfloat16)
    ]


@metal
@on_gpu
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["half", "bfloat"])
def test_values(dtype: mx.Dtype, width: int) -> None:
    for case in cases():
        if (case.bits, case.x.dtype) != (width, dtype):
            continue
        right = mx.quantized_matmul(case.x, *case.weights, True, case.group, width)
        assert probe.near(products.fast(case.x, case.weights, width).run()[0], right)
        for order in ORDERS:
            alone = [
                products.exact(case.x[i : i + 1], case.weights, width, order).run()[0]
                for i in range(case.x.shape[0])
            ]
            found = products.exact(case.x, case.weights, width, order).run()[0]
            assert probe.near(found, right) and probe.same(found, mx.concatenate(alone))


@metal
@on_gpu
def test_the_probe() -> None:
    """What it says of MLX's own order of sums is shown by pytest -s, and not asserted."""
    for shape in (Shape(512, 1024, 4, 64, mx.float16), Shape(512, 1024, 8, 64, mx.bfloat16)):
        found = probe.examined(shape)
        print(shape, found.text())
        assert found.error == "" and found.order is not None and found.gains


@pytest.mark.parametrize("exactly", [False, True])
def test_what_mlx_writes_around_a_text(exactly: bool, tmp_path: Path) -> None:
    """Just what the emulator has: the shapes of three inputs, and where a thread is."""
    case = product(5, 320, 72, 8, 64, mx.bfloat16)
    order = Order(1, True)
    made = products.exact(case.x, case.weights, 8, order) if exactly else case.fast()
    text = written(made, tmp_path)
    begin = text.rindex("template <", 0, text.index("[[kernel]]"))
    head = text[begin : text.index(") {\n" + made.kernel.text)]
    constants = "int BITS, int ROWS, int PACKS, bool ONCE" if exactly else "int BITS, int TILES"
    assert head.startswith(f"template <typename T, {constants}>\n[[kernel]] void")
    words = re.findall(r"(\w+)[*&]? (\w+) \[\[", head)
    assert [name for _, name in words] == [
        "x", "x_shape", "w", "w_shape", "scales", "scales_shape", "biases", "y",
        "simdgroup_index_in_threadgroup", "thread_index_in_simdgroup",
        "threadgroup_position_in_grid",
    ]  # fmt: skip
    values = "<bfloat16_t, 8, 8, 1, 1>" if exactly else "<bfloat16_t, 8, 1>"
    assert values in text


@metal
@on_gpu
def test_the_delta_rule() -> None:
    found = delta_kernel.examined("delta-2-4-128-64")
    print(found.text())
    assert found.error == "" and found.gains


def launches() -> list[Launch]:
    """Of every kernel and kind of it."""
    found = []
    for i, case in enumerate(cases()):
        found.append(products.fast(case.x, case.weights, case.bits))
        found.append(products.exact(case.x, case.weights, case.bits, ORDERS[i % 4]))
    for size in (64, 128):
        rows, lineage = delta_kernel.rows_of(delta_kernel.Heads(2, 4, size, 64), 8)
        qk, v, gates, beta, state = rows
        found.append(delta(qk, v, gates, beta, lineage.ancestors, state))
    return found


@metal
@pytest.mark.skipif(shutil.which("xcrun") is None, reason="needs Apple's compiler")
def test_the_compiler_takes_them(tmp_path: Path) -> None:
    if subprocess.run(["xcrun", "-f", "metal"], capture_output=True, check=False).returncode:
        pytest.skip("this Xcode comes without its Metal toolchain")
    for i, launch in enumerate(launches()):
        file = tmp_path / f"{launch.kernel.name}-{i}.metal"
        file.write_text(PREAMBLE + written(launch, tmp_path))
        command = ["xcrun", "-sdk", "macosx", "metal", "-std=metal3.1", "-fno-fast-math", "-c"]
        made = subprocess.run(
            [*command, str(file), "-o", str(file.with_suffix(".air"))],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr[:3000]


def test_there_are_launches_of_every_text(tmp_path: Path) -> None:
    every = {file.stem for file in source.FOLDER.glob("*.metal")}
    listed = launches()
    assert {launch.kernel.name for launch in listed} == every
    assert "[[kernel]]" in written(listed[-1], tmp_path)
