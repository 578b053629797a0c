"""Whole prefills of one length: dense and sparse in turns, and what may be expected."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_redrafter.budget.chunks import USUAL
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.models import Target
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.reading import read
from mlx_redrafter.prefill.sparse import SparseAttention
from mlx_redrafter.stats import PrefillStats

DENSE = "dense"
STEP = USUAL  # tokens of a pass


@dataclass(frozen=True)
class Reading:
    """One prefill: wall and processor seconds, and what sparse prefill did."""

    way: str
    seconds: float
    processor: float
    stats: PrefillStats | None


def read_once(target: Target, prompt: Sequence[int], sparse: SparseAttention | None) -> None:
    """Into a new session; all but the last token."""
    read(target, prompt, new_session(target, len(prompt)), STEP, sparse=sparse)


def new_session(target: Target, length: int) -> Session:
    """With room for so many tokens."""
    return Session().open(target.caches, capacity_for(length), target.dtype)


def timed(
    target: Target, prompt: Sequence[int], way: str, options: SparsePrefill | None
) -> Reading:
    """One prefill on the clock."""
    sparse = SparseAttention(options, target.config) if options is not None else None
    return probed(target, prompt, sparse, way)


def probed(
    target: Target, prompt: Sequence[int], sparse: SparseAttention | None, way: str = "probe"
) -> Reading:
    """The same with an attention of one's own."""
    start, busy = time.perf_counter(), time.process_time()
    read_once(target, prompt, sparse)
    seconds, processor = time.perf_counter() - start, time.process_time() - busy
    return Reading(way, seconds, processor, sparse.stats if sparse is not None else None)


def in_turn(
    target: Target,
    prompt: Sequence[int],
    ways: Mapping[str, SparsePrefill | None],
    turn: int,
    done: Callable[[], None] = lambda: None,
) -> list[Reading]:
    """Every way once; each turn begins with another one."""
    names, found = list(ways), []
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        found.append(timed(target, prompt, name, ways[name]))
        done()
    return found


def expected(seconds: float, share: float, density: float) -> float:
    """Seconds of a prefill of whose attention, a share of the time, so much is left (Amdahl).

    Selection and gathering are taken to be free.
    """
    return seconds * (1 - share * (1 - density))


def rows(rounds: Sequence[Sequence[Reading]], share: float) -> list[dict[str, Any]]:
    """One row for every way: medians, ratios within a round, and the expectation."""
    ways = [one.way for one in rounds[0] if one.way != DENSE]  # the first turn begins with it
    dense = {i: _of(turn, DENSE) for i, turn in enumerate(rounds)}
    found = [_row(list(dense.values()))]
    seconds = found[0]["seconds"]
    for way in ways:
        mine = [_of(turn, way) for turn in rounds]
        ratios = [dense[i].seconds / one.seconds for i, one in enumerate(mine)]
        busy = [dense[i].processor / one.processor for i, one in enumerate(mine)]
        stats = mine[0].stats
        assert stats is not None, "every way but the dense one has statistics"
        predicted = expected(seconds, share, stats.whole_density)
        found.append({
            **_row(mine),
            "times_dense": round(statistics.median(ratios), 4),
            "times_dense_processor": round(statistics.median(busy), 4),
            "predicted_seconds": round(predicted, 4),
            "predicted_times_dense": round(seconds / predicted, 4),
            **stats.as_dict(),
        })  # fmt: skip
    return found


def _of(turn: Sequence[Reading], way: str) -> Reading:
    return next(one for one in turn if one.way == way)


def _row(readings: Sequence[Reading]) -> dict[str, Any]:
    seconds = [one.seconds for one in readings]
    return {
        "way": readings[0].way,
        "seconds": round(statistics.median(seconds), 4),
        "all_seconds": [round(s, 4) for s in seconds],
        "processor_seconds": [round(one.processor, 4) for one in readings],
    }
