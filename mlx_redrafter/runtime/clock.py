"""Timing what does the same in several ways, on a machine that is doing other things too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

Run = Callable[[], None]
Name = TypeVar("Name")


def fastest(
    runs: Mapping[Name, Run], rounds: int, warm: bool = False, patience: float = 2.0
) -> dict[Name, float]:
    """Seconds of the fastest of so many rounds, all in turns: whatever else the machine does can
    only make a run slower. Fewer rounds, but two, where they take longer than ``patience``.

    Args:
        warm: run each once before.
        patience: seconds, after which no third round is begun.
    """
    if warm:
        for run in runs.values():
            run()
    found = {name: float("inf") for name in runs}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - begin > patience:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name] = min(found[name], time.perf_counter() - start)
    return found
