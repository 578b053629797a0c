"""The block formats of GGUF tensors, dequantised to float32.

Layouts: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml. Every product below
fits into a float32 mantissa, so the order of operations does not matter to the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


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
    "IQ4_NL": Block(20, 32, 18),
    "IQ4_XS": Block(23, 256, 136),
    "MXFP4": Block(39, 32, 17),
}
# Of an IQ4 nibble, and of a 4-bit float (twice its value).
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class Levels(NamedTuple):
    """Blocks as scales (B, G, 1) times (values (B, G, n) - zero), less low (B, G, 1): B blocks of G
    groups of n elements. Values are uint8."""

    values: Array
    scales: Array
    zero: int = 0
    low: Array | None = None


def dequantise(kind: str, data: Array) -> Array:
    """Stored rows, uint8 (R, row bytes), -> float32 (R, C)."""
    if kind == "F32":
        return data.view("<f4").astype(np.float32)
    if kind == "F16":
        return data.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind in _TABLES:
        return _looked_up(kind, blocks_of(kind, data)).reshape(len(data), -1)
    found = levels(kind, data)
    values = found.values.astype(np.float32)
    result = found.scales * (values - np.float32(found.zero) if found.zero else values)
    if found.low is not None:
        result -= found.low
    return result.reshape(len(data), -1)


def blocks_of(kind: str, data: Array) -> Array:
    """Stored rows (R, row bytes) -> blocks (B, block bytes)."""
    return data.reshape(-1, BLOCKS[kind].bytes)


def levels(kind: str, data: Array) -> Levels:
    """Stored rows (R, row bytes) of a type whose levels are evenly spaced."""
    blocks = blocks_of(kind, data)
    found = _LEVELS[kind](blocks)
    scales = found.scales.reshape(len(blocks), -1, 1)
    low = None if found.low is None else found.low.reshape(scales.shape)
    values = found.values.reshape(*scales.shape[:2], -1)
    return Levels(values, scales, found.zero, low)


def nibbles(data: Array) -> Array:
    """(..., n) bytes -> (..., 2n): all low halves, then all high ones."""
    return np.concatenate([data & 15, data >> 4], -1)


def _full(blocks: Array, at: int) -> Array:
    """The float16 at a byte of every block, as float32: (B, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _bits(data: Array, width: int) -> Array:
    """(B, ..., n) bytes -> (B, ..., 8/width, n): the first bits of all bytes, then the next."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return data[..., None, :] >> shifts & (2**width - 1)


def _fifth_bits(data: Array) -> Array:
    """(B, 4) bytes -> (B, 32): 16 where an element's fifth bit is set."""
    return np.unpackbits(data, axis=-1, bitorder="little") << 4


def _q4_0(b: Array) -> Levels:
    return Levels(nibbles(b[:, 2:]), _full(b, 0), 8)


def _q4_1(b: Array) -> Levels:
    return Levels(nibbles(b[:, 4:]), _full(b, 0), 0, -_full(b, 2))


def _q5_0(b: Array) -> Levels:
    return Levels(nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]), _full(b, 0), 16)


def _q5_1(b: Array) -> Levels:
    return Levels(nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), _full(b, 0), 0, -_full(b, 2))


def _q8_0(b: Array) -> Levels:
    return Levels(b[:, 2:] ^ 0x80, _full(b, 0), 128)


def _q2_k(b: Array) -> Levels:
    values = _bits(b[:, 16:80].reshape(-1, 2, 32), 2)
    return Levels(values, _full(b, 80) * (b[:, :16] & 15), 0, _full(b, 82) * (b[:, :16] >> 4))


def _q3_k(b: Array) -> Levels:
    low = _bits(b[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 256)
    high = _bits(b[:, :32], 1).reshape(-1, 256)
    # A clear high bit means 4 less; scales are six bits around 32, their upper two kept apart.
    scales = nibbles(b[:, 96:104]) | _bits(b[:, 104:108], 2).reshape(-1, 16) << 4
    return Levels(low | high << 2, _full(b, 108) * (scales.astype(np.float32) - 32), 4)


def _six_bit_pairs(data: Array) -> tuple[Array, Array]:
    """(B, 12) bytes -> scales and minima of Q4_K and Q5_K, six bits each: (B, 8) and (B, 8)."""
    first, second, third = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], -1)
    return scales, np.concatenate([second & 63, third >> 4 | second >> 6 << 4], -1)


def _q4_k(b: Array) -> Levels:
    scales, minima = _six_bit_pairs(b[:, 4:16])
    values = nibbles(b[:, 16:].reshape(-1, 4, 32))
    return Levels(values, _full(b, 0) * scales, 0, _full(b, 2) * minima)


def _q5_k(b: Array) -> Levels:
    scales, minima = _six_bit_pairs(b[:, 4:16])
    values = nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256)
    values = values | _bits(b[:, 16:48], 1).reshape(-1, 256) << 4
    return Levels(values, _full(b, 0) * scales, 0, _full(b, 2) * minima)


def _q6_k(b: Array) -> Levels:
    low = nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    high = _bits(b[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 256)
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return Levels(low | high << 4, _full(b, 208) * scales, 32)


_LEVELS: dict[str, Callable[[Array], Levels]] = {
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
# Types whose levels are a table's: it, and where the nibbles of a block begin.
_TABLES: dict[str, tuple[tuple[int, ...], int]] = {
    "IQ4_NL": (_IQ4, 2),
    "IQ4_XS": (_IQ4, 8),
    "MXFP4": (_FP4, 1),
}


def _looked_up(kind: str, b: Array) -> Array:
    table, at = _TABLES[kind]
    values = np.array(table, np.float32)[nibbles(b[:, at:].reshape(len(b), -1, 16))]
    if kind == "MXFP4":
        return values * _half_powers(b[:, :1])[..., None]
    if kind == "IQ4_NL":
        return values * _full(b, 0)[..., None]
    low = _pairs(b[:, 4:8])
    high = _bits(np.ascontiguousarray(b[:, 2:4, None]), 2).reshape(len(b), 8)
    scales = (low | high << 4).astype(np.float32) - 32
    return values * (_full(b, 0) * scales)[..., None]


def _pairs(data: Array) -> Array:
    """(B, n) bytes -> (B, 2n): low half and high half of every byte in turn."""
    return np.stack([data & 15, data >> 4], -1).reshape(len(data), -1)


def _half_powers(exponents: Array) -> Array:
    """2 ** (e - 128) of uint8 exponents; the two smallest are subnormal."""
    e = exponents.astype(np.uint32)
    bits = np.where(e < 2, np.uint32(0x200000) << e, (np.maximum(e, 1) - 1) << np.uint32(23))
    return bits.astype(np.uint32).view(np.float32)
