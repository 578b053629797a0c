"""What a bare pass of the target over N tokens takes: nothing drafted, nothing chosen from."""

from __future__ import annotations

import statistics
import time

import mlx.core as mx

from mlx_redrafter.budget.costs import verify_pass
from mlx_redrafter.cache.layer import new_caches
from mlx_redrafter.models import Target


class VerifyClock:
    """Times verify passes ``t(N)`` over slabs of one capacity, the choice of the tokens included.

    Args:
        target: the model.
        capacity: slots of a slab; a pass reads all of them, however many are filled.
        compiled: as the engine runs its steps.
    """

    PASSES = 2  # launched one behind the other, as decoding does, and waited for once
    REPEATS = 3  # of which the median counts: a single one may be disturbed

    def __init__(self, target: Target, capacity: int, compiled: bool = True) -> None:
        run = verify_pass(target)
        self._run = mx.compile(run) if compiled else run
        self._caches = new_caches(target.caches, capacity, target.dtype)
        self._position = mx.array([capacity // 2], mx.int32)
        self._warm: set[int] = set()

    def seconds(self, nodes: int) -> float:
        """Seconds of a pass over ``nodes`` tokens; the first call of a size warms up."""
        if nodes not in self._warm:
            self._passes(nodes)
            self._warm.add(nodes)
        return statistics.median(self._passes(nodes) for _ in range(self.REPEATS))

    def _passes(self, nodes: int) -> float:
        start = time.perf_counter()
        tokens = mx.zeros((nodes,), mx.int32)
        for _ in range(self.PASSES):
            tokens, self._caches = self._run(tokens, self._position, self._caches)
            mx.async_eval(tokens, self._caches)
        mx.eval(tokens, self._caches)
        return (time.perf_counter() - start) / self.PASSES
