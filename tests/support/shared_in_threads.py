"""Machines that share a model, played by threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.distributed.link import Link


class Meeting:
    """Where so many threads exchange arrays."""

    def __init__(self, size: int) -> None:
        self.size, self.given = size, [np.zeros(0)] * size
        self.barrier = threading.Barrier(size, timeout=30)

    def exchange(self, rank: int, x: np.ndarray) -> list[np.ndarray]:
        self.given[rank] = x
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class ThreadLink(Link):
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self.rank, self.size = meeting, rank, meeting.size
        self.alike, self.collectives = True, 0

    def gather(self, x: mx.array) -> list[mx.array]:
        self.collectives += 1
        mine = np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)
        return [mx.array(part).astype(x.dtype) for part in self._meeting.exchange(self.rank, mine)]


def on_all(size: int, work: Callable[[Link], Any]) -> list[Any]:
    """What every machine's work returns; raises the first one's error."""
    meeting, found = Meeting(size), [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadLink(meeting, rank))
        except BaseException as error:
            meeting.barrier.abort()
            errors.append(error)
        finally:
            mx.clear_streams()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    if real or errors:
        raise (real or errors)[0]
    return found
