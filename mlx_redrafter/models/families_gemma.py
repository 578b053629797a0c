"""Gemma's config.json -> DecoderConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx

from .config import DecoderConfig, RopeConfig
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


FAMILIES: dict[str, Callable[[Raw], DecoderConfig]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3_text,
}
