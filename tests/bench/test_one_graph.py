"""One trace per bucket and one synchronisation per step, whatever a layer remembers."""

from __future__ import annotations

from typing import Any

import pytest
from adapter_cases import TYPES, module_of, native_of
from conftest import RANKS, SHAPES, Oracle, engine_of, plainly, prompt_of

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)
from mlx_redrafter.bench.counts import host
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.models import AdaptedModel

DENSE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = {
    **DENSE, "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 32, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "rope_theta": 1e4,
}  # fmt: skip
HYBRID = {**TYPES["qwen3_5"], "num_hidden_layers": 2, "full_attention_interval": 2}


def engine(kind: str) -> tuple[Engine, list[int]]:
    raw = {"dense": DENSE, "experts": EXPERTS}.get(kind, HYBRID)
    module = module_of(raw, lively=True)
    target: Any = AdaptedModel(module, raw) if kind == "adapted" else native_of(module, raw)
    prompt = prompt_of(20)
    return engine_of(target, Oracle(target, [prompt + plainly(target, prompt, 32)], RANKS)), prompt


# The first to compile a recurrence over a tree waits for a C++ compiler half a minute.
RECURRENT = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("hybrid", "adapted")]


@pytest.mark.parametrize("kind", ["dense", "experts", *RECURRENT])
def test_one_graph_and_one_wait_a_step(kind: str) -> None:
    """Over trees of one shape that differ from step to step."""
    found = host.run(*engine(kind), SHAPES["beam-3x4-8"])
    assert (found.traces, found.syncs_per_step) == (1, 1)


def test_a_wait_within_a_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, prompt = engine("dense")
    launch = mine.step_function

    def waiting(spec: Any) -> Any:
        step = launch(spec)
        return lambda state, arrays: (state.position.item(), step(state, arrays))[1]

    monkeypatch.setattr(mine, "step_function", waiting)
    assert host.run(mine, prompt, SHAPES["beam-3x4-8"]).syncs_per_step > 1
