"""Gemma's config.json -> DecoderConfig."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx

from ..errors import ModelError
from .config import DecoderConfig, ExpertsConfig, RopeConfig
from .family import Raw, base, rope_config


def _gemma(config: DecoderConfig, raw: Raw, scalar: float) -> DecoderConfig:
    return replace(
        config,
        attention_scale=float(raw.get("query_pre_attn_scalar", scalar)) ** -0.5,
        norms="both",
        norm_offset=1.0,
        activation="gelu_approx",
        embedding_scale=config.hidden_size**0.5,
        tied=True,
    )


def _gemma2(raw: Raw) -> DecoderConfig:
    """Gemma 2 without its alternating window of 4096 tokens: mlx-lm attends to everything."""
    config = _gemma(base(raw, max_positions=8192), raw, 144.0)
    return replace(
        config,
        attention_scale=1.0 / (float(raw.get("query_pre_attn_scalar", 144.0)) ** 0.5),
        attention_softcap=float(raw.get("attn_logit_softcapping") or 50.0),
        logits_softcap=float(raw.get("final_logit_softcapping") or 30.0),
    )


_GEMMA3_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
}


def _gemma3_text(raw: Raw) -> DecoderConfig:
    """Five windowed layers with their own rotary base, then one global layer."""
    raw = {**_GEMMA3_DEFAULTS, **raw}
    config = _gemma(base(raw, max_positions=32768), raw, 256.0)
    pattern = int(raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6)
    window = int(raw.get("sliding_window") or 512)
    local = [(i + 1) % pattern != 0 for i in range(config.num_layers)]
    nested = raw.get("rope_parameters") or {}
    full, sliding = nested.get("full_attention") or {}, nested.get("sliding_attention") or {}
    limit = config.ropes[0].max_positions
    flat = {**raw, "rope_parameters": full}
    local_base = raw.get("rope_local_base_freq") or sliding.get("rope_theta") or 1e4
    return replace(
        config,
        max_positions=limit,  # stretched already
        qk_norm="head",
        # mlx-lm rounds this factor to bfloat16, as the model was trained.
        embedding_scale=cast(float, mx.array(config.hidden_size**0.5, mx.bfloat16).item()),
        ropes=(
            rope_config(flat, config.head_dim, 1e6, limit),
            RopeConfig(config.head_dim, float(local_base), max_positions=limit),
        ),
        layer_ropes=tuple(int(is_local) for is_local in local),
        layer_windows=tuple(window if is_local else 0 for is_local in local),
        clip_residual=True,
    )


def _gemma3(raw: Raw) -> DecoderConfig:
    """The text half of a Gemma 3 with pictures; defaults as in mlx_lm/models/gemma3.py."""
    text = {"num_attention_heads": 8, "num_key_value_heads": 4, **raw["text_config"]}
    return _gemma3_text(
        {**text, "model_type": "gemma3", "vocab_size": raw.get("vocab_size", 262208)}
    )


_GEMMA4_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144,
    "num_attention_heads": 8, "head_dim": 256, "global_head_dim": 512, "rms_norm_eps": 1e-6,
    "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "num_key_value_heads": 1,
    "num_kv_shared_layers": 20, "hidden_size_per_layer_input": 256, "sliding_window": 512,
    "sliding_window_pattern": 5, "final_logit_softcapping": 30.0, "use_double_wide_mlp": True,
}  # fmt: skip
_GEMMA4_ROPES: dict[str, Any] = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6,
                       "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}  # fmt: skip


def _gemma4_text(raw: Raw) -> DecoderConfig:
    """Full layers have larger heads; the last layers read the keys and values of earlier ones."""
    raw = {**_GEMMA4_DEFAULTS, **raw}
    config = base(raw, max_positions=131072)
    pattern = ["sliding_attention"] * (int(raw["sliding_window_pattern"]) - 1) + ["full_attention"]
    kinds = raw.get("layer_types") or (pattern * config.num_layers)[: config.num_layers]
    given, positions = raw.get("rope_parameters") or _GEMMA4_ROPES, config.ropes[0].max_positions
    ropes = []
    for kind in ("full_attention", "sliding_attention"):
        full, own = kind == "full_attention", given.get(kind) or {}
        size = int((full and raw.get("global_head_dim")) or config.head_dim)
        theta = float(own.get("rope_theta", 1e4))
        traditional = bool(raw.get("rope_traditional", False))
        ropes.append(RopeConfig(size, theta, traditional, own or None, positions))
    sliding = [kind == "sliding_attention" for kind in kinds]
    return replace(
        config,
        max_positions=positions,
        attention_scale=1.0,
        ropes=tuple(ropes),
        layer_ropes=tuple(int(one) for one in sliding),
        layer_windows=tuple(int(raw["sliding_window"]) if one else 0 for one in sliding),
        layer_changes=_gemma4_layers(raw, kinds),
        qk_norm="head",
        value_norm=True,
        norms="both",
        activation="gelu_approx",
        experts=_gemma4_experts(raw),
        experts_beside=bool(raw.get("enable_moe_block")),
        layer_input=int(raw["hidden_size_per_layer_input"] or 0),
        layer_input_vocab=int(raw["vocab_size_per_layer_input"] or 0),
        layer_scalar=True,
        embedding_scale=config.hidden_size**0.5,
        logits_softcap=float(raw["final_logit_softcapping"] or 0.0),
    )


def _gemma4_layers(raw: Raw, kinds: Sequence[str]) -> tuple[dict[str, Any], ...]:
    """What differs by layer: heads of full ones, and the last ones that share."""
    first = len(kinds) - int(raw["num_kv_shared_layers"] or 0)
    latest, layers = {kind: i for i, kind in enumerate(kinds[:first])}, []
    for index, kind in enumerate(kinds):
        changes: dict[str, Any] = {}
        if kind == "full_attention":
            same = bool(raw.get("attention_k_eq_v"))
            changes["head_dim"] = int(raw.get("global_head_dim") or raw["head_dim"])
            changes["values_are_keys"] = same
            if same and raw.get("num_global_key_value_heads") is not None:
                changes["num_kv_heads"] = int(raw["num_global_key_value_heads"])
        if index >= first:
            if kind not in latest:
                raise ModelError(
                    f"config.json lets layer {index} of type '{kind}' read the keys and values of "
                    "an earlier one, and there is none; download the model's config.json again"
                )
            changes["kv_source"] = latest[kind]
            if raw["use_double_wide_mlp"] and first > 0:
                changes["intermediate_size"] = 2 * int(raw["intermediate_size"])
        layers.append(changes)
    return tuple(layers)


def _gemma4_experts(raw: Raw) -> ExpertsConfig | None:
    if not raw.get("enable_moe_block"):
        return None
    count, chosen = int(raw["num_experts"]), int(raw["top_k_experts"])
    size = int(raw["moe_intermediate_size"])
    return ExpertsConfig(count, chosen, size, scores="chosen", from_top=True)


def _gemma4(raw: Raw) -> DecoderConfig:
    """The text half; defaults as in mlx_lm/models/gemma4.py."""
    text = {"num_attention_heads": 8, "num_key_value_heads": 1, **raw["text_config"]}
    kind, words = raw["model_type"], raw.get("vocab_size", 262144)
    return _gemma4_text({**text, "model_type": kind, "vocab_size": words})


FAMILIES: dict[str, Callable[[Raw], DecoderConfig]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3_text,
    "gemma4": _gemma4,
    "gemma4_text": _gemma4_text,
    "gemma4_unified": _gemma4,
}
