"""One weights file: the names, shapes and types of its tensors, and their values on demand."""

from __future__ import annotations

import ctypes
import math
import mmap
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_redrafter.errors import ConvertError, ModelError, one_line
from mlx_redrafter.models.weights import read_header

_LONGEST_HEADER = 100_000_000  # of the format's own reader
SAFETENSORS, TORCH, GGUF = "safetensors", "torch", "gguf"

# 64-bit floats are left out: MLX has them on the CPU only.
_SAFETENSORS_TYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16,
    "I64": mx.int64, "I32": mx.int32, "I16": mx.int16, "I8": mx.int8, "BOOL": mx.bool_,
    "U64": mx.uint64, "U32": mx.uint32, "U16": mx.uint16, "U8": mx.uint8,
}  # fmt: skip
_TORCH_TYPES = {
    "float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16,
    "int64": mx.int64, "int32": mx.int32, "int16": mx.int16, "int8": mx.int8, "bool": mx.bool_,
    "uint64": mx.uint64, "uint32": mx.uint32, "uint16": mx.uint16, "uint8": mx.uint8,
}  # fmt: skip
_PIECE = 64_000_000
# Trainers put the tensors under one of these, beside the state of the optimiser.
_STATE_DICTS = ("state_dict", "model_state_dict", "module", "model")


class TensorInfo(NamedTuple):
    """What is known of a tensor without its data; type_name is the file's own word."""

    shape: tuple[int, ...]
    type_name: str
    dtype: mx.Dtype | None  # None: a type MLX does not have


class Shard(Protocol):
    """An open weights file."""

    tensors: dict[str, TensorInfo]

    def load(self, name: str) -> mx.array:
        """The values of one tensor; safetensors are read when MLX evaluates it."""
        ...


def kind_of(path: Path) -> str:
    """safetensors, torch or gguf, from the first bytes: names say little.

    What is called .gguf and begins otherwise is a damaged GGUF file, or something in its place.
    """
    with path.open("rb") as stream:
        start = stream.read(8)
    if start.startswith(b"GGUF") or path.suffix.lower() == ".gguf":
        return GGUF
    # safetensors begin with the length of their header, which may look like either mark below.
    if len(start) == 8 and int.from_bytes(start, "little") <= _LONGEST_HEADER:
        return SAFETENSORS
    # A zip archive, or the bare pickle that torch wrote before version 1.6.
    return TORCH if start.startswith((b"PK\x03\x04", b"\x80")) else SAFETENSORS


def open_shard(path: Path) -> Shard:
    """Read what a weights file says about itself; raises ConvertError."""
    return TorchShard(path) if kind_of(path) == TORCH else SafetensorsShard(path)


