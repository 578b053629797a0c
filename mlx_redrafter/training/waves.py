"""Sequences that are written at once, none of which is lost when the run is stopped.

    PLACE/KEY/17.npz    the 17th of them: token ids, features (n, L, D) float16

A file appears when its sequence is complete. Each depends on its own request only, so that the run
that goes on writes those that are missing, and all are what they would have been. KEY stands for
the requests: what was kept of others is of no use.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from mlx_redrafter.models.sequences import Answer, Request, Sequences, Told

SUFFIX = ".kept"


class _Keeper(Told):
    """Keeps what is complete, and passes on all that it is told."""

    def __init__(self, folder: Path, numbers: Sequence[int], told: Told) -> None:
        self.folder, self.numbers, self.told = folder, numbers, told

    def tokens(self, count: int) -> None:
        self.told.tokens(count)

    def answer(self, index: int, answer: Answer) -> None:
        file = self.folder / f"{self.numbers[index]}.npz"
        partial = file.with_suffix(".partial")
        with partial.open("wb") as f:
            np.savez(f, tokens=np.array(answer.tokens, np.int32), features=answer.features)
        partial.replace(file)
        self.told.answer(self.numbers[index], answer)


def write(
    target: Sequences,
    requests: Sequence[Request],
    max_tokens: int,
    end_tokens: Collection[int],
    place: Path,
    told: Told,
) -> list[Answer]:
    """As ``target.write``, but for what ``place`` holds of it already; `forget` that when the
    answers are safe. ``told`` hears of what was kept first."""
    folder = place / _key(target, requests, max_tokens, end_tokens)
    for other in place.glob("*"):
        if other != folder:
            forget(other)
    folder.mkdir(parents=True, exist_ok=True)
    found = {i: a for i in range(len(requests)) if (a := _read(folder / f"{i}.npz"))}
    for number, answer in found.items():
        told.tokens(len(answer.tokens))
        told.answer(number, answer)
    rest = [i for i in range(len(requests)) if i not in found]
    if rest:
        keeper = _Keeper(folder, rest, told)
        written = target.write([requests[i] for i in rest], max_tokens, end_tokens, keeper)
        found.update(zip(rest, written, strict=True))
    return [found[i] for i in range(len(requests))]


def forget(place: Path) -> None:
    """Remove what was kept: it is in a file of its own now."""
    shutil.rmtree(place, ignore_errors=True)


def _key(
    target: Sequences, requests: Sequence[Request], max_tokens: int, end_tokens: Collection[int]
) -> str:
    rows = [
        (list(r.prompt), r.temp, r.seed, r.top_p, r.thought and (r.thought.most, r.thought.closing))
        for r in requests
    ]
    whole = repr((rows, max_tokens, sorted(end_tokens), target.layers))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _read(file: Path) -> Answer | None:
    """None for what is not there or damaged: it can be written again."""
    try:
        with np.load(file) as content:
            return Answer(content["tokens"].tolist(), content["features"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
