"""Which of a model's products go to the kernels of mlx_redrafter.kernels, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from emulated import MISSING, Emulator, Instance, to_array
from mlx.utils import tree_flatten

from mlx_redrafter.budget.machine import Budget
from mlx_redrafter.errors import OptionError
from mlx_redrafter.kernels import products, verdicts
from mlx_redrafter.kernels.products import Order, Shape
from mlx_redrafter.kernels.source import Launch
from mlx_redrafter.kernels.verdicts import Verdict
from mlx_redrafter.models import small_rows
from mlx_redrafter.tree.shape import BEAMS, TEXT, TreeShape

GAINS = {5: 1.3, 6: 1.3, 8: 1.4, 9: 1.0, 12: 1.3, 16: 1.3}
GOOD = Verdict(GAINS, Order(2, True), single=True)
SILENT: Callable[[str], None] = lambda text: None  # noqa: E731


class Layers(nn.Module):
    """A dense layer, one in 4 bits with biases, one in 6, and an embedding that is a head too."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(64, 64, bias=False)
        self.four = nn.QuantizedLinear(64, 96, True, 32, 4)
        self.six = nn.QuantizedLinear(64, 96, False, 32, 6)
        self.tokens = nn.QuantizedEmbedding(40, 64, 64, 8)
        self.set_dtype(mx.float16)
        self.four.bias = mx.arange(96).astype(mx.float16)
        mx.eval(self.parameters())


