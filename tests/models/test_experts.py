"""Experts, latent attention and shared keys and values beyond what parity with mlx-lm shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from expert_cases import MSCALED, apart
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.switch_layers import SwitchLinear
from tiny_models import PREFIX, Runner, assert_close, build, save, tokens_of

from mlx_redrafter.bench.counts import sizes
from mlx_redrafter.cache.ring import Ring
from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.cli import info
from mlx_redrafter.drafters import model as draft_model
from mlx_redrafter.errors import DrafterError, ModelError
from mlx_redrafter.models import experts, load_model
from mlx_redrafter.models.batched import BatchedTarget
from mlx_redrafter.models.sequences import Request
from mlx_redrafter.models.weights import parameters
from mlx_redrafter.tree.shape import TreeShape

W_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def logits_of(folder: Path, seed: int = 1) -> mx.array:
    return Runner(load_model(folder))(tokens_of(9, seed))


@pytest.mark.parametrize(
    ("case", "names"),
    [("qwen3_moe", {}), ("qwen2_moe", {}), ("mixtral", W_NAMES), ("minimax", W_NAMES),
     ("glm4_moe", {})],
)  # fmt: skip
def test_experts_stored_one_by_one(tmp_path: Path, case: str, names: dict[str, str]) -> None:
    config = build(tmp_path, case)
    expected = logits_of(tmp_path)
    weights = apart(mx.load(str(tmp_path / "model.safetensors")), names)
    if case == "glm4_moe":  # the layer that drafts goes
        weights["model.layers.2.eh_proj.weight"] = mx.ones((2, 2))
    mx.eval(weights)
    save(tmp_path, config, weights)
    assert_close(logits_of(tmp_path), expected, 0.0)
    first = next(name for name in weights if ".experts.0." in name)
    second = first.replace(".experts.0.", ".experts.1.")
    weights[first], weights[second] = weights[second], weights[first]
    save(tmp_path, config, weights)
    assert mx.abs(logits_of(tmp_path) - expected).max().item() > 1e-3


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """Gate and up in one tensor, rows in turn, experts in blocks of four bits."""
    config = build(tmp_path, "gpt_oss")
    weights = dict(mx.load(str(tmp_path / "model.safetensors")))
    stored: dict[str, mx.array] = {}
    for name, value in weights.items():
        if ".experts." not in name or name.endswith(".up_proj.bias"):
            stored.setdefault(name, value)
            continue
        base, part = name.rsplit(".", 1)
        if part == "bias" and base.endswith("down_proj"):
            stored[f"{base}_bias"] = value
        elif part == "bias":
            up = weights[base.replace("gate_proj", "up_proj") + ".bias"]
            both = mx.stack([value, up], axis=-1).reshape(value.shape[0], -1)
            stored[base.replace("gate_proj", "gate_up_proj") + "_bias"] = both
        elif base.endswith("down_proj"):
            stored |= blocks(base, value)
        elif base.endswith("gate_proj"):
            up = weights[base.replace("gate_proj", "up_proj") + ".weight"]
            both = mx.stack([value, up], axis=2).reshape(value.shape[0], -1, value.shape[-1])
            stored |= blocks(base.replace("gate_proj", "gate_up_proj"), both)
    stored = {n: v for n, v in stored.items() if ".experts.up_proj" not in n}
    config["quantization_config"] = {"quant_method": "mxfp4"}
    save(tmp_path, config, stored)
    model = load_model(tmp_path)
    reference, _ = mlx_lm_utils.load_model(tmp_path)
    prompt = tokens_of(20)
    assert_close(Runner(model)(prompt), reference(prompt[None])[0], 1e-4)


def blocks(base: str, value: mx.array) -> dict[str, mx.array]:
    packed, scales = mx.quantize(value, 32, 4, mode="mxfp4")
    count, rows, _ = packed.shape
    return {f"{base}_blocks": packed.view(mx.uint8).reshape(count, rows, -1, 16),
            f"{base}_scales": scales}  # fmt: skip


def test_keys_and_values_of_latent_attention_as_published(tmp_path: Path) -> None:
    """One projection to all heads' keys and values; and the layer that drafts, behind the last."""
    config = build(tmp_path, "glm4_moe_lite")
    expected = logits_of(tmp_path)
    weights = apart(mx.load(str(tmp_path / "model.safetensors")), {})
    for layer in range(2):
        prefix = f"model.layers.{layer}.self_attn"
        keys = weights.pop(f"{prefix}.embed_q.weight").swapaxes(-1, -2)
        both = mx.concatenate([keys, weights.pop(f"{prefix}.unembed_out.weight")], axis=1)
        weights[f"{prefix}.kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
    weights["model.layers.2.eh_proj.weight"] = mx.ones((2, 2))
    mx.eval(weights)
    save(tmp_path, config, weights)
    assert_close(logits_of(tmp_path), expected, 0.0)


def test_gemma_4_as_published(tmp_path: Path) -> None:
    """The text half among towers; layers that share keep projections that nobody uses."""
    config = build(tmp_path, "gemma4")
    expected = logits_of(tmp_path)
    weights = {
        name.replace("language_model.model.", "model.language_model."): value + 0
        for name, value in mx.load(str(tmp_path / "model.safetensors")).items()
    }
    unused = "model.language_model.layers.5.self_attn.k_proj.weight"
    weights |= dict.fromkeys(("model.audio_tower.a", "model.embed_vision.b", unused), mx.ones(2))
    mx.eval(weights)
    save(tmp_path, config, weights)
    assert_close(logits_of(tmp_path), expected, 0.0)


def test_experts_of_qwen3_vl_as_published(tmp_path: Path) -> None:
    config = build(tmp_path, "qwen3_vl_moe")
    expected = logits_of(tmp_path)
    weights: dict[str, mx.array] = {"model.visual.patch.weight": mx.ones((2, 2))}
    given = mx.load(str(tmp_path / "model.safetensors"))
    for name, value in given.items():
        name = name.removeprefix("language_model.")
        name = name.replace("model.layers.", "model.language_model.layers.")
        before, found, matrix = name.partition(".switch_mlp.")
        if not found:
            weights[name] = value
        elif matrix == "down_proj.weight":
            weights[f"{before}.experts.down_proj"] = value.swapaxes(-1, -2)
        elif matrix == "gate_proj.weight":
            stored = before.replace("model.language_model.", "language_model.model.")
            up = given[f"{stored}.switch_mlp.up_proj.weight"]
            both = mx.concatenate([value, up], axis=1)
            weights[f"{before}.experts.gate_up_proj"] = both.swapaxes(-1, -2)
    mx.eval(weights)
    save(tmp_path, config, weights)
    assert_close(logits_of(tmp_path), expected, 0.0)


@pytest.mark.parametrize("case", ["qwen3_moe", "glm4_moe_lite", "gemma4_text-experts"])
def test_quantised_experts_equal_mlx_lm(tmp_path: Path, case: str) -> None:
    sizes: dict[str, Any] = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    build(tmp_path, case, **(sizes if case == "glm4_moe_lite" else {}))
    model, config = mlx_lm_utils.load_model(tmp_path)
    model, config = mlx_lm_utils.quantize_model(model, config, 32, 4)
    save(tmp_path, config, dict(tree_flatten(model.parameters())))
    prompt = tokens_of(20)
    ours = load_model(tmp_path)
    assert_close(Runner(ours)(prompt), model(prompt[None])[0], 5e-4)
    layer = ours.model.layers[1 if case == "glm4_moe_lite" else 0]
    assert "gate_up_proj" in (layer.beside if "beside" in layer else layer.mlp).switch_mlp


def test_pairs_of_a_tree_are_never_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for sorted pairs may round otherwise than the one for a single token."""
    sorted_pairs: list[bool] = []
    call = SwitchLinear.__call__

    def spy(self: SwitchLinear, x: mx.array, indices: mx.array, in_order: bool) -> mx.array:
        sorted_pairs.append(in_order)
        return call(self, x, indices, in_order)

    build(tmp_path, "qwen3_moe")
    model = load_model(tmp_path)
    monkeypatch.setattr(SwitchLinear, "__call__", spy)
    start = Runner(model)
    start(tokens_of(16))  # 48 pairs
    start(tokens_of(32))  # 96, and mlx-lm would sort them
    assert sorted_pairs and not any(sorted_pairs)
    monkeypatch.setattr(experts, "MOST_NODES", 8)
    tokens = tokens_of(12)
    mine, other = start.copy(), start.copy()
    assert_close(mine(tokens[:8]), mx.concatenate([other(t[None]) for t in tokens[:8]]))
    sorted_pairs.clear()
    long = Runner(model)
    expected = Runner(model)
    assert_close(
        long(tokens_of(40)), mx.concatenate([expected(t[None]) for t in tokens_of(40)]), 1e-5
    )
    assert any(sorted_pairs)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "more than there are": ("qwen3_moe", {"num_experts_per_tok": 9}, "9 of 8 experts"),
    "none": ("mixtral", {"num_experts_per_tok": 0}, "0 of 4 experts"),
    "groups": ("glm4_moe", {"n_group": 3}, "groups of one size"),
    "method": ("glm4_moe", {"topk_method": "greedy"}, "topk_method 'greedy'"),
    "shared layers": ("gemma4_text", {"num_kv_shared_layers": 6}, "there is none"),
    "lora": ("deepseek_v3", {"kv_lora_rank": None}, "wrong kind"),
    "no rank": ("deepseek_v3", {"kv_lora_rank": 0}, "at least 1"),
    "layer norm": ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(tmp_path: Path, name: str) -> None:
    case, changes, words = BAD[name]
    config = build(tmp_path, case)
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_latent_layer_keeps_a_vector_and_a_key(tmp_path: Path) -> None:
    build(tmp_path, "deepseek_v3", rope_scaling=MSCALED)
    model = load_model(tmp_path)
    assert model.caches == [Slab(1, 32 + 8)] * 2
    assert model.config.kept_per_token == 2 * 40


def test_layers_that_read_the_keys_of_others_keep_none(tmp_path: Path) -> None:
    build(tmp_path, "gemma4_text")
    model = load_model(tmp_path)
    assert model.caches == [Ring(4, 16, window=4), Slab(4, 32)] * 2
    assert model.config.kept_per_token == 2 * (4 * 16 + 4 * 32)
    runner = Runner(model)
    runner(tokens_of(PREFIX))
    other = runner.copy()
    expected = runner(tokens_of(3, seed=4))
    model._slots[5] = 1  # of the right shape, and of another layer
    assert mx.abs(other(tokens_of(3, seed=4)) - expected).max().item() > 1e-3


@pytest.mark.parametrize(
    "case", ["gpt_oss", pytest.param("gemma4_text", marks=pytest.mark.slow), "glm4_moe_lite"]
)
def test_many_sequences_at_once(tmp_path: Path, case: str) -> None:
    """Left-padded rows give what each gives alone."""
    build(tmp_path, case)
    target = BatchedTarget(load_model(tmp_path), (1,))
    asked = [Request(tokens_of(n, n).tolist(), 0.0, n) for n in (5, 9, 12)]
    together = target.write(asked, 6, set())
    for request, answer in zip(asked, together, strict=True):
        assert target.write([request], 6, set())[0].tokens == answer.tokens


def test_what_else_asks_for_sizes(tmp_path: Path) -> None:
    """Memory, and bytes of a step: of experts those that rows can choose."""
    build(tmp_path, "qwen3_moe")
    model = load_model(tmp_path)
    facts = info._model(tmp_path, 100)
    held = parameters(model)
    assert facts["parameters"] == sum(value.size for value in held.values())
    assert facts["cache_bytes"] == 100 * model.config.kept_per_token * 4
    stacked = sum(value.nbytes for name, value in held.items() if ".switch_mlp." in name)
    rest = sum(value.nbytes for value in held.values()) - stacked
    for nodes, share in ((1, 3 / 8), (2, 6 / 8), (3, 1.0), (9, 1.0)):
        read = sizes.read(model, None, TreeShape(4, 4, nodes), 10)
        assert read.target == rest + share * stacked + nodes * 64 * 4
        assert read.kv == 10 * model.config.kept_per_token * 4


@pytest.mark.parametrize(
    ("case", "reason"), [("gpt_oss", "attention sinks"), ("glm4_moe_lite", "latent attention")]
)
def test_what_cannot_attend_to_branches_does_not_draft(
    tmp_path: Path, case: str, reason: str
) -> None:
    build(tmp_path, case)
    with pytest.raises(DrafterError, match=reason):
        draft_model.check(tmp_path, load_model(tmp_path))
