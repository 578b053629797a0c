"""config.json as what is stored means it: left-over declarations go, silent ones are filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..errors import ModelError
from ..runtime.device import dtype_name

_BLOCKS = ("quantization", "quantization_config", "compression_config")
Types = Mapping[str, mx.Dtype | None]


def as_stored(raw: Mapping[str, Any], types: Types) -> dict[str, Any]:
    """A copy of config.json that says what the weights are.

    Args:
        raw: config.json.
        types: names after `loading.sanitize` -> stored type, None for one that MLX lacks.

    Without MLX's packed weights no quantisation is left in it; a missing `tie_word_embeddings`
    says whether a head is stored, as transformers takes it, where mlx-lm would drop the head.
    Raises ModelError for weights that another program quantised.
    """
    config = dict(raw)
    packed = packed_layers(types)
    _refuse_foreign(raw, types, packed)
    if not packed:
        config = _without_blocks(config)
        if isinstance(text := config.get("text_config"), Mapping):
            config["text_config"] = _without_blocks(text)
    if config.get("tie_word_embeddings") is None and "gemma" not in str(config.get("model_type")):
        config["tie_word_embeddings"] = "lm_head.weight" not in types
    return config


def packed_layers(types: Types) -> set[str]:
    """Paths of the layers whose weights are quantised as MLX does it."""
    bases = {name.removesuffix(".scales") for name in types if name.endswith(".scales")}
    return {base for base in bases if types.get(f"{base}.weight", mx.int8) == mx.uint32}


def _refuse_foreign(raw: Mapping[str, Any], types: Types, packed: set[str]) -> None:
    """Plain weights are floating and called weight or bias; MLX's have scales beside them."""
    text = raw.get("text_config")
    places = (raw, text) if isinstance(text, Mapping) else (raw,)
    block = next((place[key] for place in places for key in _BLOCKS if place.get(key)), None)
    for name, kind in types.items():
        base, _, part = name.rpartition(".")
        floating = kind is not None and mx.issubdtype(kind, mx.floating)
        if base in packed or (floating and (part in ("weight", "bias") or packed or not block)):
            continue
        if not block and (part != "weight" or kind is None):
            continue  # an unknown tensor or type: whoever meets it says so
        method = block.get("quant_method") if isinstance(block, Mapping) else None
        raise ModelError(
            f"the weights are quantised by {repr(method) if method else 'another program'} "
            f"in a format that is not read here ({name} is of {_type_name(kind)}); needed: an "
            "MLX model (mlx_lm.convert --quantize) or the unquantised one"
        )


def _without_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _BLOCKS}


def _type_name(kind: mx.Dtype | None) -> str:
    return f"type {dtype_name(kind)}" if kind else "a type that MLX lacks"
