"""What layers that cannot be cut anywhere held at earlier places of a sequence, in bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_redrafter.cache.layer import Kept, LayerCache
from mlx_redrafter.runtime.checks import whole
from mlx_redrafter.runtime.device import memory_bytes

_SHARE = 16  # of the machine's memory, one for snapshots


class Snapshots:
    """By number of tokens, the arrays of layers by index. Older ones make room for newer ones.

    Args:
        limit: bytes of all together; where not one fits, none is kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: dict[int, Mapping[int, Kept]] = {}
        self._turns: set[int] = set()

    def __iter__(self) -> Iterator[int]:
        """The numbers of tokens, rising."""
        return iter(sorted(self._kept))

    def __getitem__(self, stand: int) -> Mapping[int, Kept]:
        return self._kept[stand]

    @property
    def nbytes(self) -> int:
        return sum(map(nbytes, self._kept.values()))

    def add(self, stand: int, arrays: Mapping[int, Kept], turn: bool) -> None:
        """The newest. turn: a prompt or an answer ends there, where another may begin."""
        self._kept[stand] = arrays
        if turn:
            self._turns.add(stand)
        while self._kept and self.nbytes > self.limit:
            self._drop(self._least())

    def cut(self, length: int) -> int | None:
        """Forget what lies beyond so many tokens; the newest that is left, if there is any."""
        for stand in [stand for stand in self._kept if stand > length]:
            self._drop(stand)
        return max(self._kept, default=None)

    def copied(self) -> Snapshots:
        """The same, to go on by itself; arrays are never written into."""
        other = Snapshots(self.limit)
        other._kept, other._turns = dict(self._kept), set(self._turns)
        return other

    def clear(self) -> None:
        self._kept.clear()
        self._turns.clear()

    def _drop(self, stand: int) -> None:
        del self._kept[stand]
        self._turns.discard(stand)

    def _least(self) -> int:
        """The one that is missed least: within a turn before at its end, and old ones that are
        close together before others. The first and the newest go last, in this order."""
        stands = list(self)
        if len(stands) < 3:
            return stands[0]
        triples = list(zip(stands, stands[1:], stands[2:], strict=False))
        within = [triple for triple in triples if triple[1] not in self._turns]
        newest = stands[-1]
        return min(within or triples, key=lambda t: (t[2] - t[0]) / (newest - t[1]))[1]


def limit_of(given: int | None) -> int:
    """Bytes for all snapshots of a session; None: a share of the machine's memory.

    Raises OptionError.
    """
    return memory_bytes() // _SHARE if given is None else whole("snapshot_bytes", given, 0)


def states(kinds: Sequence[LayerCache], element: int) -> int:
    """Bytes of one snapshot: what layers hold that cannot be cut anywhere. Nothing is computed.

    Args:
        element: bytes of an activation where the model runs.
    """
    kept = [kind.empty(1, mx.float16) for kind in kinds if not kind.cuts_anywhere]
    arrays = cast(list[tuple[str, mx.array]], tree_flatten(kept))
    return sum(array.size * max(array.itemsize, element) for _, array in arrays)


def nbytes(kept: Kept) -> int:
    """Of a layer's arrays, or of several layers'."""

    arrays = cast(list[tuple[str, mx.array]], tree_flatten(kept))
    return sum(array.nbytes for _, array in arrays)
