"""Tensors of models with a Gated DeltaNet: as Hugging Face and mlx-lm store them -> the decoder's.

Both store a head's query and the gate of its output as one, and Qwen3-Next all that is made for one
key head. Only in Hugging Face's layout norms lie one lower, and the convolution is turned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..errors import ModelError
from .config import DecoderConfig
from .families import decoder_config

Weights = dict[str, mx.array]
_LOWER = (
    ".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight",
    ".q_norm.weight", ".k_norm.weight",
)  # fmt: skip


def arranged(weights: Weights, raw: Mapping[str, Any]) -> Weights:
    """The text half's tensors; nothing is evaluated.

    Raises:
        ModelError: shapes that do not fit config.json.
    """
    config = decoder_config(raw)
    published = any(_is_convolution(n) and v.shape[-1] != 1 for n, v in weights.items())
    result: Weights = {}
    for name, value in weights.items():
        if name.startswith("mtp.") or ".mtp." in name:
            continue
        if published and name.endswith(_LOWER) and value.ndim == 1:
            value = value + 1.0
        try:
            result |= _parts(name, value, config)
        except ValueError as error:
            raise ModelError(
                f"{name} of shape {value.shape} does not fit config.json; "
                "download config.json and weights of the same model"
            ) from error
    return result


def _is_convolution(name: str) -> bool:
    return name.endswith(".conv1d.weight")


def _parts(name: str, value: mx.array, config: DecoderConfig) -> Weights:
    """What becomes of one tensor. Of packed ones whole rows are moved."""
    if _is_convolution(name):  # (C, K, 1), or (C, 1, K)
        taps = mx.contiguous(value.reshape(value.shape[0], -1).T)
        return {name.replace(".conv1d.weight", ".taps"): taps}
    if ".self_attn.q_proj." in name:
        query, gate = _by_head(value, config.num_heads, (1, 1))
        return {name: query, name.replace(".q_proj.", ".gate_proj."): gate}
    assert config.delta is not None, "these types have recurrent layers"
    heads, size = config.delta.key_heads, config.delta.key_size
    if ".in_proj_qkvz." in name:
        each = config.delta.values // heads
        q, k, v, z = _by_head(value, heads, (size, size, each, each))
        return {
            name.replace("_qkvz.", "_qkv."): mx.concatenate([q, k, v]),
            name.replace("_qkvz.", "_z."): z,
        }
    if ".in_proj_ba." in name:
        b, a = _by_head(value, heads, (1, 1))
        return {name.replace("_ba.", "_b."): b, name.replace("_ba.", "_a."): a}
    return {name: value}


def _by_head(value: mx.array, heads: int, shares: tuple[int, ...]) -> list[mx.array]:
    """Rows (heads * n, ...), of every head the parts one after the other -> each part's rows."""
    by_head = value.reshape(heads, -1, *value.shape[1:])
    one = by_head.shape[1] // sum(shares)
    ends = [one * sum(shares[: i + 1]) for i in range(len(shares) - 1)]
    parts = mx.split(by_head, ends, axis=1)
    return [part.reshape(-1, *value.shape[1:]) for part in parts]
