"""Paths as a user writes them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlx_redrafter.errors import OptionError


def user_path(given: str | os.PathLike[str]) -> Path:
    """With ``~`` and ``~name`` expanded; raises OptionError for what cannot be a path."""
    text = os.fspath(given)
    if "\0" in text:
        raise OptionError(f"{text!r} cannot be a path: leave out the NUL byte")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        name = Path(text).parts[0]
        raise OptionError(
            f"{text} cannot be found, because {name} is nobody's home folder here: give the whole "
            f"path, or ./{name} for a file of that name"
        ) from None


def expanded(value: Path | None) -> Path | None:
    """`user_path` for the callback of an option."""
    return None if value is None else user_path(value)


def write_whole(file: Path, text: str) -> None:
    """Write a file whole, or leave the one that is there as it is. Raises OSError."""
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():  # a device takes what it gets
        file.write_text(text, encoding="utf-8")
        return
    part = file.with_name(f".mlx-redrafter-{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        if file.exists():
            shutil.copymode(file, part)
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
