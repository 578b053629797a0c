"""Trained drafters, kept in the user's data folder by the weights of the model they are for.

    DATA/drafters/NAME-HASH/RUN/    the drafter's own files, and kept.json

NAME is for people; HASH is found again wherever the model's folder is moved or copied to, and is
another for another revision. RUN is the training folder, which has one drafter here at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from mlx_redrafter.drafters.loading import check_folder, inside_model
from mlx_redrafter.errors import DrafterError, HubError, ModelError, OptionError, one_line
from mlx_redrafter.models import Target, config_of
from mlx_redrafter.models.files import weight_files
from mlx_redrafter.models.weights import read_header, read_json
from mlx_redrafter.runtime.paths import data_dir, json_or_nothing, shipped_drafter

FILE = "kept.json"
_SAMPLE = 64  # bytes, at the start, the middle and the end of every tensor
_SHORT = 16  # digits of the hash in a folder's name


def fingerprint(folder: Path) -> str:
    """Hash of a model's weights: names, types and shapes of all tensors, and a few bytes of each.

    It does not depend on where the folder is, nor on how the tensors are split over files.
    Raises ModelError.
    """
    found = {}
    for file in weight_files(folder):
        header = read_header(file)
        with file.open("rb") as stream:
            data = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                parts = []
                for at in (start, (start + stop) // 2, max(start, stop - _SAMPLE)):
                    stream.seek(data + at)
                    parts.append(stream.read(min(_SAMPLE, stop - at)).hex())
                found[name] = [entry["dtype"], entry["shape"], parts]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def keep(drafter: Path, name: str, weights: str, run: Path, began: datetime) -> Path:
    """Copy a finished drafter into the data folder, in place of an earlier one of the same run.

    Args:
        name: of the model, as people know it.
        weights: fingerprint of the model.
        run, began: the training folder and when it was begun, which tell runs apart.

    Returns its folder there. Raises HubError: the data folder cannot be written.
    """
    facts = {
        "model": name,
        "weights": weights,
        "trained": _time((drafter / "config.json").stat().st_mtime),
        "kept": datetime.now().isoformat(),
        "run": str(run.absolute()),
    }
    try:
        folder = data_dir() / "drafters" / f"{_safe(name)}-{weights[:_SHORT]}"
        place = folder / f"{began:%Y%m%d-%H%M%S}-{_safe(run.name)}"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
            shutil.copytree(drafter, Path(new, "new"), ignore=shutil.ignore_patterns("*.partial"))
            Path(new, "new", FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            if place.exists():
                place.rename(Path(new, "old"))
            Path(new, "new").rename(place)
    except (OSError, OptionError) as error:  # the latter: MLX_REDRAFTER_DATA is no path
        raise HubError(f"the data folder cannot be written ({one_line(error)})") from error
    return place


def all_of(model: Path) -> list[Path]:
    """The drafters kept for the weights in a model's folder, the newest first."""
    try:
        some = list((data_dir() / "drafters").glob(f"*/*/{FILE}"))
        weights = fingerprint(model) if some else ""  # nothing kept: nothing to look for
    except (OSError, OptionError, ModelError):
        return []  # what is wrong with the model is said when it is loaded
    found = [(facts(file.parent), file.parent) for file in some]
    fitting = [(str(f.get("kept")), place) for f, place in found if f.get("weights") == weights]
    return [place for _, place in sorted(fitting, reverse=True)]


def facts(drafter: Path) -> dict[str, Any]:
    """What was written down of a kept drafter; nothing of any other."""
    return json_or_nothing(drafter / FILE)


def candidates(model: Path, builtin: bool) -> Iterator[Path]:
    """Where the drafter of a model may be, the one to prefer first.

    The one beside the model, then those trained for it, the newest first, then the heads that lie
    in the model's own files. For the built-in model the one in the package comes before those that
    were measured to be no better.
    """
    yield model / "drafter"
    trained = all_of(model)
    if builtin:
        shipped = shipped_drafter()
        least = _tokens_per_step(shipped) or math.inf
        ahead = [place for place in trained if _tokens_per_step(place) > least]
        yield from ahead
        yield shipped
        trained = [place for place in trained if place not in ahead]
    yield from trained
    if inside_model(model):
        yield model


def problem(drafter: Path, model: Path) -> str | None:
    """Why a drafter cannot be used with a model, as far as is known before it is loaded."""
    try:
        config = config_of(read_json(model / "config.json"))
    except ModelError:
        return None  # said when the model is loaded
    try:
        check_folder(drafter, cast(Target, SimpleNamespace(config=config)))
    except DrafterError as error:
        return str(error)
    return None


def origin(drafter: Path, model: Path) -> str:
    """Where a drafter came from, in a few words."""
    if drafter == model / "drafter":
        return "beside the model"
    if drafter == model:
        return "in the model's own files"
    if drafter == shipped_drafter():
        return "shipped with mlx-redrafter"
    known = facts(drafter)
    if not known:
        return "given"
    others = len(all_of(model)) - 1
    more = f"; {others} other{'s' * (others > 1)} for this model, in {drafter.parent.parent}"
    day = str(known.get("trained", ""))[:10]
    return f"trained on {day} in {known.get('run')}, kept by train{more * (others > 0)}"


def _tokens_per_step(drafter: Path) -> float:
    """Measured by the evaluation, the mean of its trees and temperatures; 0 if it was not."""
    try:
        rows = json.loads((drafter / "evaluation.json").read_text(encoding="utf-8"))["live"]
        found = [float(row["tokens_per_step"]) for row in rows if row["group"] == "all"]
        return sum(found) / len(found)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return 0.0


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]+", "--", name).strip(".-")[:80] or "model"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(timespec="seconds")
