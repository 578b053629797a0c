"""Which files of a folder or of a hub repository are its model: told from names and contents.

An index only says what another build of the model had; what lies in the folder decides.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple, cast

from ..errors import ModelError
from .weights import preview, read_header, read_json, two_models

# What trainers leave beside the weights.
_NOT_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler")
_ADAPTER = re.compile(r"adapter|.*lora", re.IGNORECASE)
# The same model in the names of its authors' own code.
_ORIGINAL = re.compile(r"consolidated|original")
_PRECISION = re.compile(r".+[-_.](fp|bf|f|int|q|mxfp|nvfp)\d+\w*|.+[-_.]\d+-?bit|.+\.\D.*")
_PART = re.compile(r"(.*?)[-_.](\d{1,5})(?:-of-(\d{1,5}))?((?:\.\w+)?)")
_VARIANT, _OTHER, _LAST, _ADAPTERS = 1, 2, 4, 5


class Kind(NamedTuple):
    """Files with this suffix; those whose name begins with `stem` go before others."""

    suffix: str
    stem: str


SAFETENSORS = Kind(".safetensors", "model")
TORCH = (Kind(".bin", "pytorch_model"), Kind(".pt", "model"), Kind(".pth", "model"))
HEADS = Kind(".safetensors", "medusa_lm_head")
"""Medusa heads in a file of their own, which may lie beside their base model's."""


class _Group(NamedTuple):
    """Files that were written together: one file, or numbered ones; `total` is of n-of-total."""

    stem: str
    numbered: bool
    total: str


def weights_among(names: Collection[str], kind: Kind, folder: Path) -> list[str]:
    """The weights among the files of a repository: one model, in one precision, no adapter.

    Those of its index, which is in `folder` already, if the repository has them all.
    """
    groups = _grouped(names, kind)
    if not groups:
        return []
    with contextlib.suppress(ModelError, AttributeError, KeyError, TypeError):
        named = set(read_json(folder / _index(kind))["weight_map"].values())
        if named <= set(names):
            return sorted(name for group in _grouped(named, kind) for name in groups[group])
    best = min(_rank(group, kind) for group in groups)
    kept = sorted(group for group in groups if _rank(group, kind) == best)
    if best & _VARIANT and best < _LAST:
        kept = [group for group in kept if group.stem == kept[0].stem]
    # One model may be there twice, as one file and in parts.
    whole = [group for group in kept if group == (kind.stem, False, "")]
    parts = [group for group in kept if group.stem == kind.stem and group.total]
    double = (whole + parts)[1:]
    return sorted(name for group in kept if group not in double for name in groups[group])


def heads_among(names: Collection[str], suffixes: Collection[str]) -> list[str]:
    """Medusa heads' own files among the files of a folder, with the first suffix that has any."""
    for suffix in suffixes:
        if found := sorted(n for n in names if n.startswith(HEADS.stem) and n.endswith(suffix)):
            return found
    return []


def pickles_among(names: Collection[str], folder: Path) -> list[str]:
    """The PyTorch files of a folder that hold its weights, if no safetensors file does."""
    if any(name.endswith(SAFETENSORS.suffix) for name in names):
        return []
    if heads := heads_among(names, [kind.suffix for kind in TORCH]):
        return heads
    return next(filter(None, (weights_among(names, kind, folder) for kind in TORCH)), [])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model in a folder.

    Raises ModelError: there are none, a part is missing, or two models lie in the folder.
    """
    if files := files_of_kind(folder, SAFETENSORS, read_header):
        return files
    raise ModelError(
        f"{folder} has no *.safetensors file; needed: a model in safetensors format "
        "(convert other formats first)"
    )


def files_of_kind(
    folder: Path, kind: Kind, tensors: Callable[[Path], Collection[str]]
) -> list[Path]:
    """As `weight_files`, for any kind; [] if the folder has none. `tensors`: a file's names."""
    promised = _promised(folder, kind)
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    groups = _grouped(sorted({*present, *promised}), kind)
    if not groups:
        return []
    lacking = {group: _lacking(folder, group, names) for group, names in groups.items()}
    best = min(_rank(group, kind) for group in groups)
    if best == _ADAPTERS:
        raise ModelError(
            f"{folder} holds an adapter ({preview(n for names in groups.values() for n in names)}) "
            "and no model; merge it into its base model first"
        )
    named = set(_grouped(promised, kind))
    whole = [g for g in groups if not lacking[g] and _rank(g, kind) == best]
    chosen = list(named) if named and not any(lacking[g] for g in named) else whole
    files = sorted(folder / name for group in chosen for name in groups[group])
    rivals = [g for g in whole if g not in chosen]
    partial = [g for g in groups if lacking[g] and (g in named or _rank(g, kind) <= best)]
    if len(chosen) > 1 or rivals or partial:
        held = _held(files, tensors)
        for group in rivals:
            for file in groups[group]:
                if both := held.keys() & tensors(folder / file):
                    raise two_models(min(both), held[min(both)], folder / file)
        for group in partial:
            found = [folder / file for file in groups[group] if file not in lacking[group]]
            names = {name for file in found for name in tensors(file)}
            names |= {name for file in lacking[group] for name in promised.get(file, ())}
            double = _inner(held) & _inner(names)
            _left_over(folder, lacking[group], promised, kind, files, double)
    return files


