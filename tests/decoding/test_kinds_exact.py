"""Drafted text equals plain text on models with experts, sinks, shared keys, latent vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RANKS, SHAPES, Oracle, engine_of, plainly, prompt_of, run
from tiny_models import CASES, V, build

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.stats import DraftStats

KINDS = ("qwen3_moe", "gpt_oss", "gemma4_text", "glm4_moe_lite", "ministral3", "muse_glimmer")
TOKENS = 24


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    assert request.param in CASES
    build(tmp_path, request.param)
    return load_model(tmp_path)


def test_drafted_text_is_plain_text(target: Decoder) -> None:
    """Greedy and sampled, trees of 4 and 8 nodes, a session that is cut and grown again."""
    prompt, sampled = prompt_of(21, vocab=V), SamplingParams(temp=0.9, top_k=20, seed=5)
    for params in (SamplingParams(), sampled):
        answer = plainly(target, prompt, TOKENS, params)
        oracle = Oracle(target, [prompt + answer], RANKS)
        engine, stats = engine_of(target, oracle, compiled=False), DraftStats()
        for name in ("chain", "beam-3x4-8"):
            found = run(engine, prompt, params, SHAPES[name], TOKENS, stats=stats)
            assert found == answer
        assert stats.tokens_per_step > 1.3
    session = Session()
    run(engine, prompt, params, SHAPES["chain"], TOKENS, session=session)
    other = [*prompt[:13], 3, 5, 8]  # cut within the prompt
    expected = plainly(target, other, 8, params)
    assert run(engine, other, params, SHAPES["chain"], 8, session=session) == expected
