"""config.json of dense models with norms, biases, windows of their own -> DecoderConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import ModelError
from .config import DecoderConfig, RopeConfig
from .family import Raw, base, partial_rotary, plain_rope, windows


def _layer_norm(raw: Raw, key: str) -> dict[str, Any]:
    """The same, with its epsilon where `base` looks for it."""
    return {"rms_norm_eps": raw.get(key, 1e-5), **raw}


def _seed_oss(raw: Raw) -> DecoderConfig:
    return replace(
        base(raw, max_positions=524288),
        qkv_bias=bool(raw.get("attention_bias", False)),
        output_bias=bool(raw.get("attention_out_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _ministral3(raw: Raw) -> DecoderConfig:
    """Queries grow with the position, in steps of the length that was trained on."""
    config = base(raw, max_positions=262144)
    kinds = raw.get("layer_types") or ["full_attention"] * config.num_layers
    window, rope = int(raw.get("sliding_window") or 0), raw["rope_parameters"]
    growth = float(rope["llama_4_scaling_beta"]), int(rope["original_max_position_embeddings"])
    return replace(
        config,
        layer_windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        query_growth=growth,
    )


def _olmo3(raw: Raw) -> DecoderConfig:
    """Three windowed layers, then one that sees everything, whose positions alone are scaled."""
    config = base({"tie_word_embeddings": False, **raw}, max_positions=65536)
    seen, bias = windows(config, raw, 4), bool(raw.get("attention_bias", False))
    return replace(
        config,
        ropes=(config.ropes[0], replace(config.ropes[0], scaling=None)),
        layer_ropes=tuple(int(window > 0) for window in seen),
        layer_windows=seen,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="full",
        norms="post",
    )


def _glm(raw: Raw) -> DecoderConfig:
    config = plain_rope(base(raw, max_positions=131072), traditional=True)
    bias = bool(raw.get("attention_bias", False))
    return replace(config, qkv_bias=bias, stored_gate_up=True)


def _glm4(raw: Raw) -> DecoderConfig:
    config = base(raw, max_positions=32768)
    config = plain_rope(config, partial_rotary(raw, 0.5), traditional=True)
    bias = bool(raw.get("attention_bias", False))
    return replace(config, tied=False, qkv_bias=bias, norms="both", stored_gate_up=True)


def _exaone4(raw: Raw) -> DecoderConfig:
    """With a pattern of local and global layers, or without; global ones have no positions."""
    config = base(raw, max_positions=131072)
    pattern = str(raw.get("sliding_window_pattern") or "")
    local = [pattern != "" and pattern[i % len(pattern)] == "L" for i in range(config.num_layers)]
    return replace(
        config,
        layer_ropes=tuple(0 if one or not pattern else -1 for one in local),
        layer_windows=tuple(int(raw["sliding_window"]) if one else 0 for one in local),
        qk_norm="head",
        norms="post",
    )


_COHERE2_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096, "head_dim": 128, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 256000,
}  # fmt: skip


def _cohere2(raw: Raw) -> DecoderConfig:
    """Attention and feed-forward layer side by side; only windowed layers have positions."""
    raw = _layer_norm({**_COHERE2_DEFAULTS, **raw}, "layer_norm_eps")
    config = plain_rope(base(raw, max_positions=8192, theta=50000.0), traditional=True)
    every, window = int(raw.get("sliding_window_pattern", 4)), int(raw.get("sliding_window", 4096))
    local = [(i + 1) % every != 0 for i in range(config.num_layers)]
    bias = bool(raw.get("attention_bias", False))
    return replace(
        config,
        tied=True,
        layer_ropes=tuple(0 if one else -1 for one in local),
        layer_windows=tuple(window if one else 0 for one in local),
        qkv_bias=bias,
        output_bias=bias,
        norm="layer",
        norm_bias=bool(raw.get("layer_norm_bias", False)),
        norms="parallel",
        logits_scale=float(raw.get("logit_scale", 0.0625)),
    )


_MUSE_DEFAULTS: dict[str, Any] = {
    "hidden_size": 6656, "num_hidden_layers": 52, "intermediate_size": 19968,
    "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 202048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": 2048,
}  # fmt: skip


def _muse_glimmer(raw: Raw) -> DecoderConfig:
    """A gate behind the attention, norms without weights for queries, keys and embeddings."""
    raw = {**_MUSE_DEFAULTS, **raw, **(raw.get("text_config") or {})}
    config = base({**raw, "model_type": "muse_glimmer"}, max_positions=131072, theta=5e5)
    seen = windows(config, raw, 4)
    bases = raw.get("layer_rope_theta") or seen
    base_theta = float((raw.get("rope_parameters") or {}).get("rope_theta") or config.ropes[0].base)
    rope = RopeConfig(config.head_dim, base_theta, max_positions=config.ropes[0].max_positions)
    return replace(
        config,
        max_positions=rope.max_positions,
        ropes=(rope,),
        layer_ropes=tuple(0 if given else -1 for given in bases),
        layer_windows=seen,
        qk_norm="unit",
        query_scale=float(raw.get("qk_scale_factor", 3.87)),
        output_gate=True,
        norms="both",
        norm_offset=1.0,
        norm_offset_last=False,
        post_norm_eps=float(raw.get("post_norm_eps", 1e-8)),
        embedding_norm=True,
        logits_scale=float(raw.get("output_multiplier", 26.0**-0.5)),
        logits_softcap=float(raw.get("final_logit_softcapping", 20.0)),
    )


_PHI_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2560, "num_hidden_layers": 32, "intermediate_size": 10240,
    "num_attention_heads": 32, "vocab_size": 51200,
}  # fmt: skip


def _phi(raw: Raw) -> DecoderConfig:
    """Phi-1 to Phi-2: attention and feed-forward layer side by side, biases everywhere."""
    config = base(_layer_norm({**_PHI_DEFAULTS, **raw}, "layer_norm_eps"), max_positions=2048)
    return replace(
        plain_rope(config, partial_rotary(raw, 0.4)),
        tied=False,
        head_bias=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm="layer",
        norms="parallel",
        activation="gelu_approx",
        gated=False,
    )


def _stablelm(raw: Raw) -> DecoderConfig:
    if raw.get("qk_layernorm"):
        raise ModelError(
            "config.json sets qk_layernorm, which is not supported for model_type 'stablelm'; "
            "needed: a StableLM without it, such as StableLM 2 1.6B"
        )
    config = base(_layer_norm(raw, "layer_norm_eps"), max_positions=4096)
    return replace(
        plain_rope(config, float(raw["partial_rotary_factor"])),
        tied=False,
        qkv_bias=bool(raw.get("use_qkv_bias", False)),
        norm="layer",
        norms="parallel" if raw.get("use_parallel_residual") else "pre",
    )


def _starcoder2(raw: Raw) -> DecoderConfig:
    raw = {"vocab_size": 49152, **_layer_norm(raw, "norm_epsilon")}
    return replace(
        plain_rope(base(raw, max_positions=16384, theta=100000.0)),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm="layer",
        activation="gelu",
        gated=False,
    )


def _nemotron(raw: Raw) -> DecoderConfig:
    """Norms that are stored as weight - 1, and a squared rectifier."""
    raw = {"tie_word_embeddings": False, **_layer_norm(raw, "norm_eps")}
    config, bias = base(raw, max_positions=4096), bool(raw.get("attention_bias", False))
    rope = replace(config.ropes[0], dims=int(config.head_dim * partial_rotary(raw, 0.5)))
    return replace(
        config,
        ropes=(rope,),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        norm="layer",
        norm_offset=1.0,
        activation="relu2",
        gated=False,
    )


FAMILIES: dict[str, Callable[[Raw], DecoderConfig]] = {
    "cohere2": _cohere2,
    "exaone4": _exaone4,
    "glm": _glm,
    "glm4": _glm4,
    "ministral3": _ministral3,
    "muse_glimmer": _muse_glimmer,
    "nemotron": _nemotron,
    "olmo3": _olmo3,
    "phi": _phi,
    "seed_oss": _seed_oss,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
