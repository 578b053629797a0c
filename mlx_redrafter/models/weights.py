"""Reading safetensors files, with one clear line for each way they can be broken."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from ..errors import ModelError

_INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}; needed: an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those its index names, else model*.safetensors."""
    index = folder / _INDEX
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelError(f"{index} has no 'weight_map'; download it again")
        files = [folder / name for name in sorted(set(names.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ModelError(
                f"{folder} lacks {preview(missing)} (named by {_INDEX}); download the missing files"
            )
        return files
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{folder} has no *.safetensors file; needed: a model in safetensors format "
            "(convert other formats first)"
        )
    return files


def read_weights(files: Iterable[Path]) -> dict[str, mx.array]:
    """All tensors of the files, not evaluated yet."""
    weights: dict[str, mx.array] = {}
    for file in files:
        _check_length(file)
        try:
            weights.update(cast(dict[str, mx.array], mx.load(str(file))))
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{file} cannot be read ({_one_line(error)}); download it again"
            ) from error
    return weights


def preview(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _check_length(file: Path) -> None:
    """Compare the header with the file's length: MLX reads lazily and would fail much later."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        needed = 8 + length
        needed += max(
            (v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{file} is not a safetensors file ({_one_line(error)}); download it again"
        ) from error
    if size < needed:
        raise ModelError(f"{file} is truncated: {size} bytes of {needed}; download it again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
