"""Positions to train on: runs of neighbouring answer tokens with features, in random order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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
HELD_OUT = 32  # one conversation of so many is kept out of training
KEPT = 0.75  # of a cache that is too small: features that stay; the rest goes from group to group
VISITS = 3  # passes over a group before the next is computed


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


class Cache(NamedTuple):
    """Which shards have their features on disk when.

    Args:
        kept: the first so many always do; the others take turns.
        group: so many of the others at a time.
        visits: passes over a group, and meanwhile over its share of what is kept, before the next.
    """

    kept: int
    group: int
    visits: int

    @classmethod
    def of(cls, sizes: Sequence[int], room: float, passes: float) -> Cache:
        """For shards of so many bytes, a cache of ``room`` bytes, and a fit that makes so many
        passes over the answers: none of them is left out for another's sake.

        What is kept depends on the shards before it alone, and stays when more are written.
        """
        if sum(sizes) <= room:
            return cls(len(sizes), 0, 1)
        kept = int(np.searchsorted(np.cumsum(sizes), KEPT * room, side="right"))
        group = max(1, int((1 - KEPT) * room / max(sizes[kept:])))
        return cls(kept, min(group, len(sizes) - kept), int(min(VISITS, max(1, passes))))


class Rows:
    """A shard's answer tokens one after the other, and which answer each belongs to."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        conversations = shard.conversations()
        self.tokens = np.concatenate([np.array(c.answer, np.int32) for c in conversations])
        lengths = [len(c.answer) for c in conversations]
        self.owner = np.repeat(np.arange(len(lengths)), lengths)
        held_out = -(-len(lengths) // HELD_OUT) if len(lengths) > 1 else 0
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
    ``cache_bytes`` is thrown away after a few passes, and computed again when its turn comes.

    Args:
        positions: that the fit processes in all.
    """

    whole: ClassVar[bool] = False
    """Are features those of whole conversations, from the second token on?"""
    rows_of: ClassVar[type[Rows]] = Rows
    rows: list[Any]

    def __init__(
        self,
        folder: Path,
        target: Sequences,
        segment: int,
        rollout: int,
        cache_bytes: float,
        positions: int,
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
        sizes = [feature_bytes(r.size, len(stored), size) for r in self.rows]
        self.cache = Cache.of(sizes, cache_bytes, positions / max(1, self.count))

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
        number, cycle = 0, 0
        while True:
            random = np.random.default_rng((seed, cycle))
            for group in self._groups(random):
                planned = list(self._planned(group, size, random))
                rest = planned[max(0, start - number) :]
                number += len(planned)
                if rest:
                    self._forget(group)
                yield from (self._batch(chosen, held_out=False) for chosen in rest)
            cycle += 1

    def _groups(self, random: np.random.Generator) -> Iterator[Sequence[int]]:
        """The shards that are gone through together, one group after the other, until all were
        gone through equally often."""
        order = random.permutation(len(self.rows)).tolist()
        kept, group, visits = self.cache
        if kept == len(self.rows):
            yield order
            return
        turns = list(batched([i for i in order if i >= kept], group))
        parts = [random.permutation(kept).tolist() for _ in range(visits)]
        for number, turn in enumerate(turns):
            for part in parts:
                yield [*turn, *part[number :: len(turns)]]

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
            for i, row in enumerate(self.rows[: self._first])
            for first in range(row.cut, len(row.tokens) - 1, self.segment)
        ]
        every = max(1, len(blocks) // max(1, size * count))
        chosen = blocks[::every][: size * count]
        parts = [p for p in batched(chosen, size) if len(p) == size or len(chosen) < size]
        parts = [[p[i % len(p)] for i in range(size)] for p in parts]
        return [self._batch(part, held_out=True) for part in parts]

    @property
    def _first(self) -> int:
        """Shards that are in the cache at once, the same in every fit."""
        return self.cache.kept or self.cache.group

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
        """Whose turn it is not has no features."""
        for i in {*range(self.cache.kept, len(self.rows))}.difference(group):
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
