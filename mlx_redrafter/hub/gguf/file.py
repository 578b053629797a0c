"""The GGUF container: metadata, the list of tensors, and their bytes, read piece by piece.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mlx_redrafter.errors import ConvertError, ModelError, one_line
from mlx_redrafter.hub.gguf import values
from mlx_redrafter.hub.gguf.blocks import BLOCKS

# value type -> numpy's name; 8 is a string and 9 an array.
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_VERSIONS = (2, 3)


class GgufTensor(NamedTuple):
    """Where a tensor lies. `shape` is in MLX's order (rows first), `kind` a type of BLOCKS."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; blocks never cross a row."""
        block = BLOCKS[self.kind]
        return self.shape[-1] // block.elements * block.bytes

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class GgufFile:
    """A GGUF file whose header is read; tensors stay on the disk until `read`.

    Raises ConvertError for a file that is no GGUF, is truncated, or holds other block types.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with self.path.open("rb") as stream:
                self._read_header(_Reader(stream))
        except ConvertError:
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ConvertError(f"{self.path} cannot be read ({reason})") from error
        except (ValueError, KeyError, OverflowError) as error:
            raise ConvertError(
                f"{self.path} is not a readable GGUF file ({one_line(error)}); download it again"
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value, or `default`."""
        return self.metadata.get(key, default)

    def read(self, tensor: GgufTensor, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Rows of a tensor as stored: uint8 (rows, row_bytes). Raises ConvertError."""
        rows = tensor.rows - first if rows is None else rows
        size = rows * tensor.row_bytes
        with self.path.open("rb") as stream:
            stream.seek(tensor.offset + first * tensor.row_bytes)
            data = np.fromfile(stream, np.uint8, size)
        if data.size < size:
            raise ConvertError(f"{self.path} ends within {tensor.name}; download it again")
        return data.reshape(rows, tensor.row_bytes)

    def _read_header(self, reader: _Reader) -> None:
        self._refuse_others(reader)
        tensors, pairs = reader.u64(), reader.u64()
        for _ in range(pairs):
            key = reader.text()
            self.metadata[key] = reader.value(reader.u32())
        try:
            values.check(self.metadata)
        except ConvertError as error:
            raise ConvertError(
                f"the metadata of {self.path} makes no sense: {error}; download it again"
            ) from None
        if self.get("split.count", 1) > 1:
            raise ConvertError(
                f"{self.path} is one of {self.get('split.count')} parts of a split GGUF file; "
                "join them first: llama-gguf-split --merge FIRST_PART OUT"
            )
        found = [self._tensor(reader) for _ in range(tensors)]
        alignment = self.get("general.alignment", 32)
        start = -(-reader.stream.tell() // alignment) * alignment
        for tensor in found:
            if tensor.offset % alignment:
                raise ValueError(f"{tensor.name} does not begin at a multiple of {alignment}")
            end = start + tensor.offset + tensor.rows * tensor.row_bytes
            if end > reader.size:
                raise ConvertError(
                    f"{self.path} is truncated: {tensor.name} ends at byte {end} of a file of "
                    f"{reader.size}; download it again"
                )
            self.tensors[tensor.name] = tensor._replace(offset=start + tensor.offset)
        if len(self.tensors) != tensors:
            raise ValueError("two tensors have the same name")

    def _refuse_others(self, reader: _Reader) -> None:
        """Say what it is instead, where that can be told from the first bytes."""
        from mlx_redrafter.models.weights import refuse_stand_in

        try:
            refuse_stand_in(self.path)
        except ModelError as error:
            raise ConvertError(str(error)) from None
        if reader.take(4) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        version = reader.u32()
        if version in _VERSIONS:
            return
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
            raise ConvertError(
                f"{self.path} is a big-endian GGUF file; needed: a little-endian one "
                "(gguf-convert-endian of the Python package gguf makes one)"
            )
        hint = "download a newer one" if version == 1 else "update mlx-redrafter"
        raise ConvertError(
            f"{self.path} is of GGUF version {version}; needed: version 2 or 3: {hint}"
        )

    def _tensor(self, reader: _Reader) -> GgufTensor:
        name, dimensions = reader.text(), reader.u32()
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(reader.u64() for _ in range(dimensions))[::-1]
        number, offset = reader.u32(), reader.u64()
        kind = next((kind for kind, block in BLOCKS.items() if block.number == number), None)
        if kind is None:
            raise ConvertError(
                f"{self.path} stores {name} in GGUF type {number}, which is not read; "
                f"needed: one of {', '.join(BLOCKS)}"
            )
        if shape[-1] % BLOCKS[kind].elements or 0 in shape:
            raise ValueError(f"{name} of shape {shape} cannot be {kind}")
        return GgufTensor(name, kind, shape, offset)


class _Reader:
    """Little-endian values one after the other; whatever exceeds the file is a ValueError."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.size = os.fstat(stream.fileno()).st_size

    def take(self, size: int) -> bytes:
        data = self.stream.read(size) if size <= self.size else b""
        if len(data) < size:
            raise ValueError("it ends within the header")
        return data

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self, errors: str = "replace") -> str:
        # Some vocabularies hold pieces that are no UTF-8: they must not stop the conversion.
        return self.take(self.u64()).decode("utf-8", errors)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text("surrogateescape")
        if kind == _ARRAY:
            inner, count = self.u32(), self.u64()
            if inner in _SCALARS:
                data = self.take(count * _SCALARS[inner].itemsize)
                return np.frombuffer(data, _SCALARS[inner]).tolist()
            if inner != _STRING:
                raise ValueError(f"an array of values of type {inner}")
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        return np.frombuffer(self.take(_SCALARS[kind].itemsize), _SCALARS[kind])[0].item()
