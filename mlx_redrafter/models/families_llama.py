"""config.json of Llama and its relatives -> DecoderConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .config import DecoderConfig
from .family import Raw, base, partial_rotary


def _llama(raw: Raw) -> DecoderConfig:
    """Llama and Mistral. As in mlx-lm a window needs layer_types; sliding_window alone does not."""
    config = base(raw, max_positions=2048)
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
    config = base(raw, max_positions=32768, theta=1e6)
    return replace(config, qkv_bias=True)


def _qwen3(raw: Raw) -> DecoderConfig:
    return replace(base(raw, max_positions=32768, theta=1e6), qk_norm="head")


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
    config = base({"tie_word_embeddings": False, **raw}, max_positions=131072)
    rope = config.ropes[0]
    scaling = dict(rope.scaling) if rope.scaling else None
    if scaling and (scaling.get("type") or scaling.get("rope_type")) in ("longrope", "su"):
        original = raw.get("original_max_position_embeddings", 4096)
        scaling["original_max_position_embeddings"] = original
        scaling.setdefault("short_factor", scaling.get("long_factor"))
    rope = replace(rope, dims=int(config.head_dim * partial_rotary(raw)), scaling=scaling)
    return replace(config, ropes=(rope,), stored_fused=True)


FAMILIES: dict[str, Callable[[Raw], DecoderConfig]] = {
    "granite": _granite,
    "llama": _llama,
    "mistral": _llama,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}
