"""Positions to train on: runs of neighbouring answer tokens with features, in random order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mlx_redrafter.errors import OptionError
from mlx_redrafter.models.batched import over
from mlx_redrafter.models.sequences import Sequences
from mlx_redrafter.training.shards import (
    Conversation,
    Shard,
    batched,
    feature_bytes,
    reading,
    record_layers,
    recorded_layers,
    save_features,
    shards,
)

READ_TOKENS = 4096  # tokens of one pass that computes features
Place = tuple[int, int]  # a shard, and where in it
_HELD_OUT = 32  # one conversation of so many is kept out of training


@dataclass(frozen=True)
class Before:
    """What comes before each of B runs, Q positions, for drafters that see it.

    tokens (B, Q) int32; features (B, Q, L, D) float16; seen (B, Q) bool, False before a
    conversation begins.
    """

    tokens: np.ndarray
    features: np.ndarray
    seen: np.ndarray


@dataclass(frozen=True)
class Batch:
    """B runs of T positions, and what K draft steps after each of them need.

    tokens (B, T + K) int32; features (B, T + K, L, D) float16; valid (K, B, T) float32, 1 where the
    position and the k-th token after it are in the same answer. ``tokens[:, t + 1]`` was predicted
    by ``features[:, t + 1]``: a drafter at t has the context ``features[:, t]``, consumes
    ``tokens[:, t]`` and predicts ``tokens[:, t + 1]``.
    """

    tokens: np.ndarray
    features: np.ndarray
    valid: np.ndarray
    before: Before | None = None


class Rows:
    """A shard's answer tokens one after the other, and which answer each belongs to."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        conversations = shard.conversations()
        self.tokens = np.concatenate([np.array(c.answer, np.int32) for c in conversations])
        lengths = [len(c.answer) for c in conversations]
        self.owner = np.repeat(np.arange(len(lengths)), lengths)
        held_out = -(-len(lengths) // _HELD_OUT) if len(lengths) > 1 else 0
        self.trained = len(lengths) - held_out
        self.cut = int(sum(lengths[: self.trained]))
        self.features: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Rows that have features."""
        return len(self.tokens)

    def open(self) -> np.ndarray:
        if self.features is None:
            with reading(self.shard.features_file, "delete it, it can be computed again"):
                self.features = np.load(self.shard.features_file, mmap_mode="r")
            if len(self.features) != self.size:
                raise OptionError(
                    f"{self.shard.features_file} does not belong to {self.shard.file}: delete it"
                )
        return self.features


class Positions:
    """All positions of a training folder.

    Features that are missing are computed when they are first needed. What does not fit in
    ``cache_bytes`` is thrown away after use and computed again in the next epoch.
    """

    whole: ClassVar[bool] = False
    """Are features those of whole conversations, from the second token on?"""
    rows_of: ClassVar[type[Rows]] = Rows
    rows: list[Any]

    def __init__(
        self, folder: Path, target: Sequences, segment: int, rollout: int, cache_bytes: float
    ) -> None:
        self.target, self.segment, self.rollout = target, segment, rollout
        self.rows = [self.rows_of(shard) for shard in shards(folder, self.whole)]
        if not self.rows:
            raise OptionError(f"{folder} has no answers to train on: run `train answers` first")
        stored = recorded_layers(folder, self.whole)
        if stored is None or not set(target.layers) <= set(stored):
            for row in self.rows:
                row.shard.features_file.unlink(missing_ok=True)
            record_layers(folder, target.layers, self.whole)
            stored = target.layers
        self._pick = [stored.index(layer) for layer in target.layers]
        self._stored = stored
        size = target.target.config.hidden_size
        total = feature_bytes(sum(r.size for r in self.rows), len(stored), size)
        share = min(1.0, cache_bytes / max(total, 1))
        self.group = len(self.rows) if share == 1 else max(1, int(len(self.rows) * share))

    @property
    def count(self) -> int:
        """Answer tokens that are trained on."""
        return sum(r.cut for r in self.rows)

    def frequencies(self, vocab_size: int) -> np.ndarray:
        """How often every token occurs in the answers: (V,)."""
        total = np.zeros(vocab_size, np.int64)
        for row in self.rows:
            total += np.bincount(row.tokens[: row.cut], minlength=vocab_size)
        return total

    def batches(self, size: int, seed: int, start: int) -> Iterator[Batch]:
        """Endless batches of ``size`` runs, from the ``start``-th on; the order is the seed's."""
        number, epoch = 0, 0
        while True:
            random = np.random.default_rng((seed, epoch))
            order = random.permutation(len(self.rows)).tolist()
            for group in batched(order, self.group):
                for chosen in self._planned(group, size, random):
                    if number >= start:
                        yield self._batch(chosen, held_out=False)
                    number += 1
                self._forget(group)
            epoch += 1

    def _planned(
        self, group: Sequence[int], size: int, random: np.random.Generator
    ) -> Iterable[Sequence[Place]]:
        """What the batches of an epoch take from these shards, in random order."""
        blocks = [
            (int(i), first)
            for i, offset in zip(group, random.integers(self.segment, size=len(group)), strict=True)
            for first in range(-int(offset), self.rows[i].cut - 1, self.segment)
        ]
        shuffled = [blocks[i] for i in random.permutation(len(blocks))]
        shuffled += shuffled[: -len(shuffled) % size]
        if len(shuffled) < size:
            shuffled = [shuffled[i % len(shuffled)] for i in range(size)]
        return batched(shuffled, size)

    def held_out(self, size: int, count: int) -> list[Batch]:
        """Up to ``count`` batches of conversations that are never trained on."""
        blocks = [
            (i, first)
            for i, row in enumerate(self.rows[: self.group])  # those that are in the cache at once
            for first in range(row.cut, len(row.tokens) - 1, self.segment)
        ]
        every = max(1, len(blocks) // max(1, size * count))
        chosen = blocks[::every][: size * count]
        parts = [p for p in batched(chosen, size) if len(p) == size or len(chosen) < size]
        parts = [[p[i % len(p)] for i in range(size)] for p in parts]
        result = [self._batch(part, held_out=True) for part in parts]
        self._forget(range(self.group))
        return result

    def sample(self, count: int) -> np.ndarray:
        """Features (<= count, L, D) of the first shard, to take scales from."""
        self._need([0])
        return np.array(self.rows[0].open()[:count, self._pick])

    def _batch(self, blocks: Sequence[Place], held_out: bool) -> Batch:
        self._need({i for i, _ in blocks})
        steps, length = self.rollout, self.segment
        tokens, features, valid = [], [], []
        for i, first in blocks:
            row = self.rows[i]
            low, high = (row.cut, len(row.tokens)) if held_out else (0, row.cut)
            wanted = np.arange(first, first + length + steps)
            inside = (wanted >= low) & (wanted < high)
            at = np.clip(wanted, low, high - 1)
            tokens.append(row.tokens[at])
            source = row.open()[at[0] : at[-1] + 1]
            features.append(source[at - at[0]][:, self._pick])
            owner = np.where(inside, row.owner[at], -1)
            here = owner[:length]
            valid.append(
                [(here >= 0) & (here == owner[k : k + length]) for k in range(1, steps + 1)]
            )
        return Batch(
            np.stack(tokens), np.stack(features),
            np.array(valid).transpose(1, 0, 2).astype(np.float32),
        )  # fmt: skip

    def _need(self, indices: Sequence[int] | set[int]) -> None:
        for i in sorted(indices):
            shard = self.rows[i].shard
            if self.rows[i].features is None and not shard.features_file.is_file():
                compute_features(self.target, self._stored, shard)

    def _forget(self, group: Sequence[int]) -> None:
        if self.group == len(self.rows):
            return
        for i in group:
            self.rows[i].features = None
            self.rows[i].shard.features_file.unlink(missing_ok=True)


def compute_features(target: Sequences, layers: Sequence[int], shard: Shard) -> None:
    """Read a shard's conversations with the target and write their features."""
    reader = target if target.layers == tuple(layers) else over(target.target, layers)
    conversations = shard.conversations()
    order = sorted(range(len(conversations)), key=lambda i: _length(conversations[i]))
    result: dict[int, np.ndarray] = {}
    while order:
        longest = _length(conversations[order[-1]])
        count = max(1, READ_TOKENS // longest)
        part, order = order[-count:], order[:-count]
        pairs = [conversations[i].parts(shard.whole) for i in part]
        result.update(zip(part, reader.read(pairs), strict=True))
    save_features(shard.features_file, [result[i] for i in range(len(conversations))])


def _length(conversation: Conversation) -> int:
    return len(conversation.prompt) + len(conversation.answer)
