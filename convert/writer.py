"""Output that appears whole or not at all, and weights files written a tensor at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_redrafter.errors import ConvertError, is_full, one_line

Progress = Callable[[int, int], None]

SHARD_BYTES = 5_000_000_000
# Tensors wait in memory so that a small file gets an exact header; a large one gets room for it.
_PENDING_BYTES = 256_000_000
_HEADER_ROOM = 256 * 1024
_MANY = 500  # names that fit half of that room
_TYPES = {
    mx.float64: "F64", mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16",
    mx.int64: "I64", mx.int32: "I32", mx.int16: "I16", mx.int8: "I8", mx.bool_: "BOOL",
    mx.uint64: "U64", mx.uint32: "U32", mx.uint16: "U16", mx.uint8: "U8",
}  # fmt: skip


def sixteen_bits(stored: Collection[mx.Dtype]) -> mx.Dtype:
    """What float32 becomes beside 4 or 8 bits: float16 if some is stored so, else bfloat16.

    bfloat16 has the range of float32, which activations may need.
    """
    return mx.float16 if mx.float16 in stored else mx.bfloat16


class Written(NamedTuple):
    """A file of the output."""

    name: str
    size: int
    sha256: str


class OutputFolder:
    """A folder under construction; ``path`` is where to put files now."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """A JSON file with the keys in the order given."""
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (self.path / name).write_text(text + "\n", encoding="utf-8")

    def files(self) -> list[Written]:
        """Every file in it with size and SHA-256; reads all of them."""
        found = []
        for path in sorted(p for p in self.path.rglob("*") if p.is_file()):
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256")
            name = path.relative_to(self.path).as_posix()
            found.append(Written(name, path.stat().st_size, digest.hexdigest()))
        return found


def check_output(out: Path, source: Path, force: bool) -> None:
    """May this folder be written? Raises ConvertError, so that it is said before any work."""
    where, given = out.resolve(), source.resolve()
    if where == given or where in given.parents:
        raise ConvertError(f"--out {out} is or holds the source {source}; give another folder")
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir():
        raise ConvertError(f"{out} is a file; give a folder that does not exist yet")
    if not any(out.iterdir()):
        return
    if not force:
        raise ConvertError(f"{out} exists; give another folder, or --force to replace it")
    # What --force deletes must be the kind of thing that is written here.
    if not (out / "config.json").is_file() or out.is_symlink():
        raise ConvertError(f"{out} is not a model folder; remove it yourself if it is not needed")


@contextmanager
def output_folder(out: Path, source: Path, force: bool = False) -> Iterator[OutputFolder]:
    """Work in a folder beside ``out``; rename it at the end, remove it on any failure.

    Raises:
        ConvertError: ``out`` may not be written (see check_output), or the disk is full or
            refuses. Nothing is left behind then, nor after any other error or an interrupt.
    """
    check_output(out, source, force)
    out = out.absolute()
    made = [p for p in (out.parent, *out.parent.parents) if not p.exists()]
    work = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        # mkdtemp is private; a plain mkdir follows the umask.
        inside = work / "new"
        inside.mkdir()
        yield OutputFolder(inside)
        _publish(inside, out, work / "old")
        made = []
    except OSError as error:
        if is_full(error):
            raise ConvertError(
                f"no space left in {out.parent} for {out.name}: nothing was kept; free some, or "
                "choose an --out on another disk"
            ) from error
        raise ConvertError(f"making {out} failed ({one_line(error)}); nothing was kept") from error
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _publish(new: Path, out: Path, old: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise


class ShardWriter:
    """Writes ``model.safetensors``, or numbered files and their index when it grows too large.

    A tensor is evaluated when it is written and forgotten then: at most 256 MB wait in memory.

    Args:
        folder: where to.
        max_bytes: of one file; None: a single file whatever its size.
        metadata: of the files' headers.
    """

    def __init__(
        self,
        folder: OutputFolder,
        max_bytes: int | None = SHARD_BYTES,
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder.path
        self.max_bytes = max_bytes
        self.metadata = {"format": "mlx"} if metadata is None else metadata
        self._pending: list[tuple[str, mx.array]] = []
        self._pending_bytes = 0
        self._parts: list[list[str]] = []
        self._total = self._parameters = 0
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._offset = self._room = 0

    def add(self, name: str, value: mx.array, parameters: int | None = None) -> None:
        """The next tensor of the output; ``parameters``: weights in it, if they are packed."""
        size = value.nbytes
        full = self._offset + self._pending_bytes + size > (self.max_bytes or float("inf"))
        if full and (self._offset or self._pending):
            self._end_part()
        self._pending.append((name, value))
        self._pending_bytes += size
        self._total += size
        self._parameters += value.size if parameters is None else parameters
        if self._pending_bytes > _PENDING_BYTES or (self._file and len(self._pending) >= _MANY):
            self._spill()
            if self.max_bytes and len(json.dumps(self._header)) > self._room // 2:
                self._end_part()

    def close(self) -> None:
        """Finish the last file, give the files their names and write the index."""
        self._end_part()
        if len(self._parts) == 1:
            (self.folder / _part(0)).rename(self.folder / "model.safetensors")
            return
        where = {}
        for number, names in enumerate(self._parts):
            name = f"model-{number + 1:05d}-of-{len(self._parts):05d}.safetensors"
            (self.folder / _part(number)).rename(self.folder / name)
            where.update(dict.fromkeys(names, name))
        index = {
            "metadata": {"total_size": self._total, "total_parameters": self._parameters},
            "weight_map": dict(sorted(where.items())),
        }
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _end_part(self) -> None:
        if self._file is None and not self._pending and self._parts:
            return
        if self._file is None:
            header = self._layout(self._pending, 0)
            with self._create() as stream:
                _write_header(stream, header, self.metadata, None)
                self._write_pending(stream)
            self._header = header
        else:
            self._spill()
            assert self._file is not None
            self._file.seek(0)
            _write_header(self._file, self._header, self.metadata, self._room)
            self._file.close()
        self._parts.append(list(self._header))
        self._file, self._header, self._offset = None, {}, 0

    def _spill(self) -> None:
        """Write what waits to a file whose header comes last."""
        header = self._layout(self._pending, self._offset)
        if self._file is None:
            self._room = max(_HEADER_ROOM, len(json.dumps(header)) // 1024 * 4096)
            self._file = self._create()
            self._file.seek(8 + self._room)
        self._header.update(header)
        self._offset += self._pending_bytes
        self._write_pending(self._file)

    def _create(self) -> BinaryIO:
        return (self.folder / _part(len(self._parts))).open("wb")

    def _layout(self, tensors: list[tuple[str, mx.array]], offset: int) -> dict[str, Any]:
        header = {}
        for name, value in tensors:
            end = offset + value.nbytes
            kind, shape = _TYPES[value.dtype], list(value.shape)
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
            offset = end
        return header

    def _write_pending(self, stream: BinaryIO) -> None:
        self._pending.reverse()
        while self._pending:
            _, value = self._pending.pop()
            stream.write(_data(value))
            del value
        self._pending_bytes = 0
        mx.clear_cache()
        stream.flush()


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _data(value: mx.array) -> memoryview:
    """The bytes of an array, in C order."""
    flat = mx.contiguous(value).reshape(-1)
    if flat.dtype != mx.bool_:
        flat = flat.view(mx.uint8)
    try:
        mx.eval(flat)
    except RuntimeError as error:
        raise ConvertError(f"the source's weights cannot be read ({one_line(error)})") from error
    return np.array(flat, copy=False).data


def _write_header(
    stream: BinaryIO, header: dict[str, Any], metadata: dict[str, str], room: int | None
) -> None:
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    length = room or -(-len(text) // 8) * 8
    assert len(text) <= length, "a file ends before its header outgrows the room left for it"
    stream.write(length.to_bytes(8, "little") + text.ljust(length))
