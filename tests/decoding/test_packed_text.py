"""Drafted text equals plain text where keys and values are quantised, whatever attends to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from adapter_cases import TYPES, module_of
from conftest import RANKS, SHAPES, Oracle, engine_of, plainly, prompt_of, run, write_target
from tiny_models import V, build

from mlx_redrafter.cache.packed import PackedSlab, Packing
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import load_model
from mlx_redrafter.models.adapter import AdaptedModel
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.stats import DraftStats

TOKENS = 20
# Keys and values of its own, sinks and a window, shared ones of two sizes, a latent vector.
NATIVE: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "gpt_oss": {"head_dim": 32},
    "gemma4_text": {"head_dim": 32, "global_head_dim": 64},
    "glm4_moe_lite": {"qk_rope_head_dim": 32},
}


@pytest.fixture(autouse=True)
def uncompiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiling would take most of the time."""
    if "graph" not in request.node.name:
        mx.disable_compile()
    yield
    mx.enable_compile()


def native(folder: Path, case: str, bits: int | None) -> Any:
    build(folder, case, **NATIVE[case])
    target = load_model(folder)
    if bits is not None:
        target.pack(Packing(bits, 32))
    return target


def adapted(bits: int) -> Any:
    raw = {**TYPES["qwen3_moe"], "head_dim": 32}
    target = AdaptedModel(module_of(raw, lively=True), raw, False)
    target.pack(Packing(bits, 32))
    return target


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", [*NATIVE, "adapted"])
def test_drafted_text_is_plain_text(tmp_path: Path, case: str, bits: int) -> None:
    """Greedy and sampled, a chain and a tree, a session that is cut and grown again."""
    target = adapted(bits) if case == "adapted" else native(tmp_path, case, bits)
    assert any(isinstance(kind, PackedSlab) for kind in target.caches)
    exact(target)


def exact(target: Any) -> None:
    prompt, sampled = prompt_of(21, vocab=V), SamplingParams(temp=0.9, top_k=20, seed=5)
    for params, shape in ((SamplingParams(), "beam-3x4-8"), (sampled, "chain")):
        answer = plainly(target, prompt, TOKENS, params)
        oracle, stats = Oracle(target, [prompt + answer], RANKS), DraftStats()
        engine, session = engine_of(target, oracle, compiled=False), Session()
        found = run(engine, prompt, params, SHAPES[shape], TOKENS, session, stats)
        assert found == answer and len(set(answer)) > 4
        assert stats.tokens_per_step > 1.3
        other = [*prompt[:13], 3, 5, 8]  # cut within the prompt
        expected = plainly(target, other, 8, params)
        assert run(engine, other, params, SHAPES[shape], 8, session) == expected


@pytest.mark.slow
def test_a_step_over_quantised_rows_is_one_graph(tmp_path: Path) -> None:
    target, prompt = native(tmp_path, "llama", 8), prompt_of(21, vocab=V)
    answer = plainly(target, prompt, 120)
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS))
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 120) == answer
    assert engine.traces == 2  # 128 slots, then 256


def test_four_bits_are_another_text_than_none(tmp_path: Path) -> None:
    """Or nothing would be quantised at all."""
    texts = [plainly(native(tmp_path, "llama", b), prompt_of(21, vocab=V), 40) for b in (4, None)]
    assert texts[0] != texts[1]


def test_a_prompt_is_read_sparsely_from_unpacked_rows(tmp_path: Path) -> None:
    """With everything chosen it is dense reading."""
    target, prompt = native(tmp_path, "llama", 8), prompt_of(300, vocab=V)
    engine, session = engine_of(target, None, compiled=False), Session()
    sparse = SparsePrefill("xattention", min_context=0, tau=1.0, block=64)
    stats = DraftStats()
    found = run(engine, prompt, None, None, 12, session, stats, sparse_prefill=sparse)
    assert stats.sparse_prefill is not None and stats.sparse_prefill.chunks
    assert found == plainly(target, prompt, 12)


def test_accepted_rows_whose_scales_stay_behind_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, prompt = load_model(write_target(tmp_path, head_dim=32)), prompt_of(9)
    target.pack(Packing(8, 32))
    answer = plainly(target, prompt, 40)
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS), compiled=False)
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 40) == answer
    commit = PackedSlab.commit

    def wrong(self: PackedSlab, kept: Any, *rest: Any) -> Any:
        return commit(self, kept, *rest)[0], *kept[1:]

    monkeypatch.setattr(PackedSlab, "commit", wrong)
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 40) != answer
