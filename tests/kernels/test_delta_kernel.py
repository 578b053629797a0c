"""The delta rule's kernel in the emulator, against the closed form and single steps in MLX."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from emulated import MISSING, Emulator, Instance, written

from mlx_redrafter.cache.lineage import Lineage
from mlx_redrafter.kernels.delta import DELTA, delta, possible
from mlx_redrafter.kernels.source import Launch
from mlx_redrafter.models import forms

pytestmark = pytest.mark.skipif(MISSING, reason="needs Linux and g++")


def tree(nodes: int, rng: np.random.Generator) -> mx.array:
    """(N, N): a random one, parents before children."""
    ancestors = np.eye(nodes, dtype=bool)
    for i in range(1, nodes):
        ancestors[i] |= ancestors[rng.integers(max(0, i - 3), i)]
    return mx.array(ancestors)


def inputs(nodes: int, size: int, width: int = 32, groups: int = 1, seed: int = 0) -> list:
    """qk, v, gates, beta, ancestors, state; keys of unit length, as they are normed."""
    rng = np.random.default_rng([seed, nodes, size])
    heads = 2 * groups
    qk = rng.standard_normal((groups, 2, nodes, size))
    qk /= np.linalg.norm(qk, axis=-1, keepdims=True)
    v, state = (
        rng.standard_normal((nodes, heads, width)),
        rng.standard_normal((1, heads, width, size)),
    )
    gates, beta = -rng.exponential(0.5, (nodes, heads)), rng.uniform(0, 1, (nodes, heads))
    return [
        mx.array(qk, mx.float32), mx.array(v, mx.float32).astype(mx.float16),
        mx.array(gates, mx.float32), mx.array(beta, mx.float32).astype(mx.float16),
        tree(nodes, rng), mx.array(state, mx.float32),
    ]  # fmt: skip


CASES = [inputs(1, 64), inputs(5, 128, width=64), inputs(12, 64, groups=2), inputs(32, 32, seed=3)]


def right(qk: mx.array, v: mx.array, gates: mx.array, beta: mx.array, ancestors: mx.array,
          state: mx.array) -> list[np.ndarray]:  # fmt: skip
    """What MLX makes of it: outputs, total, delta."""
    out, (total, _, added) = forms.delta_rule(qk, v, gates, beta, state, Lineage(ancestors))
    return [np.array(x.astype(mx.float32)) for x in (out, total, added)]


def changed(name: str) -> str:
    old, new = CHANGES[name][:2]
    assert old in DELTA.text
    return DELTA.text.replace(old, new, 1)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
CHANGES = {
    "no first barrier": (BARRIER, "", "never written|without a barrier"),
    "no second barrier": (f"}}\n{BARRIER}\n\nfloat kept", "}\nfloat kept", "never written|without"),
    "siblings count": ("ancestors[lane * N + j]", "j <= lane", "values"),
    "others than ancestors": ("if (ancestors[pair])", "if (j <= i)", "values"),
    "one node too many": (
        "for (int i = 0; i < N; i++)",
        "for (int i = 0; i <= N; i++)",
        "never|end",
    ),
    "total by every group": ("if (first == 0) {", "if (true) {", "writes twice"),
    "a head that is another's": ("head / (H / qk_shape[0])", "head", "past the end|values"),
    "a lane too many writes": ("if (lane < N) {", "if (lane <= N) {", "past the end"),
}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    instances = [Instance.of(delta(*case)) for case in CASES]
    instances += [Instance.of(delta(*CASES[1]), changed(name)) for name in CHANGES]
    return Emulator(tmp_path_factory.mktemp("delta"), instances)


def judged(emulator: Emulator, case: list, text: str | None = None, orders: int = 2) -> str:
    error, outputs = emulator.run([delta(*case)], orders, [text])[0]
    if error != "ok":
        return error
    pairs = zip(outputs, right(*case), strict=True)
    near = all(np.allclose(one, other, rtol=1e-5, atol=2e-5) for one, other in pairs)
    return "ok" if near else "values"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1].shape[0]} nodes")
def test_values(emulator: Emulator, case: list) -> None:
    assert judged(emulator, case) == "ok"


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_kernel_is_caught(emulator: Emulator, name: str) -> None:
    assert re.search(CHANGES[name][2], judged(emulator, CASES[1], changed(name)))


def test_what_mlx_writes_around_it(tmp_path: Path) -> None:
    text = written(delta(*CASES[2]), tmp_path)
    shapes = re.findall(r"constant int\* (\w+)_shape", text)
    assert shapes == ["qk", "v"] and "template <int SIZE>" in text


def test_possible_states() -> None:
    assert possible(128, 128) and possible(256, 128) and possible(64, 32)
    assert not possible(48, 128) and not possible(128, 48)


@pytest.mark.slow
def test_every_number_of_nodes(tmp_path: Path) -> None:
    cases = [inputs(n, size, seed=n) for n in range(1, 18) for size in (32, 96, 128)]
    launches: list[Launch] = [delta(*case) for case in cases]
    emulator = Emulator(tmp_path, [Instance.of(launch) for launch in launches])
    for case in cases:
        assert judged(emulator, case, orders=20) == "ok", case[0].shape
