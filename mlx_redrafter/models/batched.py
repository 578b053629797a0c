"""The target over many sequences at once: writing answers, and reading them again.

The decoder itself is the one of decoding. Sequences are padded on the left to one length, so that
all of them write the same KV slot in a pass; a mask keeps the padding out.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_redrafter.cache.halves import halved, some
from mlx_redrafter.cache.layer import Kept, LayerCache, Pass, capacity_of, new_caches
from mlx_redrafter.cache.recurrent import State
from mlx_redrafter.cache.ring import whole
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.runtime.compiler import keep_memory

from ..runtime.device import fused_kernels
from . import vectorised
from .attention import attend
from .decoder import Decoder, Functions
from .sequences import (
    Answer,
    Course,
    OneByOne,
    Request,
    Sequences,
    Told,
    nucleus,
    sample,
    stacked,
    tries,
)
from .target import Target

ROWS_PER_PASS = 4096  # bounds the activations of a pass
SHRINK = 0.6  # sequences that are left, as a share of the batch, when it is made smaller


def takes(target: Target) -> bool:
    """Can a pass of this target run several sequences?"""
    return isinstance(target, Decoder)


def over(target: Target, layers: Sequence[int]) -> Sequences:
    """A target over many sequences: together where that is possible, else one by one."""
    return (BatchedTarget if takes(target) else OneByOne)(target, layers)


class BatchedTarget(Sequences):
    """Our own decoder, over B sequences per pass."""

    together = True

    def __init__(self, target: Target, layers: Sequence[int]) -> None:
        super().__init__(target, layers)
        keep_memory()
        self._functions = vectorised_functions(target)
        self._pass = mx.compile(self._run)
        self._sample = mx.compile(sample)

    def _run(
        self,
        tokens: mx.array,
        positions: mx.array,
        mask: mx.array,
        key_positions: mx.array,
        offset: mx.array,
        kv: list[mx.array],
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        """tokens (B, n) -> hidden (B, n, D), features (B, n, L, D) float16, slabs."""
        rows, n = tokens.shape
        caches = _RowsPass(kv, offset, rows)
        hidden, inner = self.target(
            tokens.reshape(-1), positions.reshape(-1), mask.reshape(rows * n, -1),
            mx.repeat(key_positions, n, axis=0), caches, self.layers, self._functions,
        )  # fmt: skip
        features = stacked(inner, rows * n)
        features = features.reshape(rows, n, *features.shape[1:])
        return hidden.reshape(rows, n, -1), features, caches.caches

    def write(
        self,
        requests: Sequence[Request],
        max_tokens: int,
        end_tokens: Collection[int],
        told: Told | None = None,
    ) -> list[Answer]:
        batch = _Batch(self, requests, [Course(r, max_tokens, end_tokens) for r in requests])
        hidden, features = batch.read_prompts()
        while True:
            tokens = self._sample(self.target.logits(hidden), *batch.sampling())
            mx.eval(tokens, features)
            batch.record(np.array(tokens), np.array(features), told or Told())
            if not batch.shrink():
                return batch.answers()
            hidden, features = batch.advance()

    def read(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Pairs of like length should come together: all are padded to the longest."""
        rows = [list(prompt) + list(answer)[:-1] for prompt, answer in sequences]
        tokens, pads = _padded(rows)
        parts = self._read(tokens, pads, self.caches(*tokens.shape))
        result = np.concatenate([np.array(features) for _, features in parts], axis=1)
        return [
            result[i, tokens.shape[1] - len(answer) :] for i, (_, answer) in enumerate(sequences)
        ]

    def choices(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        tokens = np.array([[*prompt, *answer[:-1]]], np.int32)
        hidden, _ = self.run(tokens, 0, np.zeros(1, np.int32), self.caches(*tokens.shape))
        return np.array(mx.argmax(self.target.logits(hidden[0, len(prompt) - 1 :]), axis=-1))

    def caches(self, rows: int, capacity: int) -> list[Kept]:
        """Empty ones for so many sequences."""
        return new_caches(_kinds(self.target.caches), capacity, self.target.dtype, rows)

    def _read(
        self, tokens: np.ndarray, pads: np.ndarray, kv: list[mx.array]
    ) -> Iterator[tuple[mx.array, mx.array]]:
        """Run left-padded tokens (B, P) into ``kv``: hidden and features, part after part of P."""
        rows, length = tokens.shape
        chunk = max(1, ROWS_PER_PASS // rows)
        for start in range(0, length, chunk):
            yield self.run(tokens[:, start : start + chunk], start, pads, kv)

    def run(
        self, tokens: np.ndarray, start: int, pads: np.ndarray, kv: list[mx.array]
    ) -> tuple[mx.array, mx.array]:
        """One pass of tokens (B, n) that go to the slots from ``start``; ``kv`` is replaced."""
        n = tokens.shape[1]
        room = capacity_of(self.target.caches, kv) or start + n
        slots = np.arange(min(capacity_for(start + n), room), dtype=np.int32)
        queries = np.arange(start, start + n, dtype=np.int32)
        seen = (slots <= queries[:, None])[None] & (slots >= pads[:, None])[:, None]
        positions = np.maximum(queries - pads[:, None], 0)
        hidden, features, new = self._pass(
            mx.array(tokens), mx.array(positions), mx.array(seen),
            mx.array(slots - pads[:, None]), mx.array([start], mx.int32), kv,
        )  # fmt: skip
        kv[:] = new
        return hidden, features


class _Batch:
    """The state of a batch of answers while they are written."""

    def __init__(
        self, batched: BatchedTarget, requests: Sequence[Request], courses: Sequence[Course]
    ) -> None:
        self.batched, self.courses = batched, courses
        self.tokens, self.pads = _padded([r.prompt for r in requests])
        self.length = self.tokens.shape[1]
        self.rows = np.arange(len(requests))  # which request every row of the batch answers
        self.temps = mx.array([r.temp for r in requests], mx.float32)
        self.top_p, self.step = nucleus(requests), 0
        longest = max(r.longest(c.max_tokens) for r, c in zip(requests, courses, strict=True))
        self.draws = np.stack([r.draws(longest, tries(self.top_p)) for r in requests])
        self.kv = batched.caches(len(requests), self.length + longest)
        shape = (len(requests), longest, len(batched.layers), batched.target.config.hidden_size)
        self.features = np.zeros(shape if batched.layers else (*shape[:3], 0), np.float16)

    def read_prompts(self) -> tuple[mx.array, mx.array]:
        """Hidden (B, D) and features (B, L, D) of the last prompt tokens."""
        for hidden, features in self.batched._read(self.tokens, self.pads, self.kv):
            mx.eval(hidden, features)
        return hidden[:, -1], features[:, -1]

    def sampling(self) -> tuple[mx.array, ...]:
        """What `sample` wants besides logits."""
        draws = mx.array(self.draws[self.rows, self.step], mx.float32)
        return self.temps, draws, *self.top_p

    def record(self, tokens: np.ndarray, features: np.ndarray, told: Told) -> None:
        """Keep the tokens of the sequences that are not finished."""
        going = self._going()
        rows = self.rows[going]
        self.features[rows, self.step] = features[going]
        for i, row in zip(going, rows, strict=True):
            tokens[i] = self.courses[row].take(int(tokens[i]))
        self.last = tokens
        self.step += 1
        told.tokens(len(going))
        for row in map(int, rows):
            if self.courses[row].done:
                told.answer(row, self._answer(row))

    def shrink(self) -> bool:
        """Drop the finished sequences when enough are; False when none is left."""
        kept = self._going()
        if not len(kept):
            return False
        if len(kept) <= SHRINK * len(self.rows):
            index, kinds = mx.array(kept), _kinds(self.batched.target.caches)
            for layer, slab in enumerate(self.kv):
                self.kv[layer] = some(kinds[layer], slab, index)
                del slab
                mx.eval(self.kv[layer])
            self.rows, self.pads, self.last = self.rows[kept], self.pads[kept], self.last[kept]
            self.temps, *top_p = (x[index] for x in (self.temps, *self.top_p))
            self.top_p = tuple(top_p)
        return True

    def advance(self) -> tuple[mx.array, mx.array]:
        """Run the last tokens: hidden (B, D) and features (B, L, D)."""
        hidden, features = self.batched.run(self.last[:, None], self.length, self.pads, self.kv)
        self.length += 1
        return hidden[:, 0], features[:, 0]

    def answers(self) -> list[Answer]:
        return [self._answer(row) for row in range(len(self.courses))]

    def _answer(self, row: int) -> Answer:
        tokens = self.courses[row].tokens
        return Answer(tokens, self.features[row, : len(tokens)].copy())

    def _going(self) -> np.ndarray:
        """Rows of the batch that are not finished."""
        return np.flatnonzero([not self.courses[int(row)].done for row in self.rows])


def _kinds(kinds: Sequence[LayerCache]) -> list[LayerCache]:
    """What layers remember of many sequences."""
    return halved(whole(kinds)) if fused_kernels() else whole(kinds)


class _RowsPass(Pass):
    """A pass that appends n nodes to each of B sequences."""

    def __init__(self, caches: Sequence[Kept], offset: mx.array, rows: int) -> None:
        super().__init__(caches, offset)
        self._count = rows

    def extend(self, layer: int, kind: LayerCache, rows: mx.array) -> mx.array:
        if isinstance(kind, State):  # by sequence already
            return super().extend(layer, kind, rows)
        heads, _, dim = rows.shape[1:]  # (1, 2*Hkv, B*n, Dh)
        by_row = rows[0].reshape(heads, self._count, -1, dim).transpose(1, 0, 2, 3)
        return super().extend(layer, _kinds([kind])[0], by_row)

    def room(self, layer: int, kind: LayerCache) -> int | None:
        return super().room(layer, _kinds([kind])[0])


def vectorised_functions(target: Target) -> Functions:
    """Faster element-wise functions for many rows on a CPU, equal to decoding's up to 1e-6."""
    if fused_kernels() or target.dtype != mx.float32:
        return Functions()
    fast = functools.partial(attend, softmax=vectorised.softmax)
    silu = target.config.activation == "silu"
    return Functions(lambda layer: fast, vectorised.swiglu if silu else None)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Left-padded tokens (B, P) and the padding of each row (B,)."""
    length = max(map(len, rows))
    pads = np.array([length - len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), length), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[length - len(row) :] = row
    return tokens, pads
