"""KV slabs against a naive reference, and that nothing copies them."""

from __future__ import annotations

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest

from mlx_redrafter.cache.layer import Pass
from mlx_redrafter.cache.slabs import Slab, capacity_for

HEADS, DIM = 2, 8
SLAB = Slab(2 * HEADS, DIM)


def rows(n: int, seed: int) -> mx.array:
    return mx.random.normal((1, HEADS, n, DIM), key=mx.random.key(seed))


def test_capacities_hold_what_is_asked_and_waste_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    sizes = sorted({capacity_for(n) for n in range(40_000)})
    assert sizes[:3] == [128, 256, 384] and {2048, 2304, 4096, 4608, 8192, 9216} <= {*sizes}
    assert 2176 not in sizes
    for n in range(1, 40_000):
        assert n <= capacity_for(n) < n + max(128, n // 7)
        assert capacity_for(capacity_for(n)) == capacity_for(n)


def test_append_and_grow_equal_a_naive_reference() -> None:
    slab = SLAB.empty(16, mx.float32)
    naive = np.zeros(slab.shape, np.float32)
    start = 0
    for seed, n in enumerate([5, 1, 4]):
        k, v = rows(n, seed), rows(n, seed + 10)
        new = mx.concatenate([k, v], axis=1)
        slab = Pass([slab], mx.array([start])).extend(0, SLAB, new)
        naive[:, :HEADS, start : start + n] = k
        naive[:, HEADS:, start : start + n] = v
        start += n
    assert np.array_equal(slab, naive)
    larger = SLAB.grow(slab, 24)
    assert larger.shape[2] == 24
    assert np.array_equal(larger[:, :, :16], naive) and not mx.any(larger[:, :, 16:])
    assert SLAB.grow(larger, 24) is larger


def test_commit_puts_accepted_rows_before_the_new_ones() -> None:
    slab = SLAB.empty(16, mx.float32)
    pending = mx.concatenate([rows(4, 1), rows(4, 2)], axis=1)
    new = mx.concatenate([rows(4, 3), rows(4, 4)], axis=1)
    # Rows 0 and 2 were accepted, the others go to a slot that nobody reads.
    run = Pass([slab], mx.array([8]), pending=([pending], mx.array([6, 13, 7, 13])))
    slab = run.extend(0, SLAB, new)
    expected = np.zeros(slab.shape, np.float32)
    expected[:, :, 6:8] = np.array(pending)[:, :, [0, 2]]
    expected[:, :, 8:12] = new
    assert np.array_equal(np.delete(slab, 13, axis=2), np.delete(expected, 13, axis=2))
    assert np.array_equal(run.rows[0], new)


@pytest.mark.parametrize("hold", [False, True])
def test_compiled_updates_write_in_place(hold: bool) -> None:
    @mx.compile
    def step(slab, pending, new, offset, slots):  # type: ignore[no-untyped-def]
        run = Pass([slab], offset, pending=([pending], slots))
        return run.extend(0, SLAB, new * 2), run.rows[0]

    slab = SLAB.empty(65_536, mx.float32)  # 8 MB
    pending, new = mx.zeros((1, 2 * HEADS, 4, DIM)), mx.ones((1, 2 * HEADS, 4, DIM))
    offset, slots = mx.array([5]), mx.array([3, 9, 4, 9])
    mx.eval(slab, pending, new, offset, slots)
    # Holding a second reference is the known mistake, and must cost a copy.
    held = [slab] if hold else []
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(5):
        slab, pending = step(slab, pending, new, offset, slots)
        mx.eval(slab, pending)
    grown = mx.get_peak_memory() - before
    del held
    assert (grown >= slab.nbytes) == hold, (grown, slab.nbytes)
