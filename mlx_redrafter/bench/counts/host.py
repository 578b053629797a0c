"""What the host does for a step: how often it waits for the device, and how long it takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

WORK = ("eval", "async_eval", "synchronize")
WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "__iter__", "__index__")
_TOKENS = 24


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Within it the list grows by the name of every call that hands the device work (``WORK``) or
    waits for it (``WAITS``), in order. NumPy's buffer protocol is not seen."""
    log: list[str] = []

    def recording(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def recorded(*args: Any, **options: Any) -> Any:
            log.append(name)
            return original(*args, **options)

        return recorded

    with contextlib.ExitStack() as stack:
        for owner, names in ((mx, WORK), (mx.array, WAITS)):
            for name in names:
                if original := getattr(owner, name, None):
                    stack.enter_context(patch.object(owner, name, recording(original, name)))
        yield log


@dataclass(frozen=True)
class Host:
    """Of a running answer: waits and traces are counted, seconds are measured here."""

    syncs_per_step: float
    traces: int
    launch_seconds: float


def run(engine: Engine, prompt: list[int], shape: TreeShape) -> Host:
    """A short greedy answer, once to trace and compile, and once counted."""
    traces = engine.traces
    list(engine.generate(Request(prompt, SamplingParams(), shape, _TOKENS)))
    traces = engine.traces - traces
    stats, seconds = DraftStats(), list[float]()

    def timed(step: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*args: Any) -> Any:
            start = time.perf_counter()
            result = step(*args)
            seconds.append(time.perf_counter() - start)
            return result

        return launch

    steps = engine.step_function
    with patch.object(engine, "step_function", lambda spec: timed(steps(spec))):
        answer = engine.generate(Request(prompt, SamplingParams(), shape, _TOKENS, stats=stats))
        next(answer)  # the prompt, and the first step
        with watched() as log:
            list(answer)
    waits = sum(name != "async_eval" for name in log)
    return Host(waits / max(1, stats.steps - 1), traces, statistics.median(seconds))
