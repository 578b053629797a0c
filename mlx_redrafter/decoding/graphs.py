"""Compiled steps, as many as memory is worth: of a model of 30 layers each takes some 5 MB."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

MOST = 96


class Graphs:
    """Functions that trace a graph for every size of their arrays, the one used last at the end.

    Where all of them together have traced more than ``most``, those used longest ago are let go;
    they are made again when they are needed.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, tuple[Any, list[None]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[Callable[[], None]], Any]) -> Any:
        """The function of a key. ``make`` is given what is to be called at every trace."""
        if key not in self._kept:
            traced: list[None] = []
            self._kept[key] = make(lambda: traced.append(None)), traced
        self._kept.move_to_end(key)
        total = sum(len(traced) for _, traced in self._kept.values())
        while total > self.most and len(self._kept) > 1:
            _, (_, traced) = self._kept.popitem(last=False)
            total -= len(traced)
        return self._kept[key][0]
