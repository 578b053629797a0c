"""A folder for each machine, with its share of a model only: less to store and to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_redrafter.distributed import messages
from mlx_redrafter.distributed.link import Link
from mlx_redrafter.distributed.split import Planned, Split, quantised_groups
from mlx_redrafter.errors import ModelError, OptionError
from mlx_redrafter.models import registry
from mlx_redrafter.models.loading import SHARED, stored_weights
from mlx_redrafter.models.weights import read_json

_MOST = 4 << 30  # bytes of a file
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".pt", ".pth")


class Seat(Link):
    """A machine's place, without the machine."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.alike, self.collectives = rank, size, True, 0


def shard(
    folder: Path,
    out: Path,
    ranks: int,
    split: Split,
    say: Callable[[str], None] = lambda text: None,
) -> list[tuple[Path, int]]:
    """Write ``rank-0`` and so on into a new folder: those folders, and the bytes of their weights.

    Raises:
        OptionError, ModelError: a folder that is there, fewer than 2 machines, a model that cannot
            be shared so.
    """
    if ranks < 2:
        raise OptionError(f"--ranks {ranks} is not possible: give 2 or more")
    split.for_size(ranks)
    if out.exists():
        raise OptionError(f"{out} is there already: give a new folder")
    raw = read_json(folder / "config.json")
    if SHARED in raw:
        raise ModelError(f"{folder} holds one machine's share already: give the whole model")
    if registry.way(raw) != "native":
        raise ModelError(
            f"model_type '{raw.get('model_type')}' runs as mlx_lm's own module, which several "
            "machines cannot share here"
        )
    whole = messages.fingerprint(folder, None)
    for rank in range(ranks):  # what cannot be is said before anything is written
        config, weights, _ = stored_weights(folder)
        Planned(Seat(rank, ranks), split).cut(config, weights, raw)
    found = []
    for rank in range(ranks):
        place = out / f"rank-{rank}"
        size, kind = _write(folder, place, Planned(Seat(rank, ranks), split), raw, whole)
        say(f"{place}: {size / 1e9:.3f} GB ({kind})")
        found.append((place, size))
    return found


def _write(
    folder: Path, place: Path, planned: Planned, raw: dict[str, Any], whole: str
) -> tuple[int, str]:
    config, weights, _ = stored_weights(folder)
    groups = quantised_groups(config, weights)
    share = planned.shared(config, groups)
    part = planned.part(config, share, weights)
    del weights
    place.mkdir(parents=True)
    files, size = _in_files(part), sum(value.nbytes for value in part.values())
    for number, names in enumerate(files, 1):
        file = place / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        mx.save_safetensors(str(file), {name: part.pop(name) for name in names}, {"format": "mlx"})
    # The shares are stored under the decoder's names, whatever the model's own files have.
    described = {**planned.described(groups), "fingerprint": whole}
    (place / "config.json").write_text(json.dumps({**raw, SHARED: described}, indent=1) + "\n")
    for file in folder.iterdir():
        small = file.is_file() and not file.name.endswith(_WEIGHTS) and file.name[0] != "."
        if small and file.name != "config.json":
            shutil.copy(file, place / file.name)
    return size, planned.kind


def _in_files(part: dict[str, mx.array]) -> list[list[str]]:
    """Names of tensors by file."""
    files: list[list[str]] = [[]]
    size = 0
    for name, value in part.items():
        if size and size + value.nbytes > _MOST:
            files.append([])
            size = 0
        files[-1].append(name)
        size += value.nbytes
    return files
