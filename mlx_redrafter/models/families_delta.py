"""config.json of models whose layers are mostly recurrent -> DecoderConfig."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import ModelError
from .config import DecoderConfig, DeltaConfig, ExpertsConfig
from .families_experts import with_experts
from .families_nested import text_config
from .family import Raw, base, partial_rotary

_QWEN3_5_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-6, "vocab_size": 151936,
    "num_key_value_heads": 8, "linear_num_value_heads": 64, "linear_num_key_heads": 16,
    "linear_key_head_dim": 192, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "num_experts": 0, "norm_topk_prob": True,
}  # fmt: skip
_QWEN3_5_ROPE: dict[str, Any] = {
    "type": "default", "rope_theta": 100000.0, "partial_rotary_factor": 0.25,
}  # fmt: skip


def _hybrid(raw: Raw) -> DecoderConfig:
    """Gated DeltaNet, and in every n-th layer attention whose output has a gate."""
    raw = {"tie_word_embeddings": False, **raw}
    config = base(raw, max_positions=131072, theta=1e5)
    bias = bool(raw.get("attention_bias", False))
    dims = int(config.head_dim * partial_rotary(raw, 0.25))
    delta = DeltaConfig(
        int(raw["linear_num_key_heads"]),
        int(raw["linear_num_value_heads"]),
        int(raw["linear_key_head_dim"]),
        int(raw["linear_value_head_dim"]),
        int(raw["linear_conv_kernel_dim"]),
    )
    sizes = (delta.key_heads, delta.value_heads, delta.key_size, delta.value_size, delta.kernel - 1)
    if min(sizes) < 1 or delta.value_heads % delta.key_heads:
        raise ModelError(
            f"config.json gives a recurrence of {delta.key_heads} heads of keys and "
            f"{delta.value_heads} of values; needed: a multiple, with sizes of at least 1"
        )
    every = int(raw.get("full_attention_interval") or 4)
    attention = [(i + 1) % every == 0 for i in range(config.num_layers)]
    return replace(
        config,
        ropes=(replace(config.ropes[0], dims=dims),),
        delta=delta,
        layer_changes=tuple({"delta": None} if full else {} for full in attention),
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
        output_gate=True,
    )


def _experts(raw: Raw) -> ExpertsConfig:
    return ExpertsConfig(
        int(raw["num_experts"]),
        int(raw["num_experts_per_tok"]),
        int(raw["moe_intermediate_size"]),
        from_top=True,
        normalise=bool(raw.get("norm_topk_prob", False)),
        shared=int(raw["shared_expert_intermediate_size"]),
        shared_gate=True,
    )


def _qwen3_next(raw: Raw) -> DecoderConfig:
    config = _hybrid(raw)
    every, plain = int(raw.get("decoder_sparse_step", 1)), raw.get("mlp_only_layers") or []
    layers = range(config.num_layers)
    if not int(raw["num_experts"]):
        return config
    dense = [i for i in layers if i in plain or (i + 1) % every]
    return with_experts(config, _experts(raw), dense)


def _qwen3_5(raw: Raw) -> DecoderConfig:
    """The text half, with experts or without."""
    text = {**_QWEN3_5_DEFAULTS, "rope_parameters": _QWEN3_5_ROPE, **text_config(raw)}
    if text["rope_parameters"]:  # then mlx-lm reads no other
        text |= {"partial_rotary_factor": None, "rope_theta": None, "rope_scaling": None}
    config = _hybrid(text)
    return with_experts(config, _experts(text)) if text["num_experts"] else config


FAMILIES: dict[str, Callable[[Raw], DecoderConfig]] = {
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5,
    "qwen3_next": _qwen3_next,
}
