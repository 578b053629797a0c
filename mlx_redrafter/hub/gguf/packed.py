"""GGUF blocks as MLX's packed weights: kept as they are where MLX has the same form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_redrafter.hub.gguf.blocks import Array, blocks_of, dequantise, levels, nibbles

if TYPE_CHECKING:
    import mlx.core as mx

GROUP = 32
"""MLX quantises these in groups of so many columns."""


class Form(NamedTuple):
    """How MLX holds a type: `same` values (scales of six bits times a float16 need 32), or the
    nearest that it has, with so many bits more that the rounding is small beside that of the file.
    """

    bits: int
    mode: str = "affine"
    same: bool = True


# No rounding, with scales of 16 bits too.
KEPT: dict[str, Form] = {
    "Q4_0": Form(4),
    "Q4_1": Form(4),
    "Q5_0": Form(5),
    "Q5_1": Form(5),
    "Q8_0": Form(8),
    "MXFP4": Form(4, "mxfp4"),
}
ALL: dict[str, Form] = {
    **KEPT,
    "Q4_K": Form(4),
    "Q5_K": Form(5),
    "Q2_K": Form(4, same=False),
    "Q3_K": Form(5, same=False),
    "Q6_K": Form(8, same=False),
    "IQ4_NL": Form(6, same=False),
    "IQ4_XS": Form(6, same=False),
}


def repack(kind: str, data: Array, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Stored rows, uint8 (R, row bytes), of a type of ALL -> MLX's arrays by name.

    weight uint32 (R, C * bits / 32), scales (R, C / 32), and biases of that shape where the mode
    is affine. Scales and biases have the dtype, which must be float32 for those of K-quants to be
    exact.
    """
    import mlx.core as mx

    form, rows = ALL[kind], len(data)
    if form.mode == "mxfp4":
        blocks = blocks_of(kind, data)
        words = _words(nibbles(blocks[:, 1:]).reshape(rows, -1), form.bits)
        exponents = np.ascontiguousarray(blocks[:, :1]).reshape(rows, -1)
        return {"weight": mx.array(words), "scales": mx.array(exponents)}
    if not form.same:
        values = mx.array(dequantise(kind, data)).astype(dtype)
        packed = mx.quantize(values, GROUP, form.bits)
        return dict(zip(("weight", "scales", "biases"), packed, strict=True))
    found = levels(kind, data)
    biases = np.float32(-found.zero) * found.scales
    if found.low is not None:
        biases -= found.low
    return {
        "weight": mx.array(_words(found.values.reshape(rows, -1), form.bits)),
        "scales": mx.array(found.scales.reshape(rows, -1)).astype(dtype),
        "biases": mx.array(biases.reshape(rows, -1)).astype(dtype),
    }


def _words(values: Array, bits: int) -> Array:
    """uint8 (R, C) below 2 ** bits -> uint32 (R, C * bits / 32), lowest bits first."""
    if bits == 4:
        values = values[:, 0::2] | values[:, 1::2] << 4
    elif bits < 8:
        each = np.unpackbits(values[..., None], axis=-1, bitorder="little")[..., :bits]
        values = np.packbits(each.reshape(len(values), -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(values).view("<u4").astype(np.uint32)


def quantisation_block(forms: Mapping[str, Form]) -> dict[str, Any]:
    """mlx-lm's `quantization` block of layers by name: the lowest affine width is the default,
    others are listed."""
    affine = [form.bits for form in forms.values() if form.mode == "affine"]
    usual = Form(min(affine)) if affine else next(iter(forms.values()))
    block = _params(usual)
    for name, form in forms.items():
        if _params(form) != _params(usual):
            block[name] = _params(form)
    return block


def _params(form: Form) -> dict[str, Any]:
    mode = {} if form.mode == "affine" else {"mode": form.mode}
    return {"group_size": GROUP, "bits": form.bits, **mode}
