"""What training keeps on disk: shards of conversations, and the target's features beside them.

    DIR/prompts/00000.jsonl    {"prompt": text} | {"messages": [...]}
    DIR/answers/00000.jsonl    {"prompt": token ids, "answer": token ids, "temp": t}
    DIR/features/00000.npy     (answer tokens of the shard, L, D) float16
    DIR/features/layers.json   indices of those L layers

A file is written under another name and renamed, so that whatever exists is complete: a run that
was stopped goes on with the first file that is missing.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_redrafter.errors import OptionError, one_line


@contextmanager
def reading(file: Path, use: str) -> Iterator[None]:
    """Whatever a damaged file raises while it is read becomes an OptionError that ends in `use`."""
    try:
        yield
    except OptionError:
        raise
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError,
        EOFError,
    ) as error:  # fmt: skip
        raise OptionError(f"{file} cannot be read ({one_line(error)}): {use}") from error


@dataclass(frozen=True)
class Conversation:
    """Token ids of a prompt in the chat template and of its answer; the answer's temperature."""

    prompt: list[int]
    answer: list[int]
    temp: float

    def parts(self, whole: bool) -> tuple[list[int], list[int]]:
        """What is only read, and the tokens whose features are wanted: those of the answer, or of
        the whole conversation but for its first token, which nothing predicts."""
        if not whole:
            return self.prompt, self.answer
        return self.prompt[:1], self.prompt[1:] + self.answer


@dataclass(frozen=True)
class Shard:
    """A file of conversations and the file of their features, which may not exist yet.

    The features are those of the answers, or of ``whole`` conversations.
    """

    file: Path
    features_file: Path
    whole: bool = False

    def conversations(self) -> list[Conversation]:
        return read_conversations(self.file)

    def count(self) -> int:
        """Tokens that have features."""
        return sum(len(c.parts(self.whole)[1]) for c in self.conversations())


def features_folder(folder: Path, whole: bool) -> Path:
    """Where a training folder has the features of answers, or of whole conversations."""
    return folder / "features" / "whole" if whole else folder / "features"


def shards(folder: Path, whole: bool = False) -> list[Shard]:
    """The shards of a training folder, in order."""
    files, place = sorted((folder / "answers").glob("*.jsonl")), features_folder(folder, whole)
    return [Shard(f, place / f"{f.stem}.npy", whole) for f in files]


def read_lines(file: Path) -> list[Any]:
    """The JSON values of a .jsonl or .jsonl.gz file. Raises OptionError."""
    with (
        reading(file, "give one JSON value per line"),
        gzip.open(file, "rt", encoding="utf-8")
        if file.suffix == ".gz"
        else file.open(encoding="utf-8") as f,
    ):
        return [json.loads(line) for line in f if line.strip()]


def write_lines(file: Path, rows: Iterable[Any]) -> None:
    """Write a .jsonl file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def read_conversations(file: Path) -> list[Conversation]:
    """Conversations in token ids. Raises OptionError."""
    lines = read_lines(file)
    try:
        rows = [
            Conversation(list(r["prompt"]), list(r["answer"]), float(r.get("temp", 0.0)))
            for r in lines
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        rows = []
    if not rows or not all(isinstance(t, int) for r in rows for t in r.prompt + r.answer):
        raise OptionError(
            f'{file} holds no answers: give lines of {{"prompt": token ids, "answer": token ids}}'
        )
    return rows


def answer_tokens(file: Path) -> int:
    """Tokens of all answers in a file. Raises OptionError."""
    return sum(len(c.answer) for c in read_conversations(file))


def save_features(file: Path, parts: Sequence[np.ndarray]) -> None:
    """Write the features (n, L, D) of a shard's answers one after the other."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as f:
        np.save(f, np.concatenate(parts))
    partial.replace(file)


def feature_bytes(tokens: int, layers: int, hidden_size: int) -> int:
    """What the features of so many answer tokens take on disk."""
    return tokens * layers * hidden_size * 2


def recorded_layers(folder: Path, whole: bool = False) -> tuple[int, ...] | None:
    """Which layers the features of a training folder are of; None if there are none yet.

    They can be computed again: a file that makes no sense is none.
    """
    try:
        layers = json.loads(_layers_file(folder, whole).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
    return tuple(layers) if whole else None


def record_layers(folder: Path, layers: Sequence[int], whole: bool = False) -> None:
    file = _layers_file(folder, whole)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(layers)) + "\n")


def _layers_file(folder: Path, whole: bool) -> Path:
    return features_folder(folder, whole) / "layers.json"


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
