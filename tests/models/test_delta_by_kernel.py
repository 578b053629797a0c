"""Which recurrent layers take the kernel of the delta rule, and that it changes nothing there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from adapter_cases import module_of, native_of
from conftest import RANKS, SHAPES, Oracle, engine_of, plainly, prompt_of, run
from delta_cases import DELTA_CASES
from emulated import MISSING, Emulator, Instance, to_array

from mlx_redrafter.cache.lineage import Lineage
from mlx_redrafter.kernels import verdicts
from mlx_redrafter.kernels.source import Launch
from mlx_redrafter.kernels.verdicts import Verdict
from mlx_redrafter.models import Decoder, delta_kernel, small_rows
from mlx_redrafter.models.delta import DeltaNet
from mlx_redrafter.models.delta_kernel import Heads, rule
from mlx_redrafter.models.forms import delta_rule

GOOD = Verdict({1: 1.2, 4: 2.0, 8: 2.0, 16: 1.5})
NAME = "delta-2-4-32-32"


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


class Gpu:
    """The closed form in MLX's operations, and how many nodes it was asked for."""

    def __init__(self) -> None:
        self.nodes: list[int] = []

    def run(self, launch: Launch) -> list[mx.array]:
        qk, v, gates, beta, ancestors, state = launch.inputs
        self.nodes.append(v.shape[0])
        out, (total, _, added) = delta_rule(qk, v, gates, beta, state, Lineage(ancestors))
        return [out, total, added]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    fake = Gpu()
    monkeypatch.setattr(verdicts, "metal", lambda: True)
    monkeypatch.setattr(Launch, "run", lambda launch: fake.run(launch))
    return fake


def hybrid(closed: bool = True) -> Decoder:
    text: dict[str, Any] = dict(DELTA_CASES["qwen3_5"]["text_config"])
    text |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    raw = {**DELTA_CASES["qwen3_5"], "text_config": text}
    return native_of(module_of(raw, lively=True), raw, closed)


def switched(model: Decoder, monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> list[str]:
    """Names that were asked about."""
    asked: list[str] = []

    def found(names: list[str], *_: Any) -> dict[str, Verdict]:
        asked.extend(names)
        return dict.fromkeys(names, verdict)

    monkeypatch.setattr(verdicts, "found", found)
    small_rows.switch_on(model, lambda _: None, "fast")
    return asked


def test_a_hybrid_model_decodes_by_it(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = hybrid(), prompt_of(20)
    answer = plainly(model, prompt, 16)
    assert switched(model, monkeypatch, GOOD) and gpu.nodes == []
    assert small_rows.described(model) == ["delta"]
    assert plainly(model, prompt, 16) == answer and set(gpu.nodes) == {1}
    engine = engine_of(model, Oracle(model, [prompt + answer], RANKS), compiled=False)
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 16) == answer
    assert set(gpu.nodes) == {1, 8}, "all numbers of nodes, or none"


@pytest.mark.parametrize("verdict", [Verdict(), GOOD._replace(gains={**GOOD.gains, 1: 1.05})])
def test_where_it_does_not_pay_nothing_changes(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    model = hybrid()
    assert set(switched(model, monkeypatch, verdict)) == {NAME}
    assert all(layer.rule is None for layer in model.modules() if isinstance(layer, DeltaNet))
    assert switched(hybrid(closed=False), monkeypatch, GOOD) == [], "by steps there is none"


def test_the_probe(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_kernel, "_LAYERS", 2)
    monkeypatch.setattr(delta_kernel, "NODES", (1, 4))
    assert delta_kernel.named(Heads(2, 4, 32, 32)) == NAME
    found = delta_kernel.examined(NAME)
    assert list(found.gains) == [1, 4] and not found.error
    right = gpu.run
    gpu.run = lambda launch: [y * 1.001 for y in right(launch)]  # type: ignore[method-assign]
    assert delta_kernel.examined(NAME) == Verdict()


@pytest.mark.skipif(MISSING, reason="needs Linux and g++")
def test_by_the_kernel_s_own_text(gpu: Gpu, tmp_path: Path) -> None:
    """Outputs and tape of a tree, from the launch to the arrays."""

    def emulated(launch: Launch) -> list[mx.array]:
        mx.eval(launch.inputs)
        error, outputs = Emulator(tmp_path, [Instance.of(launch)]).run([launch])[0]
        assert error == "ok"
        return [to_array(*one) for one in zip(outputs, launch.dtypes, strict=True)]

    rows, lineage = delta_kernel.rows_of(Heads(2, 4, 64, 32), 6)
    right = delta_rule(*rows, lineage)
    gpu.run = emulated  # type: ignore[method-assign]
    out, tape = rule(*rows, lineage)
    for one, other in zip([out, *tape], [right[0], *right[1]], strict=True):
        assert np.allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-5)
