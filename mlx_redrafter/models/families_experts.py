"""config.json of models with experts -> DecoderConfig."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ModelError
from .config import DecoderConfig, ExpertsConfig, LatentConfig, LayerChanges, QkNorm
from .family import Raw, base, partial_rotary, plain_rope

_DENSE: dict[str, Any] = {"experts": None}


def with_experts(
    config: DecoderConfig, experts: ExpertsConfig, dense: Sequence[int] = ()
) -> DecoderConfig:
    """Experts in all layers but the dense ones. Raises ModelError for counts that do not fit."""
    if not 1 <= experts.chosen <= experts.count or experts.size < 1:
        raise ModelError(
            f"config.json chooses {experts.chosen} of {experts.count} experts of size "
            f"{experts.size}; needed: at least one, and no more than there are"
        )
    if experts.count % experts.groups or not 1 <= experts.kept_groups <= experts.groups:
        raise ModelError(
            f"config.json keeps {experts.kept_groups} of {experts.groups} groups of "
            f"{experts.count} experts; needed: groups of one size, and no more than there are"
        )
    changes: tuple[LayerChanges, ...] = config.layer_changes
    if dense:
        before = changes or ({},) * config.num_layers
        changes = tuple({**c, **_DENSE} if i in dense else c for i, c in enumerate(before))
    return replace(config, experts=experts, layer_changes=changes)


def _qwen3_moe(raw: Raw) -> DecoderConfig:
    config = plain_rope(base(raw, max_positions=32768, theta=1e6))
    every, plain = int(raw.get("decoder_sparse_step", 1)), raw.get("mlp_only_layers") or []
    layers = range(config.num_layers)
    experts = ExpertsConfig(
        int(raw["num_experts"]),
        int(raw["num_experts_per_tok"]),
        int(raw["moe_intermediate_size"]),
        from_top=True,
        normalise=bool(raw["norm_topk_prob"]),
    )
    dense = [i for i in layers if i in plain or (i + 1) % every]
    return with_experts(replace(config, qk_norm="head"), experts, dense)


def _qwen2_moe(raw: Raw) -> DecoderConfig:
    raw = {"tie_word_embeddings": False, **raw}
    config = plain_rope(
        base(raw, max_positions=32768, theta=1e6),
        traditional=bool(raw.get("rope_traditional", False)),
    )
    experts = ExpertsConfig(
        int(raw["num_experts"]),
        int(raw["num_experts_per_tok"]),
        int(raw["moe_intermediate_size"]),
        normalise=False,
        shared=int(raw["shared_expert_intermediate_size"]),
        shared_gate=True,
    )
    return with_experts(replace(config, qkv_bias=True), experts)


def _mixtral(raw: Raw) -> DecoderConfig:
    raw = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, **raw}
    config = plain_rope(
        base(raw, max_positions=32768, theta=1e6),
        traditional=bool(raw.get("rope_traditional", False)),
    )
    experts = ExpertsConfig(
        int(raw.get("num_local_experts", 8)),
        int(raw.get("num_experts_per_tok", 2)),
        config.intermediate_size,
        scores="chosen",
    )
    return with_experts(config, experts)


def _olmoe(raw: Raw) -> DecoderConfig:
    config, bias = base(raw, max_positions=4096), bool(raw.get("attention_bias", False))
    if raw.get("mlp_bias"):
        raise ModelError(
            "config.json sets mlp_bias, which no OLMoE has; download the model's config.json again"
        )
    experts = ExpertsConfig(
        int(raw["num_experts"]),
        int(raw["num_experts_per_tok"]),
        config.intermediate_size,
        normalise=bool(raw.get("norm_topk_prob", False)),
    )
    config = replace(config, qkv_bias=bias, output_bias=bias, qk_norm="full")
    return with_experts(config, experts)


def routed(raw: Raw, layers: int) -> tuple[ExpertsConfig, list[int]]:
    """Sigmoid experts in groups, behind dense first layers: GLM-4.5 and DeepSeek V3."""
    if raw.get("topk_method", "noaux_tc") != "noaux_tc":
        raise ModelError(
            f"config.json gives topk_method '{raw['topk_method']}', which is not supported; "
            "needed: noaux_tc"
        )
    size, every = int(raw["moe_intermediate_size"]), int(raw.get("moe_layer_freq", 1))
    first = int(raw.get("first_k_dense_replace", 0))
    experts = ExpertsConfig(
        int(raw["n_routed_experts"]),
        int(raw["num_experts_per_tok"]),
        size,
        scores="sigmoid",
        normalise=bool(raw.get("norm_topk_prob", True)),
        scale=float(raw.get("routed_scaling_factor", 1.0)),
        groups=int(raw.get("n_group") or 1),
        kept_groups=int(raw.get("topk_group") or 1),
        shared=size * int(raw.get("n_shared_experts") or 0),
    )
    return experts, [i for i in range(layers) if i < first or i % every]


def _glm4_moe(raw: Raw) -> DecoderConfig:
    config = plain_rope(base(raw, max_positions=131072), partial_rotary(raw, 0.5))
    config = replace(
        config,
        tied=False,
        qkv_bias=bool(raw.get("attention_bias", False)),
        qk_norm="head" if raw.get("use_qk_norm") else "none",
    )
    return with_experts(config, *routed(raw, config.num_layers))


def _minimax(raw: Raw) -> DecoderConfig:
    raw = {"tie_word_embeddings": False, **raw}
    config = base(raw, max_positions=196608)
    config = plain_rope(config, int(raw["rotary_dim"]) / config.head_dim)
    experts = ExpertsConfig(
        int(raw["num_local_experts"]),
        int(raw["num_experts_per_tok"]),
        config.intermediate_size,
        scores="sigmoid",
        epsilon=1e-20,
        precise=True,
    )
    normed: QkNorm = "full" if raw.get("use_qk_norm", True) else "none"
    return with_experts(replace(config, qk_norm=normed), experts)


def _gpt_oss(raw: Raw) -> DecoderConfig:
    """Windowed and full layers in turn, sinks, biases, and a clamped activation."""
    raw = {**_GPT_OSS_DEFAULTS, **raw, "tie_word_embeddings": False}
    config = base(raw, max_positions=131072, theta=150000.0)
    window, count = int(raw["sliding_window"]), config.num_layers
    kinds = raw.get("layer_types") or ["sliding_attention", "full_attention"] * (count // 2)
    experts = ExpertsConfig(
        int(raw["num_local_experts"]),
        int(raw["num_experts_per_tok"]),
        config.intermediate_size,
        scores="chosen",
        from_top=True,
        biases=True,
    )
    config = replace(
        config,
        layer_windows=tuple(0 if kind == "full_attention" else window for kind in kinds),
        sinks=True,
        qkv_bias=True,
        output_bias=True,
        activation="swiglu_oai",
    )
    return with_experts(config, experts)


def _latent(raw: Raw, eps: float) -> DecoderConfig:
    """Latent attention, and experts behind dense first layers."""
    rope, plain = int(raw["qk_rope_head_dim"]), int(raw["qk_nope_head_dim"])
    config = base({**raw, "head_dim": rope + plain}, max_positions=131072)
    embedding = replace(config.ropes[0], dims=rope, traditional=True)
    scaling = embedding.scaling or {}
    scale, factor = config.attention_scale, float(scaling.get("factor") or 1.0)
    if scaling.get("mscale_all_dim") and factor > 1.0:
        scale *= (0.1 * float(scaling["mscale_all_dim"]) * math.log(factor) + 1.0) ** 2
    latent = LatentConfig(
        int(raw["kv_lora_rank"]),
        rope,
        plain,
        int(raw["v_head_dim"]),
        int(raw.get("q_lora_rank") or 0),
        eps,
        bool(raw.get("attention_bias", False)),
    )
    config = replace(
        config, tied=False, ropes=(embedding,), attention_scale=scale, latent=latent,
        num_kv_heads=config.num_heads,
    )  # fmt: skip
    return with_experts(config, *routed(raw, config.num_layers))


def _deepseek_v3(raw: Raw) -> DecoderConfig:
    return _latent(raw, 1e-6)


def _glm4_moe_lite(raw: Raw) -> DecoderConfig:
    raw = {"n_shared_experts": 1, "routed_scaling_factor": 1.8, "first_k_dense_replace": 1, **raw}
    return _latent(raw, float(raw["rms_norm_eps"]))


_GPT_OSS_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 36, "num_local_experts": 128, "num_experts_per_tok": 4,
    "vocab_size": 201088, "rms_norm_eps": 1e-5, "hidden_size": 2880, "intermediate_size": 2880,
    "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
}  # fmt: skip
FAMILIES: dict[str, Callable[[Raw], DecoderConfig]] = {
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "glm4_moe_lite": _glm4_moe_lite,
    "gpt_oss": _gpt_oss,
    "joyai_llm_flash": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
    "minimax": _minimax,
    "minimax_m2": _minimax,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}
