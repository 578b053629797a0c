"""What machines that share a model tell each other inside a pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx


class Link:
    """A group of machines.

    All that they exchange is gathered, and what is summed is summed here in the order of the ranks:
    a back end's own sums depend on the number of rows (docs/decisions.md), and drafted text would
    not be plain text.

    Args:
        group: of `mx.distributed`.

    ``alike``: do all of them round alike? ``collectives`` counts those that were traced.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = int(group.rank()), int(group.size())
        self.alike = True
        self.collectives = 0

    def gather(self, x: mx.array) -> list[mx.array]:
        """Everybody's x (N, *), in the order of the ranks. The parts are views."""
        self.collectives += 1
        every = mx.distributed.all_gather(x, group=self._group)
        return list(mx.split(every, self.size, axis=0))

    def total(self, x: mx.array) -> mx.array:
        """The sum of everybody's x (N, *), in float32 where that is 16 bits wide."""
        first, *others = (part.astype(mx.float32) for part in self.gather(x))
        for part in others:
            first = first + part
        return first.astype(x.dtype)

    def common(self, *arrays: mx.array) -> Sequence[mx.array]:
        """Integers or truths of the first rank, where not all round alike."""
        if self.alike:
            return arrays
        flat = mx.concatenate([x.astype(mx.int32).reshape(-1) for x in arrays])
        ends = list(itertools.accumulate(x.size for x in arrays[:-1]))
        parts = mx.split(self.gather(flat)[0], ends) if ends else [self.gather(flat)[0]]
        return [
            part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, arrays, strict=True)
        ]

    def numbers(self, *values: int) -> list[list[int]]:
        """Everybody's integers, now."""
        parts = self.gather(mx.array([values], mx.int64))
        return [cast(list[list[int]], part.tolist())[0] for part in parts]

    def texts(self, text: str) -> list[str]:
        """Everybody's text, now."""
        data = text.encode()
        longest = max(size for (size,) in self.numbers(len(data)))
        padded = mx.array(list(data.ljust(longest, b"\0")), mx.uint8)
        return [
            bytes(cast(list[int], part.tolist())).rstrip(b"\0").decode()
            for part in self.gather(padded)
        ]