def _left_over(
    folder: Path,
    lacking: Collection[str],
    promised: Collection[str],
    kind: Kind,
    files: list[Path],
    double: Collection[str],
) -> None:
    """Refuse a folder without these files, unless what they would hold is in its `files`."""
    index = f" (named by {_index(kind)})" if any(name in promised for name in lacking) else ""
    if not double:
        raise ModelError(f"{folder} lacks {preview(lacking)}{index}; download the missing files")
    warnings.warn(
        f"{folder} lacks {preview(lacking)}{index}; the model is read from "
        f"{preview(file.name for file in files)}",
        stacklevel=1,  # once for all who read the folder
    )


def _held(files: Iterable[Path], tensors: Callable[[Path], Collection[str]]) -> dict[str, Path]:
    """tensor -> the file that holds it. Raises ModelError for two files with the same tensor."""
    held: dict[str, Path] = {}
    for file in files:
        for name in tensors(file):
            if name in held:
                raise two_models(name, held[name], file)
            held[name] = file
    return held


def _inner(names: Iterable[str]) -> set[str]:
    """Names without what a model is wrapped in, which differs from build to build."""
    return {name.rpartition("model.")[2] for name in names}


def _grouped(names: Iterable[str], kind: Kind) -> dict[_Group, list[str]]:
    groups: dict[_Group, list[str]] = {}
    for name in names:
        if not name.endswith(kind.suffix) or _NOT_WEIGHTS.search(name):
            continue
        base = name.removesuffix(kind.suffix)
        match = _PART.fullmatch(base)
        group = _Group(match[1] + match[4], True, match[3] or "") if match else None
        groups.setdefault(group or _Group(base, False, ""), []).append(name)
    return groups


def _rank(group: _Group, kind: Kind) -> int:
    """Lower is better: the model's own name, then its variants, then any other file."""
    if _ADAPTER.match(group.stem):
        return _ADAPTERS
    if _ORIGINAL.match(group.stem):
        return _LAST
    variant = _VARIANT if _PRECISION.fullmatch(group.stem) else 0
    return variant + (0 if group.stem.startswith(kind.stem) else _OTHER)


def _index(kind: Kind) -> str:
    return f"{kind.stem}{kind.suffix}.index.json"


def _promised(folder: Path, kind: Kind) -> dict[str, set[str]]:
    """file -> its tensors, as the index says; {} without an index that can be read."""
    index = folder / _index(kind)
    if not index.is_file():
        return {}
    try:
        names = read_json(index).get("weight_map")
    except ModelError as error:
        warnings.warn(f"{error}; the weights are found without it", stacklevel=1)
        return {}
    files: dict[str, set[str]] = {}
    for tensor, name in names.items() if isinstance(names, dict) else ():
        files.setdefault(str(name), set()).add(tensor)
    # By the name alone: in the Hugging Face cache the files themselves are links to elsewhere.
    outside = [n for n in files if Path(n).is_absolute() or ".." in Path(n).parts or "\\" in n]
    if outside:
        raise ModelError(f"{index} is refused: it points outside its folder, to {preview(outside)}")
    return files


def _lacking(folder: Path, group: _Group, names: list[str]) -> list[str]:
    """Files of a group that are not there, told from their numbers too."""
    expected = set(names)
    if group.total:
        start, end = cast(re.Match[str], _PART.match(names[0])).span(2)
        width = end - start
        numbers = range(1, int(group.total) + 1)
        expected |= {f"{names[0][:start]}{i:0{width}}{names[0][end:]}" for i in numbers}
    return sorted(name for name in expected if not (folder / name).is_file())
