"""Positions of drafters that see a conversation from its beginning: answers of like length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mlx_redrafter.training.data import Batch, Before, Place, Positions, Rows
from mlx_redrafter.training.shards import Shard, batched


class Span(NamedTuple):
    """A conversation's rows: where they begin, how many are the prompt's and the answer's."""

    first: int
    prompt: int
    answer: int


class WholeRows(Rows):
    """A shard's conversations: the tokens of each but its first are rows, one after the other."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(shard)
        conversations = shard.conversations()
        self.all = np.concatenate(
            [np.array(c.prompt[1:] + c.answer, np.int32) for c in conversations]
        )
        self.prompts = np.array([len(c.prompt) - 1 for c in conversations])
        self.answers = np.array([len(c.answer) for c in conversations])
        self.firsts = np.cumsum(self.prompts + self.answers) - self.prompts - self.answers

    @property
    def size(self) -> int:
        return len(self.all)

    def span(self, conversation: int) -> Span:
        return Span(*(int(n[conversation]) for n in (self.firsts, self.prompts, self.answers)))


class Conversations(Positions):
    """Batches of answers whose lengths are nearly the same, each with all that is before it.

    Lengths are rounded up to whole segments, so that there are few shapes.
    """

    whole, rows_of = True, WholeRows
    rows: list[WholeRows]

    def _planned(
        self, group: Sequence[int], size: int, random: np.random.Generator
    ) -> Iterator[Sequence[Place]]:
        """Batches of about ``size`` segments."""
        places = [(int(i), c) for i in group for c in range(self.rows[i].trained)]
        parts = self._parts([places[i] for i in random.permutation(len(places))], size)
        return (parts[i] for i in random.permutation(len(parts)))

    def held_out(self, size: int, count: int) -> list[Batch]:
        """Up to ``count`` batches of conversations that are never trained on."""
        places = [
            (i, c)
            for i, row in enumerate(self.rows[: self._first])
            for c in range(row.trained, len(row.answers))
        ]
        parts = self._parts(places, size)
        every = max(1, -(-len(parts) // count))
        return [self._batch(part, held_out=True) for part in parts[::every]]

    def _parts(self, places: Sequence[Place], size: int) -> list[list[Place]]:
        """In batches of answers of like length, as many as have about ``size`` segments."""
        alike: dict[int, list[Place]] = defaultdict(list)
        for i, c in places:
            if self.rows[i].answers[c] > 1:
                alike[self._length(int(self.rows[i].answers[c]) - 1)].append((i, c))
        parts = []
        for length, some in sorted(alike.items()):
            runs = max(1, round(size * self.segment / (length - self.segment / 2)))
            filled = some + [some[i % len(some)] for i in range(-len(some) % runs)]
            parts += [list(part) for part in batched(filled, runs)]
        return parts

    def _length(self, count: int) -> int:
        """In whole segments."""
        return max(1, -(-count // self.segment)) * self.segment

    def _batch(self, blocks: Sequence[Place], held_out: bool) -> Batch:
        self._need({i for i, _ in blocks})
        steps, runs = self.rollout, len(blocks)
        spans = [self.rows[i].span(c) for i, c in blocks]
        length = self._length(max(span.answer for span in spans) - 1)
        before = self._length(max(span.prompt for span in spans))
        size, width = self.target.target.config.hidden_size, before + length + steps
        tokens = np.zeros((runs, width), np.int32)
        features = np.zeros((runs, width, len(self._pick), size), np.float16)
        seen = np.zeros((runs, before), bool)
        valid = np.zeros((steps, runs, length), np.float32)
        for b, ((i, _), span) in enumerate(zip(blocks, spans, strict=True)):
            row, rows = self.rows[i], slice(span.first, span.first + span.prompt + span.answer)
            at = slice(before - span.prompt, before + span.answer)
            tokens[b, at], features[b, at] = row.all[rows], row.open()[rows][:, self._pick]
            seen[b, before - span.prompt :] = True
            for k in range(1, steps + 1):
                valid[k - 1, b, : max(0, span.answer - k)] = 1
        return Batch(
            tokens[:, before:], features[:, before:], valid,
            Before(tokens[:, :before], features[:, :before], seen),
        )  # fmt: skip
