"""Requests and models as plain values, for other machines."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from mlx_redrafter.cache.packed import GROUP
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.grammar import Grammar
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models.loading import SHARED
from mlx_redrafter.models.weights import read_header
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.reading import Progress
from mlx_redrafter.runtime.paths import json_or_nothing
from mlx_redrafter.tree.shape import TreeShape

_CARRIED = {"prompt", "sampling", "shape", "max_tokens", "session", "stats", "step_size",
            "progress", "sparse_prefill", "prediction", "margins", "grammar",
            "trees"}  # fmt: skip
_SAMPLE, _PLACES = 4096, 3  # bytes of a tensor, and how often, that tell weights apart


def of_request(request: Request, shapes: Sequence[TreeShape]) -> dict[str, Any]:
    """A request as another machine is told of it; raises OptionError for what does not travel."""
    for one in fields(request):
        usual = one.default if one.default is not MISSING else None
        if one.name not in _CARRIED and getattr(request, one.name) not in (usual, None, (), {}):
            raise OptionError(f"{one.name} is not possible over several machines: leave it out")
    sparse = request.sparse_prefill
    if sparse is not None and sparse.patterns is not None:
        raise OptionError(
            "patterns of single heads are not possible over several machines: leave out "
            "--sparse-prefill-config"
        )
    return {
        "prompt": list(request.prompt),
        "sampling": asdict(request.sampling),
        "shapes": [asdict(shape) for shape in shapes],
        "max_tokens": request.max_tokens,
        "length": len(request.session.tokens),
        "step_size": request.step_size,
        "prediction": list(request.prediction),
        "margins": request.margins,
        "trees": request.trees,
        "end": None if request.grammar is None else request.grammar.begin().end,
        "sparse": None if sparse is None else asdict(sparse),
    }


def to_request(
    message: Mapping[str, Any],
    policy: Policy,
    session: Session,
    progress: Progress,
    grammar: Grammar | None,
) -> Request:
    """What was told, with what chooses here."""
    sparse = message["sparse"]
    return Request(
        message["prompt"], SamplingParams(**message["sampling"]), policy, message["max_tokens"],
        session, step_size=message["step_size"], progress=progress,
        sparse_prefill=None if sparse is None else SparsePrefill(**sparse),
        prediction=message["prediction"], margins=message["margins"],
        trees=message["trees"],
        grammar=grammar,
    )  # fmt: skip


def shapes_of(message: Mapping[str, Any]) -> list[TreeShape]:
    shapes = message["shapes"]
    return [TreeShape(**s) if s["nodes"] > 1 else TreeShape.plain() for s in shapes]


def load_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of `mlx_redrafter.load`, those that other machines need."""
    usual = {"revision": None, "kv_bits": None, "kv_group_size": GROUP, "exact": False}
    return {name: options.get(name, value) for name, value in usual.items()}


def checksum(tokens: Sequence[int], before: int = 0) -> int:
    """Of a text, part after part: what tells whether machines have the same."""
    return zlib.crc32(repr(list(tokens)).encode(), before)


def fingerprint(folder: Path, drafter: Path | None) -> str:
    """Tells models apart by what their folders hold: headers, and samples of every tensor. Of one
    machine's share it is the whole model's."""
    digest = hashlib.sha256()
    for place in filter(None, (folder, drafter)):
        raw = json_or_nothing(place / "config.json")
        if SHARED in raw:
            digest.update(str(raw[SHARED]["fingerprint"]).encode())
            continue
        digest.update(json.dumps(raw, sort_keys=True).encode())
        for file in sorted(place.glob("*.safetensors")):
            _add(digest, file)
    return digest.hexdigest()


def _add(digest: Any, file: Path) -> None:
    header = read_header(file)
    digest.update(json.dumps(header, sort_keys=True).encode())
    with file.open("rb") as stream:
        base = 8 + int.from_bytes(stream.read(8), "little")
        for tensor in header.values():
            start, stop = tensor["data_offsets"]
            for place in range(_PLACES):
                stream.seek(base + start + (stop - start) * place // _PLACES)
                digest.update(stream.read(min(_SAMPLE, stop - start)))
