"""Ways to spoil a folder of a model or drafter: each returns what changes it in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Edit = Callable[[Path], None]
# What a clone without Git LFS has in place of a large file, and what a wrong address answers.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 26906\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"


def edit_config(**changes: Any) -> Edit:
    """New values by key; None takes the key away."""

    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            config.pop(key) if value is None else config.update({key: value})
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edits(*several: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for one in several:
            one(folder)

    return edit


def edit_weights(change: Callable[[dict[str, mx.array]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        weights = {k: v + 0 for k, v in mx.load(str(folder / "model.safetensors")).items()}
        mx.eval(weights)
        change(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)

    return edit


def edit_entry(name: str, value: float) -> Edit:
    """The first entry of a tensor."""

    def change(weights: dict[str, mx.array]) -> None:
        array = np.array(weights[name])
        array.flat[0] = value
        weights[name] = mx.array(array)

    return edit_weights(change)


def edit_file(name: str, change: Callable[[bytes], bytes | None]) -> Edit:
    """The file's new bytes; None removes it. A file that is not there has none."""

    def edit(folder: Path) -> None:
        path = folder / name
        data = change(path.read_bytes() if path.exists() else b"")
        path.unlink() if data is None else path.write_bytes(data)

    return edit
