"""The consumer of sparse prefill against attention by its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import prefill_reference as reference
import pytest
from prefill_cases import BLOCK, random_case, who_sees_whom

from mlx_redrafter.models.attention import attend
from mlx_redrafter.prefill import consumer
from mlx_redrafter.prefill.consumer import block_sparse_attention, column_sparse_attention
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Columns
from mlx_redrafter.prefill.sparse import attend_to


def everything(chunk: Chunk) -> list[Any]:
    """Every key, as blocks and as columns."""
    blocks = [mx.broadcast_to(mx.arange(p), (chunk.kv_heads, p)) for p in chunk.past_blocks]
    past = [number * chunk.block for number in chunk.past_blocks]
    seen = [mx.ones((chunk.heads, p), mx.bool_) for p in past]
    return [Blocks(blocks), Columns(seen, [[p] * chunk.heads for p in past])]


def random_blocks(rng: np.random.Generator, chunk: Chunk) -> list[np.ndarray]:
    """For every query block (Hkv, B_j) numbers of blocks before it."""
    chosen = []
    for past in chunk.past_blocks:
        count = int(rng.integers(0, past + 1))
        rows = [rng.permutation(past)[:count] for _ in range(chunk.kv_heads)]
        chosen.append(np.stack(rows).astype(np.int32).reshape(chunk.kv_heads, count))
    return chosen


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize(("offset", "n"), [(0, 48), (64, 16), (112, 128)])
def test_every_key_chosen_is_dense_attention(
    heads: int, kv_heads: int, offset: int, n: int, softcap: float
) -> None:
    q, keys, values = random_case(1, heads, kv_heads, offset, n)
    slab = mx.nan_to_num(reference.slab_of(keys, values, 256))
    mask = mx.arange(256) <= mx.arange(offset, offset + n)[:, None]
    expected = attend(mx.array(q), slab, mask, 0.4, softcap)
    chunk = Chunk(mx.array(q), slab, offset, BLOCK, 0.4, softcap)
    for chosen in everything(chunk):
        assert chosen.pairs(chunk) == chunk.causal_pairs
        assert mx.abs(attend_to(chosen, chunk) - expected).max().item() <= 1e-5


@pytest.mark.parametrize(("dtype", "close"), [(mx.float32, 1e-5), (mx.bfloat16, 2e-2)])
def test_the_fused_kernels_path(
    dtype: mx.Dtype, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Metal runs, through mx.fast's own fallback on a CPU."""
    monkeypatch.setattr("mlx_redrafter.models.attention.fused_kernels", lambda: True)
    q, keys, values = random_case(6, 8, 2, 112, 64)
    slab = mx.nan_to_num(reference.slab_of(keys, values, 256)).astype(dtype)
    table = np.stack([reference.of_blocks([range(7 + j) for j in range(4)], 112, 64, BLOCK)] * 8)
    expected = reference.attention(q, keys, values, table, 0.4, 0.0)
    chunk = Chunk(mx.array(q).astype(dtype), slab, 112, BLOCK, 0.4)
    for chosen in everything(chunk):
        out = attend_to(chosen, chunk).astype(mx.float32)
        assert np.allclose(np.array(out), expected, atol=close)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("seed", range(6))
def test_chosen_blocks_in_any_order_are_the_definition(seed: int, softcap: float) -> None:
    rng = np.random.default_rng(seed)
    q, keys, values = random_case(seed, offset=96, n=80)
    slab = reference.slab_of(keys, values, 192)  # no empty slot is read: they are not numbers
    chunk = Chunk(mx.array(q), slab, 96, BLOCK, 0.4, softcap)
    chosen = random_blocks(rng, chunk)
    tables = [reference.of_blocks([c[kv] for c in chosen], 96, 80, BLOCK) for kv in (0, 0, 1, 1)]
    expected = reference.attention(q, keys, values, np.stack(tables), 0.4, softcap)
    for order in (lambda row: row, np.sort, lambda row: row[::-1]):
        ids = [mx.array(np.apply_along_axis(order, 1, c) if c.size else c) for c in chosen]
        for batch in (1, 4):
            out = block_sparse_attention(
                chunk.q, slab, ids, 96, block=BLOCK, scale=0.4, softcap=softcap, batch=batch
            )
            assert np.allclose(np.array(out), expected, atol=1e-5)


def ones(chunk: Chunk, ids: list[mx.array]) -> float:
    """How far a weighted mean of ones is from one."""
    values = mx.ones_like(chunk.slab[:, chunk.kv_heads :])
    slab = mx.concatenate([chunk.slab[:, : chunk.kv_heads], values], axis=1)
    out = block_sparse_attention(chunk.q, slab, ids, chunk.offset, block=BLOCK, scale=0.4)
    return mx.abs(out - 1).max().item()


