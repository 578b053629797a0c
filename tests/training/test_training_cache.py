"""Hidden states that do not fit on the disk: what is kept, and how often the rest is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import tiny_chat
from test_training import SMALL, batches_of, copied, run_fit, write_answers
from tiny_chat import begin

from mlx_redrafter.models import Decoder
from mlx_redrafter.training import data, stages
from mlx_redrafter.training.data import Batch, Cache, Positions
from mlx_redrafter.training.fit import Fit, fit
from mlx_redrafter.training.shards import feature_bytes, read_conversations, shards

model = tiny_chat.model
PARTS = 8


@pytest.fixture(scope="module")
def folder(target: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_answers(target, tmp_path_factory.mktemp("many"), parts=PARTS)


def room_for(folder: Path, target: Decoder, count: float) -> float:
    """Bytes of so many of its shards."""
    size = target.config.hidden_size
    return count * feature_bytes(sum(s.count() for s in shards(folder)), 3, size) / PARTS


def test_what_is_kept_and_for_how_long_the_rest_stays() -> None:
    assert Cache.of([10] * 8, 80, 6) == Cache(8, 0, 1)
    assert Cache.of([10] * 8, 79, 6) == Cache(5, 1, 3)
    assert Cache.of([10] * 8, 40, 6) == Cache(3, 1, 3)
    assert Cache.of([10] * 80, 400, 6) == Cache(30, 10, 3)
    assert Cache.of([10] * 800, 400, 6).kept == 30  # also when there are more
    assert Cache.of([10] * 8, 1, 6) == Cache(0, 1, 3)
    # Three visits of each would leave a part of the answers out.
    assert [Cache.of([10] * 8, 40, n).visits for n in (0.1, 1.9, 2.1, 100)] == [1, 1, 2, 3]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose features were computed."""
    real, names = data.compute_features, []

    def counted(target: Any, layers: Any, shard: Any) -> None:
        names.append(shard.file.stem)
        real(target, layers, shard)

    monkeypatch.setattr(data, "compute_features", counted)
    return names


def starts(positions: Positions, seed: int, start: int, count: int) -> Iterator[Batch]:
    stream = positions.batches(4, seed, start)
    return (next(stream) for _ in range(count))


def cycle(positions: Positions) -> int:
    """Batches until all shards were gone through equally often."""
    random = np.random.default_rng((0, 0))
    groups = positions._groups(random)
    return sum(len(list(positions._planned(group, 4, random))) for group in groups)


def test_all_answers_are_seen_equally_often_and_the_rest_is_computed_once_for_three_passes(
    folder: Path, target: Decoder, tmp_path: Path, computed: list[str]
) -> None:
    own = copied(folder, tmp_path / "own")
    room = room_for(folder, target, 4)
    some = batches_of(own, target, segment=4, cache_bytes=room, positions=100_000)
    assert 0 < (kept := some.cache.kept) < PARTS - 1 and some.cache == Cache(kept, 1, 3)
    some._forget(())
    seen: Counter[int] = Counter()
    for group in some._groups(np.random.default_rng(0)):
        seen.update(group)
    assert seen == dict.fromkeys(range(PARTS), 3)
    total = 0.0
    for batch in starts(some, 0, 0, cycle(some)):
        total += batch.valid[0].sum()
        there = [f.stem for f in (own / "features").glob("*.npy")]
        assert len(there) <= kept + 1 and {f"{i:05d}" for i in range(kept)} <= {*there}
    assert sorted(computed) == [f"{i:05d}" for i in range(kept, PARTS)]
    conversations = 3 * sum(len(np.unique(r.owner[: r.cut])) for r in some.rows)
    assert total >= 3 * some.count - conversations
    once = batches_of(own, target, segment=4, cache_bytes=room, positions=1)
    computed.clear()
    for _ in range(3):
        for _ in starts(once, 0, 0, cycle(once)):
            pass
    assert len(computed) == 3 * (PARTS - kept)  # the test can fail: a visit each costs three times


def test_batches_are_the_same_wherever_they_begin(
    folder: Path, target: Decoder, tmp_path: Path, computed: list[str]
) -> None:
    room = room_for(folder, target, 4)
    options = {"cache_bytes": room, "positions": 100_000}
    whole = batches_of(copied(folder, tmp_path / "whole"), target, **options)
    count = cycle(whole) + 5
    expected = list(starts(whole, 1, 0, count))
    own = copied(folder, tmp_path / "own")
    for at in (0, 7, count // 2, count - 3):
        computed.clear()
        again = batches_of(own, target, **options)  # what was left in the cache is there
        found = list(starts(again, 1, at, 3))
        assert len(computed) <= 2  # no group before it is computed on the way
        for one, two in zip(found, expected[at : at + 3], strict=True):
            assert np.array_equal(one.tokens, two.tokens)
            assert np.array_equal(one.valid, two.valid)
            np.testing.assert_allclose(one.features, two.features, atol=5e-3)
    other = next(starts(batches_of(own, target, **options), 1, 1, 1))
    assert not np.array_equal(other.tokens, expected[0].tokens)


class Stop(Exception):
    pass


@pytest.mark.bits
def test_an_interrupted_fit_with_a_small_cache_is_the_same(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    config = replace(SMALL, cache_gb=room_for(folder, target, 4) / 1e9)
    whole = run_fit(target, copied(folder, tmp_path / "whole"), config)
    own = copied(folder, tmp_path / "parts")

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 8:
            raise Stop

    with pytest.raises(Stop):
        fit(target, config, own, stop)
    assert 0 < Fit(target, config, own).data.cache.kept < PARTS
    parts = run_fit(target, own, config)
    for name, value in whole.items():
        assert mx.array_equal(value, parts[name]).item(), name


def test_answers_keep_the_hidden_states_that_fit(
    tmp_path: Path, model: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "compute_features", data.compute_features)  # what counts
    out = tmp_path / "run"
    run = begin(out, model)
    each = feature_bytes(1, len(run.layers), run.target.config.hidden_size)
    run = begin(out, model, cache_gb=200 * each / 1e9)
    stages.answers(run)
    written = sorted(f.stem for f in (out / "features").glob("*.npy"))
    every = [f.stem for f in sorted((out / "answers").glob("*.jsonl"))]
    assert written and written == every[: len(written)] != every
    tokens = [sum(len(c.answer) for c in read_conversations(s.file)) for s in shards(out)]
    assert sum(tokens[: len(written)]) <= data.KEPT * 200
    stages._read_features(run)
    kept = Cache.of([each * n for n in tokens], 200 * each, 1).kept
    assert computed == every[len(written) : kept]  # only what will stay
    stages._read_features(run)
    assert len(computed) == kept - len(written)
