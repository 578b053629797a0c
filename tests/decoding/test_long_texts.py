"""Two thousand tokens of every kind of model, drafted by trees of 4, 8 and 16 nodes in sessions
that are cut and grow again, are plain decoding's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import TYPES, module_of, native_of
from conftest import RANKS, Oracle, engine_of, run
from delta_cases import DELTA_CASES
from tiny_models import CASES, build

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import load_model
from mlx_redrafter.models.adapter import AdaptedModel
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

pytestmark = pytest.mark.slow
TURNS, TOKENS, ROOM = 10, 200, 4096
# Experts, sinks with a window, Gemma 4, latent attention and a delta rule by our own decoder; a
# delta rule with experts, Mamba 2 and a short convolution by mlx_lm's modules.
NATIVE = ("qwen3_moe", "gpt_oss", "gemma4_text", "glm4_moe_lite", "qwen3_5")
ADAPTED = ("qwen3_next", "mamba2", "lfm2")
SAMPLING = {"greedy": SamplingParams(), "sampled": SamplingParams(temp=0.9, top_k=40, seed=11)}
TREES = (TreeShape(2, 3, 4), TreeShape(3, 4, 8), TreeShape(4, 5, 16))
Turn = tuple[list[int], list[int]]
"""A prompt and its answer."""


def target_of(kind: str, folder: Path) -> Any:
    if kind in ADAPTED:
        raw = {**TYPES[kind], "max_position_embeddings": ROOM}
        return AdaptedModel(module_of(raw, lively=True), raw, closed=False)
    if kind in DELTA_CASES:
        raw = copy.deepcopy(DELTA_CASES[kind])
        raw["text_config"]["max_position_embeddings"] = ROOM
        return native_of(module_of(raw, lively=True), raw, closed=False)
    assert kind in CASES
    build(folder, kind, max_position_embeddings=ROOM)
    return load_model(folder)


def conversation(target: Any, params: SamplingParams) -> list[Turn]:
    """Plain decoding's. A prompt goes on from all that was said, from a place within the last
    answer, or from one within the last prompt; all in one session, the last without any."""
    engine, session, turns = engine_of(target), Session(), list[Turn]()
    prompt = [(7 * i + 3) % 89 for i in range(40)]
    for turn in range(TURNS):
        kept = session if turn < TURNS - 1 else None
        answer = run(engine, prompt, params, None, TOKENS, kept)
        assert len(answer) == TOKENS
        turns.append((prompt, answer))
        place = (len(prompt) + TOKENS, len(prompt) + TOKENS // 2, len(prompt) * 2 // 3)[turn % 3]
        prompt = [*(prompt + answer)[:place], *((turn * 13 + 5 * i) % 89 for i in range(3))]
    said = {token for _, answer in turns for token in answer}
    assert len(said) > 12, "a model that says one word shows nothing"
    return turns


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("kind", NATIVE + ADAPTED)
def test_two_thousand_tokens(kind: str, how: str, tmp_path: Path) -> None:
    target = target_of(kind, tmp_path)
    turns = conversation(target, SAMPLING[how])
    oracle = Oracle(target, [prompt + answer for prompt, answer in turns], RANKS)
    for tree in TREES:
        engine, session, stats = engine_of(target, oracle), Session(), DraftStats()
        for prompt, answer in turns:
            found = run(engine, prompt, SAMPLING[how], tree, TOKENS, session, stats)
            assert found == answer
        assert stats.tokens_per_step > 1.3