def test_who_sees_whom_is_what_was_chosen() -> None:
    q, keys, values = random_case(0)
    chunk = Chunk(mx.array(q), reference.slab_of(keys, values, 128), 64, BLOCK, 0.4)
    chosen = random_blocks(np.random.default_rng(3), chunk)
    counts = who_sees_whom(Blocks([mx.array(c) for c in chosen]), chunk)
    for head in range(4):
        table = reference.of_blocks([c[head // 2] for c in chosen], 64, 48, BLOCK)
        assert np.allclose(counts[head], table, atol=1e-4)


def test_a_block_taken_twice_is_seen() -> None:
    """A mean of ones is one even then: only the table of who sees whom tells."""
    q, keys, values = random_case(0)
    chunk = Chunk(mx.array(q), mx.nan_to_num(reference.slab_of(keys, values, 128)), 64, BLOCK, 0.4)
    once = [mx.broadcast_to(mx.array([0, 2, 3]), (2, 3)) for _ in range(3)]
    twice = [mx.broadcast_to(mx.array([0, 2, 2]), (2, 3)) for _ in range(3)]
    assert ones(chunk, once) <= 1e-6
    assert who_sees_whom(Blocks(once), chunk).max() == pytest.approx(1, abs=1e-4)
    assert who_sees_whom(Blocks(twice), chunk).max() == pytest.approx(2, abs=1e-4)


def diagonal_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The own block is seen whole, what is behind a query included."""

    def mutated(q: mx.array, slab: mx.array, mask: mx.array | None, *rest: Any) -> mx.array:
        rows = q.shape[1]
        mask = mx.ones((rows, slab.shape[2]), mx.bool_) if mask is None else mask
        return attend(q, slab, mask, *rest)

    monkeypatch.setattr(consumer, "attend", mutated)


def off_by(n: int) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        """Block numbers are moved by n."""
        take = mx.take
        monkeypatch.setattr(consumer.mx, "take", lambda a, i, axis: take(a, i + n, axis=axis))

    return mutate


@pytest.mark.parametrize("mutate", [None, diagonal_open, off_by(1), off_by(-1)])
def test_the_comparison_with_the_definition_can_fail(
    mutate: Callable[[pytest.MonkeyPatch], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, keys, values = random_case(5)
    slab = mx.nan_to_num(reference.slab_of(keys, values, 128))
    table = np.stack([reference.of_blocks([[1]] * 3, 64, 48, BLOCK)] * 4)
    expected = reference.attention(q, keys, values, table, 0.4, 0.0)
    if mutate is not None:
        mutate(monkeypatch)
    out = block_sparse_attention(
        mx.array(q), slab, [mx.array([[1], [1]])] * 3, 64, block=BLOCK, scale=0.4
    )
    mx.eval(out)
    assert np.allclose(np.array(out), expected, atol=1e-5) == (mutate is None)


def test_columns_of_heads_with_unlike_numbers_are_the_definition() -> None:
    """Heads are padded together where their numbers are alike; the order of heads stays."""
    rng = np.random.default_rng(0)
    q, keys, values = random_case(2, 6, 3, 512, 32)
    slab = reference.slab_of(keys, values, 640)
    share = np.array([1.0, 0.01, 0.5, 0.0, 0.9, 0.02])[:, None]
    seen = [rng.random((6, past)) < share for past in (512, 528)]
    counts = [row.sum(axis=1).tolist() for row in seen]
    assert consumer.padded_together(counts[0]) == [[0, 2, 4], [1, 3, 5]]
    out = column_sparse_attention(
        mx.array(q), slab, [mx.array(row) for row in seen], counts, 512, block=BLOCK, scale=0.4
    )
    table = np.stack([reference.of_blocks([[], []], 512, 32, BLOCK)] * 6)
    table[:, :16, :512] |= seen[0][:, None]
    table[:, 16:, :528] |= seen[1][:, None]
    expected = reference.attention(q, keys, values, table, 0.4, 0.0)
    assert np.allclose(np.array(out), expected, atol=1e-5)


def peak(run: Callable[[], mx.array]) -> int:
    """Bytes that a computation needs at its worst moment."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return mx.get_peak_memory() - before


def test_neither_the_slab_nor_all_that_is_gathered_is_held_at_once() -> None:
    """A slab is far larger than what is read of it; so is what all query blocks gather."""
    q, slab = mx.random.normal((4, 2048, 32)), mx.random.normal((1, 4, 65536, 32))
    mx.eval(q, slab)
    few, all_of_them = q[:, :128], 2048 // 128
    ids = [mx.zeros((2, 1), mx.int32)]
    assert peak(lambda: block_sparse_attention(few, slab, ids, 8192, block=128, scale=1.0)) < (
        slab.nbytes / 4
    )
    ids = [mx.broadcast_to(mx.arange(16, dtype=mx.int32), (2, 16))] * all_of_them

    def run() -> mx.array:
        return block_sparse_attention(q, slab, ids, 8192, block=128, scale=1.0, batch=1)

    bounded = peak(run)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(consumer.mx, "depends", lambda arrays, _: arrays)
        unbounded = peak(run)
    assert bounded < 0.6 * unbounded
