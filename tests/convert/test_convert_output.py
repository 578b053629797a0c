"""Output that is whole or absent: full disks, interrupts, --force; and files written in pieces."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_drafters as tiny
from tiny_drafters import apple_config, apple_weights, refused, write
from typer.testing import CliRunner

from mlx_redrafter.cli import convert as command
from mlx_redrafter.cli import main as cli
from mlx_redrafter.convert import convert, writer
from mlx_redrafter.convert.checkpoint import open_checkpoint
from mlx_redrafter.convert.writer import OutputFolder, ShardWriter
from mlx_redrafter.errors import ConvertError

FULL = "elman-6-2"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", apple_weights(FULL), apple_config(FULL))


@contextmanager
def disk_of(size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that takes so many bytes of weights more."""
    create = ShardWriter._create

    class Full:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def write(self, data: Any) -> int:
            if self.stream.tell() + len(data) > size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return int(self.stream.write(data))

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_create", lambda self: Full(create(self)))
        yield


@pytest.mark.parametrize("size", [0, 900, 1400])
def test_a_full_disk(size: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk_of(size, monkeypatch):
        assert refused(source) == (
            f"no space left in {source.parent / 'new'} for out: nothing was kept; free some, or "
            "choose an --out on another disk"
        )


def test_a_disk_full_at_the_last_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: OutputFolder, name: str, content: dict[str, Any]) -> None:
        (self.path / name).touch()
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(OutputFolder, "write_json", full)
    assert refused(source).startswith("no space left")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_disk_that_the_system_calls_full(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardWriter, "_create", lambda self: open("/dev/full", "wb", 0))  # noqa: SIM115
    assert refused(source).startswith("no space left")


def test_a_folder_that_cannot_be_made(source: Path) -> None:
    (source.parent / "file").touch()
    result = CliRunner().invoke(
        cli.app, ["convert", str(source), "--out", str(source.parent / "file" / "out")]
    )
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "nothing was kept" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(number: int, code: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(done: int, total: int) -> None:
        parts = list((source.parent / "new").glob(".out.*.part"))
        assert len(parts) == 1, "the half-made folder is there while it is made"
        os.kill(os.getpid(), number)

    @contextmanager
    def bar() -> Iterator[Callable[[int, int], None]]:
        yield interrupt

    monkeypatch.setattr(command, "_progress_bar", bar)
    out = source.parent / "new" / "out"
    # A shell starts background jobs with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = CliRunner().invoke(cli.app, ["convert", str(source), "--out", str(out)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == code
    assert sorted(path.name for path in source.parent.iterdir()) == ["source"]


def test_an_existing_folder_is_replaced_by_force_alone(source: Path) -> None:
    out = source.parent / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(ConvertError, match="exists; give another folder, or --force to replace"):
        convert(source, out)
    assert (out / "config.json").read_text() == "{}"
    (out / "old.txt").touch()
    convert(source, out, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in source.parent.iterdir()) == ["out", "source"]


def test_what_force_does_not_touch(source: Path) -> None:
    home = source.parent
    with pytest.raises(ConvertError, match="is or holds the source"):
        convert(source, source, force=True)
    with pytest.raises(ConvertError, match="is or holds the source"):
        convert(source / "model.safetensors", home, force=True)
    (home / "photos").mkdir()
    (home / "photos" / "cat.jpg").touch()
    with pytest.raises(ConvertError, match="is not a model folder; remove it yourself"):
        convert(source, home / "photos", force=True)
    (home / "file").touch()
    with pytest.raises(ConvertError, match="is a file"):
        convert(source, home / "file", force=True)
    (home / "empty").mkdir()
    convert(source, home / "empty")


def test_a_failure_keeps_the_folder_that_force_would_replace(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = source.parent / "out"
    convert(source, out)
    before = (out / "model.safetensors").read_bytes()
    with disk_of(900, monkeypatch), pytest.raises(ConvertError, match="no space left"):
        convert(source, out, force=True)
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(ConvertError, match="the disk is gone"):
        convert(source, out, force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in source.parent.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("pending", [300, 10**9])
@pytest.mark.parametrize("most", [None, 2000, 500])
def test_large_files_are_split_and_need_little_memory(
    pending: int, most: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever waits in memory and however files are cut, the same tensors come out."""
    monkeypatch.setattr(writer, "_PENDING_BYTES", pending)
    monkeypatch.setattr(writer, "_HEADER_ROOM", 1024 if most else 4096)
    types = (mx.float32, mx.float16, mx.bfloat16, mx.uint32)
    weights = {f"t{i}": (mx.arange(40 * i + 1).astype(types[i % 4])) for i in range(12)}
    weights |= {"none": mx.zeros((0, 3)), "one": mx.array(2.0), "flags": mx.array([True, False])}
    weights["turned"] = mx.arange(6).reshape(2, 3).T
    waiting = []
    with writer.output_folder(tmp_path / "out", tmp_path / "source") as folder:
        shards = ShardWriter(folder, most)
        for name, value in weights.items():
            shards.add(name, value)
            waiting.append(shards._pending_bytes)
        shards.close()
    largest = max(value.nbytes for value in weights.values())
    assert max(waiting) <= pending + largest
    found: tiny.Weights = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found.update(mx.load(str(file)))  # type: ignore[arg-type]
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name].dtype == value.dtype and mx.array_equal(found[name], value).item()
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (most is not None)
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"].keys() == weights.keys()
        assert content["metadata"]["total_size"] == sum(v.nbytes for v in weights.values())
        assert open_checkpoint(tmp_path / "out").names()
