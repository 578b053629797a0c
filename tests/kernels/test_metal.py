"""The kernels on a real GPU: that Apple's compiler takes them, and what they give. Needs a Mac."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest
from emulated import CPP, NAMES, defined
from kernel_cases import Product, product

from mlx_redrafter.kernels import probe, products, source
from mlx_redrafter.kernels.products import Order, Shape
from mlx_redrafter.kernels.source import Launch

ORDERS = [Order(packs, once) for packs in (1, 2) for once in (True, False)]
PREAMBLE = "#include <metal_stdlib>\nusing namespace metal;\ntypedef bfloat bfloat16_t;\n"
WORDS = {"thread_index_in_simdgroup": "uint", "simdgroup_index_in_threadgroup": "uint",
         "threadgroup_position_in_grid": "uint3"}  # fmt: skip

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


def program(launch: Launch) -> str:
    """A whole .metal file, as MLX writes it around a kernel's text."""
    arguments = [
        f"const device {CPP[NAMES[x.dtype]]}* {name}, const constant int* {name}_shape"
        for name, x in zip(launch.kernel.inputs, launch.inputs, strict=True)
    ]
    pairs = zip(launch.kernel.outputs, launch.dtypes, strict=True)
    arguments += [f"device {CPP[NAMES[dtype]]}* {name}" for name, dtype in pairs]
    arguments += [f"{kind} {name} [[{name}]]" for name, kind in WORDS.items()]
    constants = "\n".join(defined(*one) for one in launch.constants.items())
    head = f"[[kernel]] void {launch.kernel.name}({', '.join(arguments)})"
    return f"{PREAMBLE}{source.header()}\n{head} {{\n{constants}\n{launch.kernel.text}}}\n"


@metal
@pytest.mark.skipif(shutil.which("xcrun") is None, reason="needs Apple's compiler")
def test_the_compiler_takes_them(tmp_path: Path) -> None:
    if subprocess.run(["xcrun", "-f", "metal"], capture_output=True, check=False).returncode:
        pytest.skip("this Xcode comes without its Metal toolchain")
    for i, case in enumerate(cases()):
        for launch in (
            products.fast(case.x, case.weights, case.bits),
            products.exact(case.x, case.weights, case.bits, ORDERS[i % 4]),
        ):
            file = tmp_path / f"{launch.kernel.name}-{i}.metal"
            file.write_text(program(launch))
            command = ["xcrun", "-sdk", "macosx", "metal", "-std=metal3.1", "-Wall", "-c"]
            made = subprocess.run(
                [*command, str(file), "-o", str(file.with_suffix(".air"))],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert made.returncode == 0, made.stderr[:3000]