class SafetensorsShard:
    """A safetensors file, its header checked against its length and its shapes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            header = read_header(path)
        except ModelError as error:
            raise ConvertError(str(error)) from None
        self.tensors = {name: self._info(name, entry) for name, entry in header.items()}
        self._arrays: dict[str, mx.array] = {}

    def load(self, name: str) -> mx.array:
        # Handed out once: an array kept here would hold its data after it was written.
        if name not in self._arrays:
            try:
                self._arrays = mx.load(str(self.path), format="safetensors")  # type: ignore[assignment]
            except (RuntimeError, ValueError) as error:
                raise ConvertError(f"{self.path} cannot be read ({one_line(error)})") from error
        return self._arrays.pop(name)

    def _info(self, name: str, entry: dict[str, Any]) -> TensorInfo:
        try:
            kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            dtype = _SAFETENSORS_TYPES.get(kind)
            sound = end - start == math.prod(shape) * dtype.size if dtype else end >= start
            if not sound or start < 0 or min(shape, default=0) < 0:
                raise ValueError(f"{shape} of {kind} in {end - start} bytes")
        except (KeyError, TypeError, ValueError) as error:
            raise ConvertError(
                f"{self.path} is damaged: the header's entry of {name} makes no sense "
                f"({one_line(error)}); download it again"
            ) from error
        return TensorInfo(shape, kind, dtype)


class TorchShard:
    """A file of torch.save, unpickled by torch's reader that builds tensors and runs nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            self._mapped = stream.read(2) == b"PK"  # the old format cannot be mapped
        self._values = _flatten(_load_torch(path, self._mapped))
        self.tensors = {name: self._info(name, value) for name, value in self._values.items()}
        if not self.tensors:
            raise ConvertError(f"{path} holds no tensors; needed: the weights of a model")

    def load(self, name: str) -> mx.array:
        value = self._values[name].detach().contiguous()
        dtype = _TORCH_TYPES[str(value.dtype).removeprefix("torch.")]
        if dtype == mx.bfloat16:  # numpy has no such type
            import torch

            return _copied(value.view(torch.int16).numpy(), self._mapped).view(dtype)
        return _copied(value.numpy(), self._mapped)

    def _info(self, name: str, value: Any) -> TensorInfo:
        import torch

        if value.layout != torch.strided or value.is_quantized:
            raise ConvertError(f"{name} in {self.path} is sparse or quantised by torch: not read")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ConvertError(
                f"{self.path} is damaged: {name} claims {tuple(value.shape)}, more than is stored"
            )
        kind = str(value.dtype).removeprefix("torch.")
        return TensorInfo(tuple(value.shape), kind, _TORCH_TYPES.get(kind))


def _copied(values: np.ndarray[Any, Any], mapped: bool) -> mx.array:
    """An array of the same values; a mapped file is let go of piece by piece, as it is copied.

    The pages of the mapping would count as memory beside the copy, twice the size in all.
    """
    if not mapped or values.nbytes <= _PIECE:
        return mx.array(values)
    flat = values.reshape(-1)
    result = mx.zeros(flat.shape, _TORCH_TYPES[flat.dtype.name])
    mx.eval(result)
    target = np.array(result, copy=False)
    step = _PIECE // flat.itemsize
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        target[start : start + step] = piece
        _let_go(piece)
    return result.reshape(values.shape)


def _let_go(piece: np.ndarray[Any, Any]) -> None:
    """Tell the system that these pages of a file are not needed; they would be read again."""
    page = mmap.PAGESIZE
    first = -(-piece.ctypes.data // page) * page
    length = (piece.ctypes.data + piece.nbytes - first) // page * page
    if length > 0:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _load_torch(path: Path, mapped: bool) -> Any:
    try:
        import torch
    except ImportError:
        raise ConvertError(
            f"{path} is a PyTorch pickle, and PyTorch is not installed: "
            "pip install 'mlx-redrafter[torch]', or take the safetensors version of the model"
        ) from None
    if path.suffix == ".safetensors":
        raise ConvertError(f"{path} is refused: it is a pickle under the name of safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of odd pickles
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(
            r"(?:GLOBAL|global|class):? `?([\w.]+\.\w+)", " ".join(str(error).split())
        )
        would = f"would call {found[1]}" if found else "needs more than tensors"
        raise ConvertError(
            f"{path} is refused: unpickling it {would}, which could run code; nothing was run: "
            "take the safetensors version of the model"
        ) from None
    except Exception as error:
        raise ConvertError(
            f"{path} is truncated or not a file of torch.save ({one_line(error)}); "
            "download it again"
        ) from None


def _flatten(loaded: Any) -> dict[str, Any]:
    """Nested dictionaries -> dotted names of their tensors; other values are not weights."""
    import torch

    if not isinstance(loaded, Mapping):
        return {}
    for key in _STATE_DICTS:
        inner = loaded.get(key)
        if isinstance(inner, Mapping) and any(torch.is_tensor(v) for v in inner.values()):
            loaded = inner
            break
    result: dict[str, Any] = {}
    for key, value in loaded.items():
        if torch.is_tensor(value):
            result[str(key)] = value
        elif isinstance(value, Mapping):
            result.update({f"{key}.{name}": inner for name, inner in _flatten(value).items()})
    return result
