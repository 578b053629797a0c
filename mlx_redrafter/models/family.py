"""What the families have in common: the reading of a config.json's usual keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ModelError
from .config import DecoderConfig, RopeConfig

Raw = Mapping[str, Any]
_LARGEST = {
    "num_hidden_layers": 10_000, "hidden_size": 2**28, "intermediate_size": 2**28,
    "vocab_size": 2**28, "num_attention_heads": 2**20, "num_key_value_heads": 2**20,
    "head_dim": 2**20,
}  # fmt: skip


def head_dim(raw: Raw) -> int:
    """As given, or the hidden size shared out among the heads."""
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


def limit(raw: Raw) -> None:
    """Refuse damaged sizes before anything is built of them, or counted up to them."""
    for name, most in _LARGEST.items():
        if int(raw.get(name) or 0) > most:
            raise ModelError(f"config.json gives {name} = {raw[name]}; needed: {most} or less")


def base(raw: Raw, *, max_positions: int, theta: float = 10000.0) -> DecoderConfig:
    """What all families share."""
    limit(raw)
    layers, size = int(raw["num_hidden_layers"]), head_dim(raw)
    longest = int(raw.get("max_position_embeddings") or max_positions)
    rope = rope_config(raw, size, theta, longest)
    return DecoderConfig(
        model_type=str(raw["model_type"]),
        hidden_size=int(raw["hidden_size"]),
        intermediate_size=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        num_layers=layers,
        num_heads=int(raw["num_attention_heads"]),
        num_kv_heads=int(raw.get("num_key_value_heads") or raw["num_attention_heads"]),
        head_dim=size,
        max_positions=rope.stretched_positions,
        norm_eps=float(raw["rms_norm_eps"]),
        attention_scale=size**-0.5,
        ropes=(rope,),
        layer_ropes=(0,) * layers,
        layer_windows=(0,) * layers,
        tied=bool(raw.get("tie_word_embeddings", True)),
    )


def plain_rope(
    config: DecoderConfig, part: float = 1.0, *, traditional: bool = False
) -> DecoderConfig:
    """With a rotary embedding of the leading part of a head, without the scaling that mlx-lm does
    not read for this family."""
    rope = config.ropes[0]
    dims = int(config.head_dim * part)
    rope = replace(rope, dims=dims, traditional=traditional, scaling=None)
    return replace(config, ropes=(rope,), max_positions=rope.max_positions)


def partial_rotary(raw: Raw, otherwise: float = 1.0) -> float:
    """The share of a head that is rotated; transformers >= 5 nests it."""
    nested = raw.get("rope_parameters") or {}
    given = raw.get("partial_rotary_factor") or nested.get("partial_rotary_factor")
    return float(given or otherwise)


def windows(config: DecoderConfig, raw: Raw, every: int) -> tuple[int, ...]:
    """Of the layers that are called sliding, or else of all but each ``every``-th."""
    window = int(raw["sliding_window"])
    full = ["full_attention" if (i + 1) % every == 0 else "" for i in range(config.num_layers)]
    return tuple(0 if t == "full_attention" else window for t in raw.get("layer_types") or full)
