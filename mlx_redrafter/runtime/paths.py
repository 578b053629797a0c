"""Paths as a user writes them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlx_redrafter.errors import OptionError

BUILTIN = "smollm2-135m"
ASSETS = Path(__file__).parents[1] / "assets"


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


def cache_dir() -> Path:
    """`$MLX_REDRAFTER_CACHE`, else `mlx-redrafter` in the platform's cache folder of the user."""
    return _own_folder("MLX_REDRAFTER_CACHE", "Library/Caches", "XDG_CACHE_HOME", ".cache")


def data_dir() -> Path:
    """`$MLX_REDRAFTER_DATA`, else `mlx-redrafter` in the platform's data folder of the user."""
    mac = "Library/Application Support"
    return _own_folder("MLX_REDRAFTER_DATA", mac, "XDG_DATA_HOME", ".local/share")


def _own_folder(own: str, mac: str, variable: str, usual: str) -> Path:
    if given := os.environ.get(own):
        return user_path(given)
    on_mac = sys.platform == "darwin"
    if not on_mac and (base := os.environ.get(variable)):
        return Path(base) / "mlx-redrafter"
    try:
        return Path.home() / (mac if on_mac else usual) / "mlx-redrafter"
    except RuntimeError:  # a user without a name and without HOME, as in a container
        return Path(tempfile.gettempdir()) / f"mlx-redrafter-{os.getuid()}"


def shipped_drafter() -> Path:
    """The folder of the built-in model's drafter."""
    return ASSETS / f"{BUILTIN}-drafter"


def json_or_nothing(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
