"""What is done otherwise for a GPU, run on a CPU: the same texts, and memory given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import PENALTIES, RANKS, SHAPES, Oracle, asked, engine_of, prompt_of, run
from tiny_models import CASES, build

from mlx_redrafter.cache.halves import Halved
from mlx_redrafter.cache.layer import Pass
from mlx_redrafter.cache.slabs import Slab, capacity_for
from mlx_redrafter.decoding import answering, engine
from mlx_redrafter.decoding.batch import Batch, Row
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import Decoder, attention, load_model
from mlx_redrafter.runtime import metal
from mlx_redrafter.runtime.device import fused_kernels
from mlx_redrafter.stats import DraftStats

FILTERED = SamplingParams(temp=0.9, top_p=0.9, top_k=30, min_p=0.02, seed=5)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice between CPU and GPU is the GPU's; MLX itself computes where it did."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert fused_kernels()


@pytest.mark.bits
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("params", [SamplingParams(), FILTERED, PENALTIES], ids=str)
def test_drafted_text_is_plain_text(target: Decoder, params: SamplingParams) -> None:
    prompt = prompt_of(30)
    plain = run(engine_of(target, None, compiled=False), prompt, params, None, 24)
    drafter = Oracle(target, [[*prompt, *plain]], RANKS)
    for name in ("chain", "beam-and-lookup"):
        one, stats = engine_of(target, drafter, compiled=False), DraftStats()
        assert run(one, prompt, params, SHAPES[name], 24, stats=stats) == plain
        assert stats.steps < 24, "something was accepted"


QUICK = ("gemma3", "gpt_oss", "glm4_moe_lite", "gemma4_text")
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in QUICK]


@pytest.mark.bits
@pytest.mark.parametrize("case", [*QUICK, *SLOW])
def test_every_kind_of_layer_goes_the_way_of_a_gpu(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, sinks, experts, latent vectors, ...: by MLX's functions, as if its kernels took the
    tiny heads; the text is that of the way of a CPU."""
    build(tmp_path, case)
    prompt, cpu = prompt_of(30), load_model(tmp_path)
    expected = run(engine_of(cpu, None, compiled=False), prompt, FILTERED, None, 10)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for sizes in ("_VECTOR_SIZES", "_FULL_SIZES"):
        monkeypatch.setattr(metal, sizes, tuple(range(1, 257)))
    model = load_model(tmp_path)
    assert run(engine_of(model, None, compiled=False), prompt, FILTERED, None, 10) == expected
    drafting = engine_of(model, Oracle(model, [[*prompt, *expected]], RANKS), compiled=False)
    assert run(drafting, prompt, FILTERED, SHAPES["beam-and-lookup"], 10) == expected


@pytest.mark.bits
@pytest.mark.usefixtures("as_on_a_gpu")
def test_answers_in_a_stack_have_dense_halves(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys of all sequences lie one behind the other, or MLX's kernel would copy them."""
    asked_for: list[tuple[int, ...]] = []
    attend = attention._attend_fused

    def noted(q: mx.array, slab: Any, *rest: Any) -> mx.array:
        asked_for.append((isinstance(slab, Halved), slab.shape[0]))
        return attend(q, slab, *rest)

    monkeypatch.setattr(metal, "attention_calls", lambda n, *_: [n])
    monkeypatch.setattr(attention, "_attend_fused", noted)
    one = engine_of(target, None, compiled=False)
    prompts = [prompt_of(5 + 4 * i, seed=i) for i in range(3)]
    alone = [run(one, prompt, FILTERED, None, 12) for prompt in prompts]
    assert {halved for halved, _ in asked_for} == {False}
    batch, found = Batch(one), dict[Row, list[int]]()
    for prompt in prompts:
        found[batch.add(asked(prompt, FILTERED, SHAPES["lookup"], 12))] = []
    while batch.rows or batch.waiting:
        for row, emitted in batch.step():
            found[row] += emitted.tokens
    assert list(found.values()) == alone
    assert (True, 4) in asked_for and not any(rows > 1 for halved, rows in asked_for if not halved)


@pytest.mark.parametrize("gpu", [False, True])
def test_memory_is_given_back_when_slabs_grew(
    gpu: bool, target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once behind the prompt, and once for every growth when its step is done; on a GPU alone."""
    if gpu:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    room, given = capacity_for(1), []
    monkeypatch.setattr(mx, "clear_cache", lambda: given.append(1))
    one = engine_of(target, None, compiled=False)
    answer = run(one, prompt_of(room - 8), None, None, 20)
    assert len(answer) == 20
    assert len(given) == (2 if gpu else 0)
    assert engine.release is answering.release


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("n", [1, 8, 65])
def test_rows_go_to_the_same_slots(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one launch, or (a prompt's) by a slice."""
    kind, rows = Slab(4, 8), mx.random.normal((1, 4, n, 8))

    def written() -> np.ndarray:
        slab = kind.empty(128, mx.float32)
        return np.array(Pass([slab], mx.array([5], mx.int32)).extend(0, kind, rows))

    found = written()
    monkeypatch.undo()
    assert np.array_equal(found, written())
    assert np.array_equal(found[:, :, 5 : 5 + n], np.array(rows)) and not found[:, :, :5].any()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_capacities_of_a_gpu_are_fewer() -> None:
    sizes = sorted({capacity_for(n) for n in range(1, 20_000)})
    assert sizes[:4] == [512, 1024, 1536, 2048] and {4096, 4608, 8192, 9216} <= {*sizes}
