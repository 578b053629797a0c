"""A checkpoint as one list of named tensors, in whatever files they lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_redrafter.convert.shards import GGUF, Shard, TensorInfo, kind_of, open_shard
from mlx_redrafter.errors import ConvertError, ModelError
from mlx_redrafter.models.weights import preview, read_json

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# The first pattern that finds something wins; what Trainer leaves beside the weights is not theirs.
_PATTERNS = (
    "model*.safetensors", "*.safetensors", "pytorch_model*.bin", "model*.pt", "*.bin", "*.pt",
    "*.pth", "*.gguf",
)  # fmt: skip
_NOT_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler")
_PART = re.compile(r"(.*)-(\d{1,5})-of-(\d{1,5})(\.\w+)")


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
                    first = self._tensors[name][0].name
                    raise ConvertError(f"{name} is in both {first} and {file.name} of {folder}")
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

    def nbytes(self, name: str) -> int:
        size = self.dtype(name).size
        for extent in self.shape(name):
            size *= extent
        return size

    def load(self, name: str) -> mx.array:
        """One tensor; from safetensors it is read when it is evaluated. Nothing is kept here."""
        self.dtype(name)
        return self._shard(self._tensors[name][0]).load(name)

    def _shard(self, file: Path) -> Shard:
        if self._open is None or self._open[0] != file:
            self._open = None  # let go of one file before the next is mapped
            self._open = (file, open_shard(file))
        return self._open[1]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder or a file. Headers are read and checked, no data.

    Raises:
        ConvertError: nothing there, a missing, truncated or foreign file, a pickle that is more
            than tensors, an index that leads out of the folder.
    """
    files = weight_files(path)
    folder = path if path.is_dir() else path.parent
    if any(kind_of(file) == GGUF for file in files):
        raise ConvertError(f"{path} is a GGUF file, which no other file can be mixed with")
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        try:
            config = read_json(folder / "config.json")
        except ModelError as error:
            raise ConvertError(str(error)) from None
    return Checkpoint(path, folder, config, files)


def weight_files(path: Path) -> list[Path]:
    """The weights of a folder: the files its index names, else those that look like weights."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConvertError(f"there is no {path}; needed: a checkpoint's folder or file")
    for name in _INDEXES:
        if (path / name).is_file():
            return _indexed(path, path / name)
    for pattern in _PATTERNS:
        found = [f for f in sorted(path.glob(pattern)) if not _NOT_WEIGHTS.search(f.name)]
        if found:
            _refuse_gaps(path, found)
            return found
    raise ConvertError(
        f"{path} holds no weights; needed: *.safetensors, *.bin, *.pt, *.pth or *.gguf"
    )


def _indexed(folder: Path, index: Path) -> list[Path]:
    try:
        names = read_json(index).get("weight_map")
    except ModelError as error:
        raise ConvertError(str(error)) from None
    if not isinstance(names, dict) or not names:
        raise ConvertError(f"{index} has no 'weight_map'; download it again")
    files = sorted({str(name) for name in names.values()})
    # By the name alone: in the Hugging Face cache the files themselves are links to elsewhere.
    outside = [n for n in files if Path(n).is_absolute() or ".." in Path(n).parts or "\\" in n]
    if outside:
        raise ConvertError(
            f"{index} is refused: it points outside its folder, to {preview(outside)}"
        )
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ConvertError(
            f"{folder} lacks {preview(missing)} (named by {index.name}); download the missing files"
        )
    paths = [folder / name for name in files]
    for path in paths:
        promised = {tensor for tensor, name in names.items() if folder / str(name) == path}
        if absent := promised - open_shard(path).tensors.keys():
            raise ConvertError(
                f"{path} lacks {preview(absent)}, which {index.name} says it holds; "
                "download it again"
            )
    return paths


def _refuse_gaps(folder: Path, files: list[Path]) -> None:
    """Files called n-of-m without an index: are they all there?"""
    for match in filter(None, (_PART.fullmatch(file.name) for file in files)):
        stem, _, total, suffix = match.groups()
        width = len(match[2])
        names = [f"{stem}-{i:0{width}}-of-{total}{suffix}" for i in range(1, int(total) + 1)]
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ConvertError(f"{folder} lacks {preview(missing)}; download the missing files")