class FakeGpu:
    """What MLX does on a CPU, and what was launched."""

    def __init__(self) -> None:
        self.verdict, self.launches = GOOD, list[Launch]()

    def run(self, launch: Launch) -> list[mx.array]:
        self.launches.append(launch)
        x, w, scales, biases = launch.inputs
        bits = launch.constants["BITS"]
        group = w.shape[1] * 32 // bits // scales.shape[1]
        return [mx.quantized_matmul(x, w, scales, biases, True, group, bits)]

    def verdicts(self, shapes: list[Shape], say: Callable[[str], None]) -> dict[Shape, Verdict]:
        return {shape: self.verdict for shape in shapes if products.possible(shape)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.delenv("MLX_REDRAFTER_KERNEL", raising=False)
    monkeypatch.setenv("MLX_SDPA_BLOCKS", "")
    monkeypatch.setattr(verdicts, "metal", lambda: True)
    monkeypatch.setattr(verdicts, "verdicts", fake.verdicts)
    monkeypatch.setattr(Launch, "run", lambda launch: fake.run(launch))
    return fake


def rows_taken(layer: nn.Module, gpu: FakeGpu, most: int = 20) -> list[int]:
    """With how many rows it launches a kernel; what it gives is always the same."""
    embedding = isinstance(layer, nn.QuantizedEmbedding)
    call = layer.as_linear if embedding else layer
    usual = nn.QuantizedEmbedding.as_linear if embedding else nn.QuantizedLinear.__call__
    taken = []
    for rows in range(1, most):
        x, before = mx.random.normal((rows, 64)).astype(mx.float16), len(gpu.launches)
        out = call(x)
        assert mx.array_equal(out, usual(layer, x))
        taken += [rows] * (len(gpu.launches) > before)
    return taken


def test_fast_takes_the_rows_that_gain(gpu: FakeGpu) -> None:
    model = Layers()
    names = [name for name, _ in tree_flatten(model.parameters())]
    changed = small_rows.switch_on(model, SILENT)
    assert [name for name, _ in tree_flatten(model.parameters())] == names
    assert {id(layer) for layer in changed} == {id(model.four), id(model.tokens)}
    for layer in (model.four, model.tokens):
        assert isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
        assert rows_taken(layer, gpu) == [5, 6, 7, 8, 12, 13, 14, 15, 16]
    assert rows_taken(model.six, gpu) == []
    assert {launch.kernel.name for launch in gpu.launches} == {"fast"}
    assert model.four(mx.zeros((1, 5, 64), mx.float16)).shape == (1, 5, 96)
    before = len(gpu.launches)
    model.four(mx.zeros((5, 64)))
    assert len(gpu.launches) == before, "another type goes MLX's way"
    assert len(small_rows.described(model)) == 2


@pytest.mark.parametrize("single", [True, False])
def test_exact_takes_single_rows_where_their_bits_are_others(gpu: FakeGpu, single: bool) -> None:
    gpu.verdict = GOOD._replace(single=single)
    model, said = Layers(), []
    small_rows.switch_on(model, said.append, "exact")
    assert rows_taken(model.four, gpu, 10) == [*range(2 - (not single), 10)]
    assert model.four.way.takes(64) and not model.four.way.takes(65)
    assert {launch.constants["ROWS"] for launch in gpu.launches} >= {2, 4, 8}
    assert said == ["2 layers have no exact kernel: where two tokens are near, drafts may decide"]


@pytest.mark.parametrize(("choice", "exactly"), [("exact", True), ("fast", False)])
def test_exact_drafts_chains(gpu: FakeGpu, choice: str, exactly: bool) -> None:
    """Nodes of a tree lie in other slots than plain steps: attention would add in another order."""
    model = Layers()
    small_rows.switch_on(model, SILENT, choice)
    assert small_rows.exactly(model) == exactly and not small_rows.exactly(object())
    for part in (BEAMS, TEXT):
        engine: Any = SimpleNamespace(drafters=[SimpleNamespace(part=part)])
        target: Any = model
        shapes = Budget(engine, target, Path()).shapes
        assert shapes[0] == TreeShape.plain()
        assert max(shape.nodes for shape in shapes) == (8 if exactly or part == TEXT else 16)
        assert max(shape.lookup for shape in shapes) == 7
        chains = all(shape.one_path for shape in shapes)
        assert chains == (exactly or part == TEXT)
        deepest = 0 if part == TEXT else 4 if exactly else 5
        assert max(shape.depth for shape in shapes) == deepest


def test_off_and_a_cpu_change_nothing(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    assert small_rows.switch_on(model, SILENT, "off") == []
    monkeypatch.setenv("MLX_REDRAFTER_KERNEL", "off")
    assert small_rows.switch_on(model, SILENT) == []
    monkeypatch.setenv("MLX_REDRAFTER_KERNEL", "on")
    with pytest.raises(OptionError, match="MLX_REDRAFTER_KERNEL=on is not possible: set it to off"):
        small_rows.switch_on(model, SILENT)
    monkeypatch.setattr(verdicts, "metal", lambda: False)
    assert small_rows.switch_on(model, SILENT, "exact") == []
    assert type(model.four) is nn.QuantizedLinear and small_rows.described(model) == []


def test_what_is_refused_goes_mlx_way(gpu: FakeGpu) -> None:
    gpu.verdict = Verdict(error="it ended with -9")
    assert small_rows.switch_on(Layers(), SILENT) == []
    gpu.verdict = GOOD._replace(gains=dict.fromkeys(GAINS, 1.09))
    assert small_rows.switch_on(Layers(), SILENT) == []


@pytest.mark.skipif(MISSING, reason="needs Linux and g++")
def test_a_layer_on_the_emulator(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The whole way: a layer's launch, its program, its outputs."""

    def emulated(launch: Launch) -> list[mx.array]:
        mx.eval(launch.inputs)
        emulator = Emulator(tmp_path, [Instance.of(launch)])
        error, outputs = emulator.run([launch])[0]
        assert error == "ok"
        return [to_array(outputs[0], launch.dtypes[0])]

    model = Layers()
    x = mx.random.normal((3, 2, 64)).astype(mx.float16)
    right = model.four(x)
    small_rows.switch_on(model, SILENT)
    monkeypatch.setattr(Launch, "run", emulated)
    found = model.four(x)
    assert found.shape == right.shape and mx.allclose(found, right, rtol=2e-3, atol=2e-3)
