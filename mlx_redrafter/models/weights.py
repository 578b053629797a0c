"""Reading and checking weights, with one clear line for each way their files can be broken."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelError

Shape = tuple[int, ...]

_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml")


def refuse_stand_in(path: Path) -> None:
    """ModelError if a Git LFS pointer or a web page lies where a model's file should be.

    Any other file passes, one that is missing too: its own reader says what is wrong with it.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    except OSError:
        return
    if start.startswith(_POINTER):
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, "
            "or download it again"
        )
    if start.startswith(_PAGES):
        raise ModelError(f"{path} is a web page, not the file itself; download it again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ModelError if it is not one."""
    refuse_stand_in(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}; needed: an object")
    return value


def read_weights(files: Iterable[Path]) -> dict[str, mx.array]:
    """All tensors of the files, not evaluated yet. Raises ModelError, also for a doubled one."""
    weights: dict[str, mx.array] = {}
    held: dict[str, Path] = {}
    for file in files:
        for name in read_header(file):  # MLX reads lazily and would fail much later
            if name in held:
                raise two_models(name, held[name], file)
            held[name] = file
        try:
            weights.update(cast(dict[str, mx.array], mx.load(str(file))))
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"{file} cannot be read ({_one_line(error)}); download it again"
            ) from error
    return weights


def two_models(name: str, first: Path, second: Path) -> ModelError:
    """The refusal of a folder in which two files hold the same tensor."""
    return ModelError(
        f"{name} is in both {first.name} and {second.name} of {first.parent}, as if two models "
        "lay there; keep the files of one"
    )


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """The tensors of a module by their names in a checkpoint."""
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(module.parameters())))


def shapes(tensors: Mapping[str, mx.array]) -> dict[str, Shape]:
    """Every tensor's shape, by its name."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


class Misfit(NamedTuple):
    """How tensors differ from those of a model; what has another shape, with both shapes."""

    missing: set[str]
    extra: set[str]
    misshapen: list[str]

    def names(self, extra: str) -> str:
        """Which are missing and which are not the model's; ``extra`` says the latter, with {}."""
        parts = [f"lacks {preview(self.missing)}"] if self.missing else []
        parts += [extra.format(preview(self.extra))] if self.extra else []
        return " and ".join(parts)


def misfit(expected: Mapping[str, Shape], given: Mapping[str, Shape]) -> Misfit:
    """Compare names, and the shapes of what is in both."""
    wrong = [
        f"{name} {given[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    return Misfit(expected.keys() - given.keys(), given.keys() - expected.keys(), wrong)


def finite(tensors: Mapping[str, mx.array], prefix: str = "") -> dict[str, mx.array]:
    """For each floating tensor a lazy flag: no NaN, no infinity. float32 sums cannot overflow, and
    infinities of both signs add up to NaN."""
    return {
        prefix + name: mx.isfinite(value.astype(mx.float32).sum())
        for name, value in tensors.items()
        if mx.issubdtype(value.dtype, mx.floating)
    }


def materialise(module: nn.Module, flags: Mapping[str, mx.array], folder: Path) -> None:
    """Read a module's weights; flags: see `finite`. Raises ModelError."""
    try:
        mx.eval(module.parameters(), flags)
    except RuntimeError as error:
        raise ModelError(f"weights in {folder} cannot be read ({error})") from error
    broken = [name for name, flag in flags.items() if not flag.item()]
    if broken:
        raise ModelError(
            f"weights in {folder} hold NaN or infinity: {preview(broken)}; download the model again"
        )


def preview(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, name -> dtype, shape and data_offsets; no data is read.

    Raises ModelError: another kind of file, or one that ends before its last tensor.
    """
    refuse_stand_in(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        needed = 8 + length + max((v["data_offsets"][1] for v in header.values()), default=0)
    except OSError as error:
        raise ModelError(f"{file} cannot be read ({_one_line(error)})") from error
    except (
        ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError,
    ) as error:  # fmt: skip
        raise ModelError(
            f"{file} is not a safetensors file ({_one_line(error)}); download it again"
        ) from error
    if size < needed:
        raise ModelError(f"{file} is truncated: {size} bytes of {needed}; download it again")
    return cast(dict[str, Any], header)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
