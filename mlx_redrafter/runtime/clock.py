"""Timing what does the same in several ways, on a machine that is doing other things too."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from mlx_redrafter.runtime.device import fused_kernels

Run = Callable[[], None]
Name = TypeVar("Name")
IN_A_ROW = 4
Agree = Callable[[list[float]], list[float]]

_agree: contextvars.ContextVar[Agree] = contextvars.ContextVar("agree", default=lambda x: x)


def in_a_row() -> int:
    """How many passes a `launched` run is. In an answer a GPU is handed the next step while it is
    at the one before: one pass, launched and awaited, would take longer by the launch and the wait,
    and a short one more so than a long one."""
    return IN_A_ROW if fused_kernels() else 1


def launched(launch: Callable[[], Any]) -> Run:
    """So many passes, of which only the last is awaited. launch: starts one that needs what the one
    before it made, and returns its arrays."""
    import mlx.core as mx

    def run() -> None:
        for _ in range(in_a_row() - 1):
            mx.async_eval(launch())
        mx.eval(launch())

    return run


def fastest_pass(runs: Mapping[Name, Run], rounds: int, warm: bool = False) -> dict[Name, float]:
    """`fastest` of `launched` runs: seconds of one pass."""
    return {name: each / in_a_row() for name, each in fastest(runs, rounds, warm).items()}


class Laps:
    """Seconds of steps that are started one ahead, by when each was read.

    A step that was there before its reader came tells nothing, and neither does the one behind it:
    nobody saw the one end and the other begin. A CPU starts a step by doing most of it, so that one
    is read when the next is nearly done; the last, with none behind it, would seem to take no time.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Something else came between."""
        self._last = time.perf_counter()  # when one was read
        self._seen = False  # was somebody waiting for it?
        self._behind = 0

    def ended(self, came: float, now: float, behind: int) -> float | None:
        """A step was read: its seconds, if they are known.

        Args:
            came: when the reader did, to start the next one and to wait.
            behind: answers whose next step was started before this one was read.
        """
        passed, began = now - self._last, self._seen and behind == self._behind
        self._last, self._seen, self._behind = now, now - came > passed / 2, behind
        return passed if began and self._seen else None


@contextlib.contextmanager
def agreed(agree: Agree) -> Iterator[None]:
    """Within, what a clock says is what ``agree`` makes of it: that of one machine for all that do
    the same, whose numbers of rounds must be equal too."""
    before = _agree.set(agree)
    try:
        yield
    finally:
        _agree.reset(before)


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
    found, agree = {name: float("inf") for name in runs}, _agree.get()
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and agree([time.perf_counter() - begin])[0] > patience:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name] = min(found[name], time.perf_counter() - start)
    return dict(zip(found, agree(list(found.values())), strict=True))
