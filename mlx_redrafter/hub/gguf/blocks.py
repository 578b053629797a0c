"""The block formats of GGUF tensors: dequantised to float32, or repacked as MLX quantisation.

Layouts: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml. Every product below
fits into a float32 mantissa, so the order of operations does not matter to the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
# MLX quantises these in groups of as many columns as their blocks have.
GROUP = 32


class Block(NamedTuple):
    """A GGUF type: its number in files, and how many bytes hold how many elements."""

    number: int
    elements: int
    bytes: int


BLOCKS: dict[str, Block] = {
    "F32": Block(0, 1, 4),
    "F16": Block(1, 1, 2),
    "BF16": Block(30, 1, 2),
    "Q4_0": Block(2, 32, 18),
    "Q4_1": Block(3, 32, 20),
    "Q5_0": Block(6, 32, 22),
    "Q5_1": Block(7, 32, 24),
    "Q8_0": Block(8, 32, 34),
    "Q2_K": Block(10, 256, 84),
    "Q3_K": Block(11, 256, 110),
    "Q4_K": Block(12, 256, 144),
    "Q5_K": Block(13, 256, 176),
    "Q6_K": Block(14, 256, 210),
}
# What has an MLX equal, and its bits.
KEPT_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


def dequantise(kind: str, data: Array) -> Array:
    """Stored rows, uint8 (R, row bytes), -> float32 (R, C)."""
    if kind == "F32":
        return data.view("<f4").astype(np.float32)
    if kind == "F16":
        return data.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = data.reshape(-1, BLOCKS[kind].bytes)
    return _UNPACK[kind](blocks).reshape(len(data), -1)


def repack(kind: str, data: Array) -> tuple[Array, Array, Array]:
    """Stored rows of a type of KEPT_BITS -> MLX's weight, scales and biases; nothing is rounded.

    uint32 (R, C * bits / 32), float16 (R, C / 32), float16 (R, C / 32): q * scale + bias.
    """
    blocks = data.reshape(-1, BLOCKS[kind].bytes)
    scales = _half(blocks, 0)
    if kind == "Q8_0":
        values = blocks[:, 2:] ^ 0x80
        biases = scales * np.float16(-128)
    else:
        biases = _half(blocks, 2) if kind == "Q4_1" else scales * np.float16(-8)
        values = _nibbles(blocks[:, 4 if kind == "Q4_1" else 2 :])
        values = values[:, 0::2] | values[:, 1::2] << 4
    rows = len(data)
    packed = np.ascontiguousarray(values).view("<u4").astype(np.uint32)
    return packed.reshape(rows, -1), scales.reshape(rows, -1), biases.reshape(rows, -1)


def _half(blocks: Array, at: int) -> Array:
    """The float16 at a byte of every block: (B, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float16)


def _full(blocks: Array, at: int) -> Array:
    return _half(blocks, at).astype(np.float32)


def _nibbles(data: Array) -> Array:
    """(..., n) bytes -> (..., 2n): all low halves, then all high ones."""
    return np.concatenate([data & 15, data >> 4], -1)


def _bits(data: Array, width: int) -> Array:
    """(B, ..., n) bytes -> (B, ..., 8/width, n): the first bits of all bytes, then the next."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return data[..., None, :] >> shifts & (2**width - 1)


def _fifth_bits(data: Array) -> Array:
    """(B, 4) bytes -> (B, 32): 16 where an element's fifth bit is set."""
    return np.unpackbits(data, axis=-1, bitorder="little") << 4


def _q4_0(b: Array) -> Array:
    return _full(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Array) -> Array:
    return _full(b, 0) * _nibbles(b[:, 4:]) + _full(b, 2)


def _q5_0(b: Array) -> Array:
    return _full(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).astype(np.float32) - 16)


def _q5_1(b: Array) -> Array:
    return _full(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])) + _full(b, 2)


def _q8_0(b: Array) -> Array:
    return _full(b, 0) * b[:, 2:].view(np.int8)


def _scaled(scale: Array, values: Array, low: Array | None = None) -> Array:
    """scale (B, G), values (B, 256) in G groups, low (B, G) subtracted -> (B, G, 256 / G)."""
    result = scale[..., None] * values.reshape(*scale.shape, -1)
    return result if low is None else result - low[..., None]


def _q2_k(b: Array) -> Array:
    values = _bits(b[:, 16:80].reshape(-1, 2, 32), 2)
    return _scaled(_full(b, 80) * (b[:, :16] & 15), values, _full(b, 82) * (b[:, :16] >> 4))


def _q3_k(b: Array) -> Array:
    low = _bits(b[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    high = _bits(b[:, :32], 1).reshape(-1, 256)
    # A clear high bit means 4 less; scales are six bits around 32, their upper two kept apart.
    values = (low | high << 2).astype(np.float32) - 4
    scales = _nibbles(b[:, 96:104]) | _bits(b[:, 104:108], 2).reshape(-1, 16) << 4
    return _scaled(_full(b, 108) * (scales.astype(np.float32) - 32), values)


def _six_bit_pairs(data: Array) -> tuple[Array, Array]:
    """(B, 12) bytes -> scales and minima of Q4_K and Q5_K, six bits each: (B, 8) and (B, 8)."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], -1)
    return scales, np.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1)


def _q4_k(b: Array) -> Array:
    scales, minima = _six_bit_pairs(b[:, 4:16])
    values = _nibbles(b[:, 16:].reshape(-1, 4, 32))
    return _scaled(_full(b, 0) * scales, values, _full(b, 2) * minima)


def _q5_k(b: Array) -> Array:
    scales, minima = _six_bit_pairs(b[:, 4:16])
    values = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256)
    values = values | _bits(b[:, 16:48], 1).reshape(-1, 256) << 4
    return _scaled(_full(b, 0) * scales, values, _full(b, 2) * minima)


def _q6_k(b: Array) -> Array:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = _bits(b[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    values = (low | high << 4).astype(np.float32) - 32
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return _scaled(_full(b, 208) * scales, values)


_UNPACK: dict[str, Callable[[Array], Array]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
