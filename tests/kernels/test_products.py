"""The kernels' own text in the emulator: values, bits, and that what is wrong is caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from emulated import MISSING, Emulator, Instance, values
from kernel_cases import Product, product, same, whole

from mlx_redrafter.kernels import products
from mlx_redrafter.kernels.products import Order
from mlx_redrafter.kernels.source import Kernel, Launch

pytestmark = pytest.mark.skipif(MISSING, reason="needs Linux and g++")
ORDER = Order(2, True)
ROUND = Kernel("round", ("x",), ("y",))
ROUND_TEXT = """
const int i = int(threadgroup_position_in_grid.x) * 32 + int(thread_index_in_simdgroup);
y[i] = T(x[i]);
"""
SAMPLE = [
    product(5, 288, 40, 4, 32, mx.float16),
    product(8, 640, 31, 4, 64, mx.bfloat16),
    product(13, 384, 48, 8, 128, mx.float16),
    product(17, 288, 33, 8, 32, mx.bfloat16),
]


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        return text.replace(old, new)

    return change


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
UNSYNCED = "without a barrier|never written|not all threads"  # what comes first, by the order
FAST: dict[str, tuple[Callable[[str], str], str]] = {
    "no barrier": (replaced(BARRIER, ""), UNSYNCED),
    "a barrier for some": (replaced(BARRIER, f"if (part > 0) {BARRIER}"), UNSYNCED),
    "a barrier for lanes": (replaced(BARRIER, f"simdgroup_{BARRIER[12:]}"), UNSYNCED),
    "a row of x too many": (replaced("x + min(m + 1, M - 1)", "x + min(m + 1, M)"), "reads past"),
    "a row of w too many": (replaced("8 * t + r, N - 1)", "8 * t + r, N)"), "reads past the end"),
    "K one lane longer": (replaced("load4(w +", "load4(w + 4 +"), "reads past the end"),
    "from no multiple of four": (replaced("r % 2 * 4;", "r % 2 * 4 + 2;"), "no multiple of four"),
    "a row of y too many": (replaced("if (m0 + row < M &&", "if ("), "writes past the end"),
    "columns left out": (replaced("< N) {", "< N - 1) {"), "never written"),
    "half of a matrix kept": (replaced("held[at + 1] = sums[t][u].y;", ""), "was never written"),
    "memory for more parts": (replaced("PARTS * COLUMNS * TILES * 64)", "12000)"), "too many"),
    "sums begin with anything": (replaced("sums[t][u] = float2(0.0f, 0.0f);", ""), "values"),
    "a word too many": (
        replaced("packed[t][i] >> (4 * s + 16)", "packed[t][i + 1] >> (4 * s)"),
        "the program ended",
    ),
    "two rows swapped": (replaced("y[(m0 + row) * N", "y[(m0 + M - 1 - row) * N"), "values"),
    "a chunk left out": (replaced("k0 = part * CHUNK", "k0 = (part + 1) * CHUNK"), "values"),
}
EXACT: dict[str, tuple[Callable[[str], str], str]] = {
    "a second row in another order": (
        replaced("sums[m][t] += joined<ONCE>(", "sums[m][t] += m == 1 ? scale[t] * found + total * "
                 "bias[t] : joined<ONCE>("), "bits"),
    "two rows swapped": (replaced("min(m0 + m, M - 1)", "max(M - 1 - m, 0)"), "values"),
    "some lanes leave": (
        replaced("const float sum = simd_sum", "if (lane > 7 && n0 > 0) return; const float sum = "
                 "simd_sum"), "not all threads"),
    "inputs too many": (replaced("total += four.x", "given[EACH] = 0; total += four.x"),
                        "the program ended"),
    "every lane writes": (replaced("if (lane == 0 && ", "if ("), "writes twice"),
}  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """With the texts as they are, and as the mutations make them."""
    first = SAMPLE[0]
    instances = [Instance.of(one.fast()) for one in SAMPLE]
    instances += [Instance.of(one.exact(ORDER, row)) for one in SAMPLE for row in (None, 0)]
    fast, exact = products.FAST.text, products.EXACT.text
    instances += [Instance.of(first.fast(), change(fast)) for change, _ in FAST.values()]
    instances += [Instance.of(first.exact(ORDER), change(exact)) for change, _ in EXACT.values()]
    instances += [Instance.of(rounded(dtype), ROUND_TEXT) for dtype in (mx.float16, mx.bfloat16)]
    return Emulator(tmp_path_factory.mktemp("emulator"), instances)


@pytest.mark.parametrize("case", SAMPLE, ids=lambda c: f"{c.x.shape[0]}-{c.bits}-{c.group}")
def test_values_and_rows(emulator: Emulator, case: Product) -> None:
    check(emulator, [case], [ORDER], orders=2)


def check(emulator: Emulator, cases: list[Product], orders_of: list[Order], orders: int) -> None:
    """Right values whatever the order of lanes, and every row of `exact` as it is alone; the
    first order of sums in all orders of lanes, others in two."""
    fast = emulator.run([case.fast() for case in cases], orders)
    for case, (error, found) in zip(cases, fast, strict=True):
        assert error == "ok", (case.x.shape, error)
        assert case.close(found[0], case.x.dtype), case.x.shape
    for i, order in enumerate(orders_of):
        together = emulator.run([case.exact(order) for case in cases], orders if i == 0 else 2)
        alone = [case.exact(order, row) for case in cases for row in range(case.x.shape[0])]
        rows = iter(emulator.run(alone))
        for case, (error, found) in zip(cases, together, strict=True):
            assert error == "ok", (case.x.shape, order, error)
            single = np.concatenate([next(rows).outputs[0] for _ in range(case.x.shape[0])])
            assert case.close(found[0], mx.float32), (case.x.shape, order)
            assert same(found[0], single), (case.x.shape, order)


@pytest.mark.parametrize("name", FAST)
def test_a_wrong_fast_kernel_is_caught(emulator: Emulator, name: str) -> None:
    change, expected = FAST[name]
    case = SAMPLE[0]
    assert re.search(expected, judged(emulator, case, case.fast(), change(products.FAST.text)))


@pytest.mark.parametrize("name", EXACT)
def test_a_wrong_exact_kernel_is_caught(emulator: Emulator, name: str) -> None:
    change, expected = EXACT[name]
    case = SAMPLE[0]
    text = change(products.EXACT.text)
    assert re.search(expected, judged(emulator, case, case.exact(ORDER), text))


def judged(emulator: Emulator, case: Product, launch: Launch, text: str) -> str:
    """What is found wrong with a kernel of this text: "ok" if nothing is."""
    error, found = emulator.run([launch], 2, [text])[0]
    if error != "ok":
        return error
    if not case.close(found[0], launch.dtypes[0]):
        return "values"
    right = emulator.run([launch])[0].outputs[0]
    return "ok" if same(found[0], right) else "bits"


def test_too_many_threads_are_caught(emulator: Emulator) -> None:
    launch = SAMPLE[0].fast()
    many = launch._replace(grid=(1024, 1, 1), group=(512, 1, 1))
    assert "512 threads of a group" in emulator.run([many])[0].error


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["half", "bfloat"])
def test_the_emulator_rounds_as_mlx_does(emulator: Emulator, dtype: mx.Dtype) -> None:
    """Every number of 16 bits, what lies between two, and any bits of a float32."""
    launch = rounded(dtype)
    error, (found,) = emulator.run([launch], 1, [ROUND_TEXT])[0]
    assert error == "ok"
    right = launch.inputs[0].astype(dtype).astype(mx.float32)
    np.testing.assert_array_equal(values(found, dtype), np.array(right))


def rounded(dtype: mx.Dtype) -> Launch:
    """float32 -> 16 bits, of the numbers that are hard."""
    whole = mx.arange(2**16).astype(mx.uint16).view(dtype).astype(mx.float32)
    finite = np.sort(np.array(whole)[np.isfinite(np.array(whole))])
    between = (finite[1:].astype(np.float64) + finite[:-1]) / 2
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 20_000, np.uint32).view(np.float32)
    given = np.concatenate([np.array(whole), between.astype(np.float32), anything])
    x = mx.array(given[: given.size // 32 * 32])
    size = (x.size,)
    grid = (x.size, 1, 1)
    return Launch(ROUND, [x], {"T": dtype}, grid, (32, 1, 1), [size], [dtype])


@pytest.mark.slow
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["half", "bfloat"])
def test_all_of_them(dtype: mx.Dtype, width: int, tmp_path: Path) -> None:
    cases = [case for case in whole() if case.bits == width and case.x.dtype == dtype]
    every = [Order(packs, once) for packs in (1, 2) for once in (True, False)]
    launches = [case.fast() for case in cases]
    launches += [case.exact(order, row) for case in cases for order in every for row in (None, 0)]
    emulator = Emulator(tmp_path, [Instance.of(launch) for launch in launches])
    check(emulator, cases, every, orders=20)
