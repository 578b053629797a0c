"""What the selectors choose, against definitions in NumPy and planted structure."""

from __future__ import annotations

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import prefill_reference as reference
import pytest
from prefill_cases import BLOCK, random_case, who_sees_whom

from mlx_redrafter.prefill import minference
from mlx_redrafter.prefill.config import HeadPattern, SparsePrefill
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Columns, a_shape
from mlx_redrafter.prefill.sparse import SELECTORS
from mlx_redrafter.prefill.xattention import block_mass, ranked, xattention


def chunk_of(seed: int, softcap: float = 0.0, **sizes: int) -> Chunk:
    q, keys, values = random_case(seed, **sizes)
    length = keys.shape[1]
    slab = reference.slab_of(keys, values, -(-length // 128) * 128)
    return Chunk(mx.array(q), slab, length - q.shape[1], BLOCK, 0.4, softcap)


def options_of(mode: str, **changes: object) -> SparsePrefill:
    given = {"block": BLOCK, "stride": 4, "sink": 16, "local": 32, "max_density": 1.0}
    return SparsePrefill(mode, **{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", SELECTORS)
@pytest.mark.parametrize("offset", [0, 16, 160])
def test_every_selector_keeps_sink_window_and_diagonal_and_shows_no_future(
    mode: str, offset: int
) -> None:
    chunk = chunk_of(4, offset=offset, n=64)
    chosen = SELECTORS[mode](options_of(mode, tau=0.3))(0, chunk)
    counts = who_sees_whom(chosen, chunk)
    assert np.allclose(counts, np.round(counts), atol=1e-3)
    assert counts.max() < 1.5  # nothing twice
    for row in range(64):
        position = offset + row
        first = position - position % BLOCK
        assert np.all(counts[:, row, position + 1 :] < 0.5)
        kept = {*range(min(16, first)), *range(max(0, first - 32), position + 1)}
        assert np.all(counts[:, row, sorted(kept)] > 0.5)


def test_a_shape_keeps_nothing_else() -> None:
    chosen = a_shape(options_of("a_shape"))(0, chunk_of(0, offset=96, n=32))
    assert isinstance(chosen, Blocks)
    assert [ids.tolist() for ids in chosen.ids] == [[[0, 4, 5]] * 2, [[0, 5, 6]] * 2]


def antidiagonal_mass(chunk: Chunk, stride: int) -> np.ndarray:
    """(Hkv, n/b, length/b) by loops over squares and their antidiagonals."""
    q, keys = np.array(chunk.q, np.float64), np.array(chunk.keys, np.float64)
    rows, columns = q.shape[1] // stride, keys.shape[1] // stride
    first, per = chunk.offset // stride, chunk.block // stride
    out = np.zeros((len(keys), rows // per, columns // per))
    for head in range(len(q)):
        kv = head // (len(q) // len(keys))
        for i in range(rows):
            scores = np.full(columns, -np.inf)
            for j in range(first + i + 1):
                pairs = [
                    q[head, i * stride + stride - 1 - s] @ keys[kv, j * stride + s]
                    for s in range(stride)
                ]
                mean = np.mean(pairs) * chunk.scale
                scores[j] = np.tanh(mean / chunk.softcap) * chunk.softcap if chunk.softcap else mean
            mass = np.exp(scores - scores.max())
            for j in range(columns):
                out[kv, i // per, j // per] += mass[j] / mass.sum()
    return out


@pytest.mark.parametrize("softcap", [0.0, 0.5])
def test_block_mass_is_the_sum_of_antidiagonals(softcap: float) -> None:
    chunk = chunk_of(7, offset=48, n=32, softcap=softcap)
    mass = np.array(block_mass(chunk, 4))
    assert mass.shape == (2, 2, 5)
    assert np.allclose(mass, antidiagonal_mass(chunk, 4), atol=1e-5)
    assert np.allclose(mass.sum(axis=-1), 2 * 4, atol=1e-4)  # two heads, four rows of squares


@pytest.mark.parametrize("tau", [0.2, 0.6, 0.9])
def test_xattention_takes_the_fewest_blocks_that_hold_tau(tau: float) -> None:
    chunk = chunk_of(8, offset=160, n=48)
    chosen = xattention(options_of("xattention", tau=tau, sink=16, local=16))(0, chunk)
    assert isinstance(chosen, Blocks)
    mass = antidiagonal_mass(chunk, 4)
    for j, own in enumerate(chunk.past_blocks):
        needed = []
        for kv in range(2):
            sure = [0, own - 1]
            rest = sorted(set(range(own)) - set(sure), key=lambda k: -mass[kv, j, k])
            taken = list(sure)
            while mass[kv, j, [*taken, own]].sum() < tau * mass[kv, j].sum():
                taken.append(rest[len(taken) - 2])
            needed.append(len(taken))
            count = chosen.ids[j].shape[1]
            assert set(chosen.ids[j][kv].tolist()) == {*sure, *rest[: count - 2]}
        assert chosen.ids[j].shape[1] == max(needed)


def test_xattention_picks_a_planted_block_for_the_head_that_wants_it() -> None:
    q, keys, values = random_case(9, offset=320, n=16)
    keys[1, 7 * BLOCK : 8 * BLOCK] += 3 * q[2:].mean(axis=(0, 1))
    q[2:] = q[2:].mean(axis=(0, 1)) * 8
    chunk = Chunk(mx.array(q), reference.slab_of(keys, values, 384), 320, BLOCK, 0.4)
    chosen = xattention(options_of("xattention", tau=0.5, sink=16, local=16))(0, chunk)
    assert isinstance(chosen, Blocks)
    assert 7 in chosen.ids[0][1, :3].tolist()  # behind the two that are always kept
    local = xattention(options_of("xattention", tau=1e-6, sink=16, local=16))(0, chunk)
    assert isinstance(local, Blocks)
    assert sorted(local.ids[0][1].tolist()) == [0, 19]


def test_xattention_can_be_capped() -> None:
    """At tau 0.9 every block wants most; capped, each query block stays under the density."""
    chunk = chunk_of(8, offset=320, n=48)
    free, capped = (
        xattention(options_of("xattention", tau=0.9, max_density=0.3, over=over))(0, chunk)
        for over in ("dense", "cap")
    )
    assert isinstance(free, Blocks)
    assert isinstance(capped, Blocks)
    assert free.pairs(chunk) > 0.6 * chunk.causal_pairs
    assert 0.2 * chunk.causal_pairs < capped.pairs(chunk) <= 0.3 * chunk.causal_pairs
    for many, few in zip(free.ids, capped.ids, strict=True):
        assert many[:, : few.shape[1]].tolist() == few.tolist()


def test_what_is_always_kept_comes_before_a_block_that_holds_everything() -> None:
    mass = np.zeros((2, 1, 12), np.float32)
    mass[:, 0, 5] = 8.0
    chunk = chunk_of(0, offset=176, n=16)
    order, counts = ranked(mx.array(mass), chunk, options_of("xattention", sink=16, local=32))
    assert counts.tolist() == [4]
    assert [row[:4] for row in order[:, 0].tolist()] == [[0, 9, 10, 5]] * 2


def test_xattention_with_tau_1_is_dense() -> None:
    chunk = chunk_of(1)
    chosen = xattention(options_of("xattention", tau=1.0))(0, chunk)
    assert chosen.pairs(chunk) == chunk.causal_pairs


def random_lines(rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
    columns = rng.permutation(length)[: rng.integers(0, length // 2 + 1)]
    distances = rng.permutation(length)[: rng.integers(0, 8)]
    return columns.tolist(), distances.tolist()


def mask_of(lines: list[list[int]], length: int) -> mx.array:
    """(H, length) bool."""
    return mx.array(np.stack([np.isin(np.arange(length), line) for line in lines]))


def one_lines_case(seed: int) -> bool:
    """Whether vertical and slash lines of random places give the table of the definition."""
    rng = np.random.default_rng(seed)
    offset, n = BLOCK * int(rng.integers(0, 6)), BLOCK * int(rng.integers(1, 4))
    sink, local = int(rng.integers(0, 20)), int(rng.integers(0, 40))
    length = offset + n
    zeros = np.zeros((2, length, 4), np.float32)
    slab = reference.slab_of(zeros, zeros, 192)
    chunk = Chunk(mx.zeros((4, n, 4)), slab, offset, BLOCK, 1.0)
    lines = [random_lines(rng, length) for _ in range(4)]
    columns = mask_of([columns for columns, _ in lines], length)
    distances = mask_of([distances for _, distances in lines], length)
    options = options_of("minference", sink=sink, local=local)
    seen = list(minference.keys_seen(chunk, columns, distances, None, options))
    counts = [row.astype(mx.int32).sum(axis=1).tolist() for row in seen]
    table = who_sees_whom(Columns(seen, counts), chunk)
    expected = [reference.of_lines(*line, offset, n, BLOCK, sink, local) for line in lines]
    return np.allclose(table, np.stack(expected), atol=1e-3)


def test_200_of_200_random_lines_are_the_brute_force_table() -> None:
    """Read off the consumer's result: which key enters which query's mean, and how often."""
    assert sum(one_lines_case(seed) for seed in range(200)) == 200


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_comparison_of_lines_can_fail(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slashes one distance off."""
    union = minference.slash_union

    def mutated(distances: mx.array, past: int, block: int) -> mx.array:
        return union(mx.roll(distances, shift, axis=1), past, block)

    monkeypatch.setattr(minference, "slash_union", mutated)
    assert sum(one_lines_case(seed) for seed in range(20)) < 10


def test_the_last_queries_decide_which_lines() -> None:
    """Against loops; a choice that float32 could turn over is not compared."""
    compared = 0
    for seed in range(12):
        chunk = chunk_of(seed, heads=2, kv_heads=1, offset=160, n=32, softcap=2.0 * (seed % 2))
        q, keys = np.array(chunk.q, np.float64), np.array(chunk.keys[0], np.float64)
        patterns = [HeadPattern(vertical=40, slash=110), HeadPattern(vertical=1, slash=1)]
        columns, distances = minference.lines(chunk, patterns, 24)
        for head, (v, s) in enumerate([(40, 110), (30, 50)]):
            vertical, slash = np.zeros(192), np.zeros(192)
            for row in range(8, 32):
                scores = q[head, row] @ keys[: 161 + row].T * 0.4
                scores = np.tanh(scores / 2) * 2 if seed % 2 else scores
                mass = np.exp(scores) / np.exp(scores).sum()
                vertical[: 161 + row] += mass
                slash[: 161 + row] += mass[::-1]  # by distance
            vertical[:30], slash[:100] = np.inf, np.inf
            for values, count, ours in ((vertical, v, columns), (slash, s, distances)):
                ranked = np.sort(values)[::-1]
                if count > 100 or (count == 40 and ranked[count - 1] - ranked[count] > 1e-5):
                    expected = set(np.argsort(-values)[:count].tolist())
                    assert set(np.flatnonzero(np.array(ours[head])).tolist()) == expected
                    compared += 1
                assert np.array(ours[head]).sum() == count
    assert compared >= 20


def test_patterns_of_heads_stand_side_by_side() -> None:
    """A head of each kind, and its table."""
    chunk = chunk_of(3, heads=4, kv_heads=2, offset=480, n=16)
    mean = chunk.q[3].mean(axis=0)
    keys = np.array(chunk.slab)
    keys[0, 1, 5 * BLOCK : 6 * BLOCK] += np.array(mean) * 50
    chunk = Chunk(chunk.q, mx.array(keys), 480, BLOCK, 0.4)
    kinds = [
        HeadPattern("stream_llm", 3, 20),
        HeadPattern("vertical_and_slash", 30, 50),
        HeadPattern("stream_llm", 0, 0),
        HeadPattern("block_sparse", 100, 1),
    ]
    options = options_of("minference", sink=0, local=0, patterns=(dict(enumerate(kinds)),))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(minference, "_TOP_TOKENS", 2 * BLOCK)
        chosen = minference.minference(options)(0, chunk)
    table = who_sees_whom(chosen, chunk)
    for head, lines in ((0, (range(3), range(20))), (2, ((), ()))):
        expected = reference.of_lines(*lines, 480, 16, BLOCK, 0, 0)
        assert np.allclose(table[head], expected, atol=1e-3)
    assert table[1, 0, :30].min() > 0.5
    assert table[1, 15, :480].sum() == pytest.approx(30 + 49, abs=1e-2)  # nearest 50 distances
    blocks = table[3, 0, :480].reshape(-1, BLOCK).round()
    assert blocks.sum() == 2 * BLOCK
    assert blocks[5].min() == 1
