"""What a layer remembers of a sequence, whatever it is: one protocol, and one pass as it sees it.

A slab of keys and values, the state of a recurrence, a window: a kind says how its arrays are made,
extended and cut; the arrays themselves travel with the step's state. Everything but ``empty`` and
``grow`` is a pure expression that mx.compile can trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_redrafter.cache.lineage import Lineage

Kept = Any
"""A layer's arrays: one, or a tuple of them."""
Rows = Any
"""What one pass adds to a layer: an array or a tuple, by node, and () where nothing waits."""


class LayerCache(Protocol):
    """One kind of memory. ``N`` nodes are run in a pass, ``N'`` were run in the pass before."""

    cuts_anywhere: bool
    """Can the sequence be cut behind every token? Else only where a snapshot was taken."""

    @property
    def in_place(self) -> bool:
        """Does an accepted chain stand where it belongs as soon as it is written, without a
        commit?"""
        ...

    @property
    def ahead(self) -> int:
        """Tokens behind a position that what is kept of it depends on."""
        ...

    def empty(self, capacity: int, dtype: mx.Dtype, rows: int = 1) -> Kept:
        """Of ``rows`` sequences without a token, with room for so many tokens."""
        ...

    def grow(self, kept: Kept, capacity: int) -> Kept:
        """The same with more room."""
        ...

    def capacity(self, kept: Kept) -> int | None:
        """Tokens that it has room for; None where room does not depend on them."""
        ...

    def nothing(self, kept: Kept, nodes: int) -> Rows:
        """What a pass over so many nodes leaves pending, with nothing in it."""
        ...

    def commit(self, kept: Kept, pending: Rows, slots: mx.array, position: mx.array) -> Kept:
        """Put the accepted nodes of the pass before into place.

        Args:
            slots: (N',) int32, the position of every node that was accepted; all others have one
                beyond the next tree, never below ``position``.
            position: (1,) int32, of the root of this pass: what is accepted lies before it.
        """
        ...

    def extend(self, kept: Kept, rows: Any, to: Pass) -> tuple[Kept, Rows, Any]:
        """Add what this pass's nodes bring.

        Returns:
            the arrays, the rows that wait for the next pass's commit, and what the layer reads.
        """
        ...


class Pass:
    """One pass over N nodes, as the caches see it. Made anew for every pass, and used up by it.

    A layer's arrays are handed to whoever asks first and not kept: MLX writes into a buffer that
    nobody else holds, and copies it otherwise.

    Args:
        caches: every layer's arrays.
        position: (1,) int32, of the first node.
        ancestors: (N, N) bool, whom each node follows, itself included; None: each follows the one
            before it, and all are here to stay (a chunk of a prompt).
        pending: (rows per layer, slots (N',)) of the pass before, if they have yet to be put into
            place.
    """

    def __init__(
        self,
        caches: Sequence[Kept],
        position: mx.array,
        ancestors: mx.array | None = None,
        pending: tuple[Sequence[Rows], mx.array] | tuple[()] = (),
    ) -> None:
        self._before, self._after = dict(enumerate(caches)), dict[int, Kept]()
        self._rows = dict.fromkeys(self._before, cast(Rows, ()))
        self.position, self.ancestors, self.pending = position, ancestors, pending
        self._lineage: Lineage | None = None
        self._slots: dict[int, mx.array] = {}

    def slots(self, n: int) -> mx.array:
        """The n positions from the first on, (n,) int32: made once for all layers."""
        if n not in self._slots:
            self._slots[n] = self.position + mx.array(np.arange(n, dtype=np.int32))
        return self._slots[n]

    @property
    def lineage(self) -> Lineage | None:
        """Whom every node goes on from; None: a chunk of a prompt."""
        if self._lineage is None and self.ancestors is not None:
            self._lineage = Lineage(self.ancestors)
        return self._lineage

    @property
    def caches(self) -> list[Kept]:
        """Of the layers that were settled or extended, in order."""
        return [self._after[i] for i in sorted(self._after)]

    @property
    def rows(self) -> list[Rows]:
        """By layer, what waits for the next pass's commit."""
        return list(self._rows.values())

    @property
    def there(self) -> bool:
        """Is there any layer?"""
        return bool(self._before or self._after)

    @property
    def fresh(self) -> bool:
        """Has nobody asked for a layer yet?"""
        return not self._after

    def capacity(self, kinds: Sequence[LayerCache]) -> int | None:
        """Tokens that all layers have room for; None without a limit. Before they are extended."""
        return capacity_of(kinds, list(self._before.values()))

    def room(self, layer: int, kind: LayerCache) -> int | None:
        """Tokens that a layer has room for; None where room does not depend on them. Before it is
        extended."""
        return kind.capacity(self._before[layer])

    def settled(self, layer: int, kind: LayerCache) -> Kept:
        """A layer's arrays with the pass before in its place, for whoever only reads them."""
        if layer in self._before:
            kept = self._before.pop(layer)
            if self.pending:
                waiting, slots = self.pending
                if not (isinstance(waiting[layer], tuple) and waiting[layer] == ()):
                    kept = kind.commit(kept, waiting[layer], slots, self.position)
            self._after[layer] = kept
        return self._after[layer]

    def settle(self, kinds: Sequence[LayerCache]) -> None:
        """Put the pass before into its place in every layer that nobody asked."""
        for layer in list(self._before):
            self.settled(layer, kinds[layer])

    def extend(self, layer: int, kind: LayerCache, rows: Any) -> Any:
        """Commit and extend a layer's cache; what the layer reads."""
        self.settled(layer, kind)
        kept = self._after.pop(layer)
        kept, self._rows[layer], seen = kind.extend(kept, rows, self)
        self._after[layer] = kept
        return seen

    def leave(self, layer: int, rows: Rows) -> None:
        """What this pass adds to a layer that does not read it: it waits for the next one."""
        self._rows[layer] = rows


def new_caches(
    kinds: Sequence[LayerCache], capacity: int, dtype: mx.Dtype, rows: int = 1
) -> list[Kept]:
    """Empty ones of all layers, for ``rows`` sequences."""
    return [kind.empty(capacity, dtype, rows) for kind in kinds]


def capacity_of(kinds: Sequence[LayerCache], caches: Sequence[Kept]) -> int | None:
    """Tokens that all layers have room for; None without a limit."""
    rooms = (kind.capacity(kept) for kind, kept in zip(kinds, caches, strict=True))
    return min((room for room in rooms if room is not None), default=None)


def grown(kinds: Sequence[LayerCache], caches: Sequence[Kept], capacity: int) -> list[Kept]:
    """The caches with room for so many tokens."""
    return [kind.grow(kept, capacity) for kind, kept in zip(kinds, caches, strict=True)]


def bytes_of(kinds: Sequence[LayerCache], tokens: int, dtype: mx.Dtype) -> int:
    """Memory of caches with room for so many tokens; no array is made."""
    arrays = cast(list[tuple[str, mx.array]], tree_flatten(new_caches(kinds, tokens, dtype)))
    return sum(array.nbytes for _, array in arrays)
