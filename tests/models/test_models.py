"""The re-implemented targets against mlx-lm, and a tree against sequential decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from delta_cases import DELTA_CASES
from expert_cases import GEMMA4_CASES
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import CASES, PREFIX, TOLERANCE, C, Runner, assert_close, build, tokens_of

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.models import SUPPORTED, Decoder, attention, load_model, rope
from mlx_redrafter.runtime import metal

WINDOWED = {
    "llama-window", "gemma3_text", "gemma3", "ministral3", "olmo3", "exaone4-window", "cohere2",
    "muse_glimmer", "gpt_oss", *GEMMA4_CASES, "gemma4", "gemma4_unified", "mistral3",
}  # fmt: skip
# Every kind of layer once; compiling the others takes minutes.
COMPILED = (
    "llama",
    "llama-window",
    "gemma3",
    "phi3",
    "granite",
    "qwen3_moe",
    "gpt_oss",
    "glm4_moe_lite",
)
# Of latent attention mlx-lm makes keys and values where it reads more than one token.
LATENT = ("glm4_moe_lite", "deepseek_v3", "kimi_k2", "joyai_llm_flash")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(case: str, tmp_path: Path) -> Decoder:
    build(tmp_path, case)
    return load_model(tmp_path)


def test_every_supported_type_is_tested() -> None:
    """Those with recurrent layers in a file of their own."""
    every = (*CASES.values(), *DELTA_CASES.values())
    assert {config["model_type"] for config in every} == set(SUPPORTED)


def test_logits_equal_mlx_lm(case: str, model: Decoder, tmp_path: Path) -> None:
    """Its single steps may be as far from ours as they are from its own pass over all of it: its
    rings add the keys of a window in another order."""
    reference, _ = mlx_lm_utils.load_model(tmp_path)
    prompt, following = tokens_of(40), tokens_of(6, seed=2)
    everything = mx.concatenate([prompt, following])
    whole = reference(everything[None], cache=make_prompt_cache(reference))[0]
    limit = max(TOLERANCE, 5e-5 if case in LATENT else 1e-5)
    ours, chunks = Runner(model), Runner(model)
    assert_close(ours(prompt), whole[:40], limit)
    pieces = mx.concatenate([chunks(part) for part in mx.split(prompt, [1, 8, 15])])
    assert_close(pieces, whole[:40], limit)
    cache = make_prompt_cache(reference)
    reference(prompt[None], cache=cache)
    for token, expected in zip(following, whole[40:], strict=True):
        theirs, mine = reference(token[None, None], cache=cache)[0], ours(token[None])
        assert_close(mine, expected[None], limit)
        assert_close(mine, theirs, limit + 2 * mx.abs(theirs - expected).max().item())


class Tree:
    """Twelve nodes with random parents (node 0 is the root) after a prefix of 37 tokens."""

    def __init__(self, seed: int = 6):
        rng = np.random.default_rng(seed)
        self.parents = [-1] + [int(rng.integers(max(0, i - 3), i)) for i in range(1, 12)]
        self.paths: list[list[int]] = []
        for node, parent in enumerate(self.parents):
            self.paths.append([*(self.paths[parent] if parent >= 0 else []), node])
        self.tokens = tokens_of(12, seed=4)
        self.depths = mx.array([len(path) - 1 for path in self.paths])
        ancestors = np.zeros((12, C), bool)
        ancestors[:, :PREFIX] = True
        for node, path in enumerate(self.paths):
            ancestors[node, [PREFIX + n for n in path]] = True
        self.mask = mx.array(ancestors)

    def arguments(self) -> list[mx.array]:
        """tokens, positions, mask, key_positions of one verification pass."""
        positions = PREFIX + self.depths
        slots = mx.concatenate([mx.arange(PREFIX), positions, mx.zeros(C - PREFIX - 12, mx.int32)])
        return [self.tokens, positions, self.mask, slots]

    def leaves(self) -> list[int]:
        return [n for n in range(12) if n not in self.parents]


def test_tree_equals_sequential_decoding(case: str, model: Decoder) -> None:
    tree, start = Tree(), Runner(model)
    start(tokens_of(PREFIX))
    offset = mx.array([PREFIX])
    arguments = tree.arguments()
    nothing = [mx.zeros((*slab.shape[:2], 12, slab.shape[3])) for slab in start.kv]
    verify = Pass(start.copy().kv, offset, pending=(nothing, mx.full((12,), C - 1)))
    hidden, _ = model(*arguments, verify)
    logits = model.logits(hidden)
    for leaf in tree.leaves():
        path, single = tree.paths[leaf], start.copy()
        expected = mx.concatenate([single(tree.tokens[n : n + 1]) for n in path])
        assert_close(logits[mx.array(path)], expected)
        # The next pass writes the accepted path behind the prefix, and goes on as plain decoding.
        bonus, at = tokens_of(1, seed=leaf), mx.array([single.used])
        slots = [PREFIX + path.index(n) if n in path else C - 1 for n in range(12)]
        slabs = [s + 0 for s in verify.caches]
        commit = Pass(slabs, at, pending=(verify.rows, mx.array(slots)))
        seen = (mx.arange(C) <= at)[None]
        hidden, _ = model(bonus, at, seen, mx.arange(C), commit)
        assert_close(model.logits(hidden), single(bonus))
        for ours, theirs in zip(commit.caches, single.kv, strict=True):
            assert_close(ours[:, :, : single.used], theirs[:, :, : single.used])

    def error(index: int, wrong: mx.array) -> float:
        changed = [*arguments[:index], wrong, *arguments[index + 1 :]]
        other, _ = start.forward(*changed, start.copy().kv, offset)
        return float(mx.abs(other - logits).max())

    slots = mx.arange(C)
    sequential = PREFIX + mx.arange(12)
    assert error(1, sequential) > 1e-3
    assert error(2, slots <= sequential[:, None]) > 1e-3
    assert (error(3, slots) > 1e-3) == (case in WINDOWED)


@pytest.mark.parametrize(
    "case", [c if c in COMPILED else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_compiled_step_does_not_depend_on_the_number_of_rows(case: str, model: Decoder) -> None:
    traces = 0

    def forward(*args: Any) -> Any:
        nonlocal traces
        traces += 1
        return Runner(model).forward(*args)

    start = Runner(model)
    start(tokens_of(PREFIX))
    start.step = mx.compile(forward)
    tokens = tokens_of(16, seed=5)
    results = {}
    for n in (1, 4, 8):
        runner = start.copy()
        results[n] = mx.concatenate([runner(tokens[i : i + n]) for i in range(0, 16, n)])
    assert traces == 3
    assert_close(results[4], results[1])
    assert_close(results[8], results[1])
    start.step = start.forward
    assert_close(start(tokens), results[1], max(TOLERANCE, 1e-5))


def test_inner_layers_and_embeddings(tmp_path: Path) -> None:
    build(tmp_path, "granite")
    model = load_model(tmp_path)
    prompt, slots = tokens_of(9), mx.arange(C)
    run = Pass(new_caches(model.caches, C, model.dtype), mx.array([0]))
    mask = slots <= mx.arange(9)[:, None]
    hidden, inner = model(prompt, mx.arange(9), mask, slots, run, (1, 0))
    assert_close(model.model.norm(inner[0]), hidden, 0.0)
    reference, _ = mlx_lm_utils.load_model(tmp_path)
    h = reference.model.embed_tokens(prompt[None])
    assert_close(model.embed(prompt), h[0], 0.0)
    h = reference.model.layers[0](h * reference.model.embedding_multiplier, "causal")
    assert_close(inner[1], h[0], max(TOLERANCE, 1e-5))


def test_metal_path_computes_the_same(
    case: str, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mx.fast.rope with folded tokens and mx.fast attention, which the CPU can decompose."""
    runner = Runner(model)
    runner(tokens_of(PREFIX))
    fast = runner.copy()
    expected = runner(tokens_of(5, seed=6))
    monkeypatch.setattr(rope, "fused_kernels", lambda: True)
    monkeypatch.setattr(attention, "fused_kernels", lambda: True)
    monkeypatch.setattr(metal, "attention_calls", lambda n, *_: [n])
    assert_close(fast(tokens_of(5, seed=6)), expected)
