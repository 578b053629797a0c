"""config.json -> DecoderConfig, one small function per family. Follows mlx_lm/models/<type>.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, cast

import mlx.core as mx

from ..errors import ModelError
from .config import DecoderConfig, RopeConfig

Raw = Mapping[str, Any]
_LARGEST = {
    "num_hidden_layers": 10_000, "hidden_size": 2**28, "intermediate_size": 2**28,
    "vocab_size": 2**28, "num_attention_heads": 2**20, "num_key_value_heads": 2**20,
    "head_dim": 2**20,
}  # fmt: skip


def decoder_config(raw: Raw, weight_names: Collection[str] = ()) -> DecoderConfig:
    """The DecoderConfig of a config.json.

    `weight_names` (after `loading.sanitize`) decide whether Gemma 3's head is tied, as in mlx-lm.
    Raises ModelError for an unknown model_type, a missing key or sizes that do not fit together.
    """
    kind = raw.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ModelError(
            f"model_type '{kind}' is not supported; needed: one of {', '.join(SUPPORTED)}"
        )
    try:
        config = family(raw)
        if config.model_type in ("gemma3", "gemma3_text"):
            config = replace(config, tied="lm_head.weight" not in weight_names)
    except KeyError as error:
        raise ModelError(
            f"config.json of model_type '{kind}' lacks {error}; "
            "download the model's config.json again"
        ) from error
    except (AttributeError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"config.json of model_type '{kind}' has a value of the wrong kind ({error}); "
            "download the model's config.json again"
        ) from error
    _check(config)
    return config


def _check(config: DecoderConfig) -> None:
    for name in ("hidden_size", "vocab_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(config, name) < 1:
            raise ModelError(
                f"config.json gives {name} = {getattr(config, name)}; needed: at least 1"
            )
    if not 0 < config.norm_eps < math.inf:
        raise ModelError(f"config.json gives norm_eps = {config.norm_eps}; needed: more than 0")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"config.json gives {config.num_heads} attention heads and {config.num_kv_heads} "
            "key/value heads; needed: a multiple"
        )
    for rope in config.ropes:
        if rope.dims < 2 or rope.dims % 2 or rope.dims > config.head_dim:
            raise ModelError(
                f"config.json rotates {rope.dims} of {config.head_dim} entries of a head; "
                "needed: an even number of at least 2, not above the head size"
            )
    if len(config.layer_windows) != config.num_layers or len(config.layer_ropes) != len(
        config.layer_windows
    ):
        raise ModelError(
            f"config.json lists layer types for {len(config.layer_windows)} layers; "
            f"needed: one for each of {config.num_layers} layers"
        )


def _head_dim(raw: Raw) -> int:
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    if raw.get("head_dim"):
        return int(raw["head_dim"])
    if hidden % heads:
        raise ModelError(
            f"config.json gives hidden_size {hidden} and {heads} attention heads; "
            "needed: a multiple, or head_dim"
        )
    return hidden // heads


def rope_config(raw: Raw, dims: int, base: float, max_positions: int) -> RopeConfig:
    """The rotary embedding; transformers >= 5 nests its keys under rope_parameters."""
    nested = raw.get("rope_parameters") or {}
    theta = raw.get("rope_theta") or nested.get("rope_theta") or base
    return RopeConfig(
        dims=dims,
        base=float(theta),
        traditional=bool(raw.get("rope_traditional", False)),
        scaling=raw.get("rope_scaling") or nested or None,
        max_positions=max_positions,
    )


def _limit(raw: Raw) -> None:
    """Refuse damaged sizes before anything is built of them, or counted up to them."""
    for name, most in _LARGEST.items():
        if int(raw.get(name) or 0) > most:
            raise ModelError(f"config.json gives {name} = {raw[name]}; needed: {most} or less")


def _base(raw: Raw, *, max_positions: int, theta: float = 10000.0) -> DecoderConfig:
    """What all families share."""
    _limit(raw)
    layers, head_dim = int(raw["num_hidden_layers"]), _head_dim(raw)
    limit = int(raw.get("max_position_embeddings") or max_positions)
    rope = rope_config(raw, head_dim, theta, limit)
    return DecoderConfig(
        model_type=str(raw["model_type"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        num_layers=layers,
        num_heads=int(raw["num_attention_heads"]),
        num_kv_heads=int(raw.get("num_key_value_heads") or raw["num_attention_heads"]),
        head_dim=head_dim,
        max_positions=rope.stretched_positions,
        norm_eps=float(raw["rms_norm_eps"]),
        attention_scale=head_dim**-0.5,
        ropes=(rope,),
        layer_ropes=(0,) * layers,
        layer_windows=(0,) * layers,
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def _llama(raw: Raw) -> DecoderConfig:
    """Llama and Mistral. As in mlx-lm a window needs layer_types; sliding_window alone does not."""
    config = _base(raw, max_positions=2048)
    window = int(raw.get("sliding_window") or 0)
    windows = config.layer_windows
    if raw.get("layer_types"):
        windows = tuple(window if t == "sliding_attention" else 0 for t in raw["layer_types"])
    bias = bool(raw.get("attention_bias", False))
    return replace(
        config,
        layer_windows=windows,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
    )


def _smollm3(raw: Raw) -> DecoderConfig:
    config = _llama(raw)
    every = int(raw.get("no_rope_layer_interval", 4))
    use = raw.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(config.num_layers)]
    return replace(config, layer_ropes=tuple(0 if rope else -1 for rope in use))


def _qwen2(raw: Raw) -> DecoderConfig:
    config = _base(raw, max_positions=32768, theta=1e6)
    return replace(config, qkv_bias=True)


def _qwen3(raw: Raw) -> DecoderConfig:
    return replace(_base(raw, max_positions=32768, theta=1e6), qk_norm="head")


def _olmo2(raw: Raw) -> DecoderConfig:
    return replace(_llama({**raw, "layer_types": None}), qk_norm="full", norms="post")


def _granite(raw: Raw) -> DecoderConfig:
    config = _llama({**raw, "layer_types": None})
    return replace(
        config,
        attention_scale=float(raw["attention_multiplier"]),
        embedding_scale=float(raw["embedding_multiplier"]),
        residual_scale=float(raw["residual_multiplier"]),
        logits_divisor=float(raw["logits_scaling"]),
    )


def _phi3(raw: Raw) -> DecoderConfig:
    config = _base({"tie_word_embeddings": False, **raw}, max_positions=131072)
    rope = config.ropes[0]
    nested = raw.get("rope_parameters") or {}
    partial = raw.get("partial_rotary_factor") or nested.get("partial_rotary_factor") or 1.0
    scaling = dict(rope.scaling) if rope.scaling else None
    if scaling and (scaling.get("type") or scaling.get("rope_type")) in ("longrope", "su"):
        original = raw.get("original_max_position_embeddings", 4096)
        scaling["original_max_position_embeddings"] = original
        scaling.setdefault("short_factor", scaling.get("long_factor"))
    rope = replace(rope, dims=int(config.head_dim * float(partial)), scaling=scaling)
    return replace(config, ropes=(rope,), stored_fused=True)


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
    config = _gemma(_base(raw, max_positions=8192), raw, 144.0)
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
    config = _gemma(_base(raw, max_positions=32768), raw, 256.0)
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
    "granite": _granite,
    "llama": _llama,
    "mistral": _llama,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}
SUPPORTED: tuple[str, ...] = tuple(sorted(FAMILIES))
