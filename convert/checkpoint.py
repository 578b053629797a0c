"""A checkpoint as one list of named tensors, in whatever files they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_redrafter.errors import ConvertError, ModelError
from mlx_redrafter.models.files import SAFETENSORS, TORCH, files_of_kind, heads_among, weights_among
from mlx_redrafter.models.weights import read_json, two_models

from .shards import GGUF, Shard, TensorInfo, kind_of, open_shard


class Checkpoint:
    """The tensors of a checkpoint, by name; made by :func:`open_checkpoint`.

    Only the file that was read last is kept open, so a pass in the order of names() opens every
    file once and needs the memory of one file at most.

    Attributes:
        path: as given: a folder or a file.
        folder: where config.json and the tokenizer are.
        config: of config.json; empty if there is none.
        files: the weights files.
    """

    def __init__(self, path: Path, folder: Path, config: dict[str, Any], files: list[Path]) -> None:
        self.path, self.folder, self.config, self.files = path, folder, config, files
        self._tensors: dict[str, tuple[Path, TensorInfo]] = {}
        self._open: tuple[Path, Shard] | None = None
        for file in files:
            for name, info in self._shard(file).tensors.items():
                if name in self._tensors:
                    raise ConvertError(str(two_models(name, self._tensors[name][0], file)))
                self._tensors[name] = (file, info)

    def names(self) -> list[str]:
        """All tensors, file by file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1].shape

    def dtype(self, name: str) -> mx.Dtype:
        """As stored; ConvertError for a type that MLX does not have (8-bit floats and others)."""
        file, info = self._tensors[name]
        if info.dtype is None:
            raise ConvertError(
                f"{name} in {file} is of type {info.type_name}, which MLX cannot read; "
                "needed: the model in bfloat16, float16 or float32"
            )
        return info.dtype

    def types(self) -> dict[str, mx.Dtype | None]:
        """Names and types of all tensors; None for a type that MLX does not have."""
        return {name: info.dtype for name, (_, info) in self._tensors.items()}

    def load(self, name: str) -> mx.array:
        """One tensor; from safetensors it is read when it is evaluated. Nothing is kept here."""
        self.dtype(name)
        return self._shard(self._tensors[name][0]).load(name)

    def _shard(self, file: Path) -> Shard:
        if self._open is None or self._open[0] != file:
            self._open = None  # let go of one file before the next is mapped
            self._open = (file, open_shard(file))
        return self._open[1]


def open_checkpoint(path: Path, files: list[Path] | None = None) -> Checkpoint:
    """The checkpoint in a folder or a file. Headers are read and checked, no data.

    Args:
        path: the folder or the file.
        files: those of its weights that are meant, if not all.

    Raises:
        ConvertError: nothing there, a missing, truncated or foreign file, a pickle that is more
            than tensors, an index that leads out of the folder.
    """
    files = files or weight_files(path)
    folder = path if path.is_dir() else path.parent
    if any(kind_of(file) == GGUF for file in files):
        raise ConvertError(f"{path} is a GGUF file, which cannot be mixed with other files")
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        try:
            config = read_json(folder / "config.json")
        except ModelError as error:
            raise ConvertError(str(error)) from None
    return Checkpoint(path, folder, config, files)


def heads_files(path: Path) -> list[Path]:
    """Medusa heads in files of their own in a folder, beside a model's or not."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else []
    kinds = (SAFETENSORS, *TORCH)
    return [path / name for name in heads_among(names, [kind.suffix for kind in kinds])]


def model_beside(checkpoint: Checkpoint) -> bool:
    """Do other weights lie in the folder than those that were opened? By the names alone."""
    if checkpoint.path.is_file():
        return False
    names = [file.name for file in checkpoint.path.iterdir()]
    found = [weights_among(names, kind, checkpoint.path) for kind in (SAFETENSORS, *TORCH)]
    weights = next(filter(None, found), [])
    return not {checkpoint.path / name for name in weights} & set(checkpoint.files)


def weight_files(path: Path) -> list[Path]:
    """The weights of a folder, the same as loading takes; of other formats if it has no other."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConvertError(f"there is no {path}; needed: a checkpoint's folder or file")
    try:
        for kind in (SAFETENSORS, *TORCH):
            if files := files_of_kind(path, kind, lambda file: open_shard(file).tensors.keys()):
                return files
    except ModelError as error:
        raise ConvertError(str(error)) from None
    if files := sorted(path.glob("*.gguf")):
        return files
    raise ConvertError(
        f"{path} holds no weights; needed: *.safetensors, *.bin, *.pt, *.pth or *.gguf"
    )
