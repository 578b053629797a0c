"""Snapshots of what cannot be cut, within so many bytes: texts stay true, the newest is kept."""

from __future__ import annotations

import itertools
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from adapter_cases import TYPES, module_of
from conftest import SHAPES, engine_of, prompt_of, run
from test_layer_caches import LAYERS, Recurrent, plain

from mlx_redrafter.cache import session as session_file
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.snapshots import Snapshots, nbytes, states
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import AdaptedModel, adapted
from mlx_redrafter.runtime.device import memory_bytes
from mlx_redrafter.stats import DraftStats

ONE = 4 * LAYERS  # bytes of a snapshot of the model


@pytest.fixture(scope="module")
def recurrent() -> Any:
    return Recurrent()


def holding(stands: list[int], turns: set[int], room: int) -> Snapshots:
    """Snapshots of one byte each."""
    snapshots = Snapshots(room)
    for stand in stands:
        snapshots.add(stand, {0: mx.zeros((1,), mx.uint8)}, stand in turns)
    return snapshots


@pytest.mark.parametrize("room", [0, 1, 2, 3, 6, 1000])
def test_texts_are_true_after_every_cut(
    recurrent: Any, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = []
    add = Snapshots.add

    def watched(self: Snapshots, *given: Any) -> None:
        add(self, *given)
        if self is session.snapshots:
            most.append(self.nbytes)
        assert self.nbytes == ONE * len(list(self)) <= self.limit

    monkeypatch.setattr(Snapshots, "add", watched)
    monkeypatch.setattr(session_file, "BETWEEN_SNAPSHOTS", 16)
    engine = engine_of(recurrent, None, compiled=False)
    first = prompt_of(70, seed=1)
    session = Session(snapshot_bytes=room * ONE)
    answer = run(engine, first, None, SHAPES["chain"], 20, session, step_size=16)
    known = [*first, *answer]
    for at in (len(known) - 1, 75, 69, 64, 50, 32, 17, 16, 15, 3):
        prompt = [*known[:at], 1, 2, 3]
        found = run(engine, prompt, None, SHAPES["chain"], 6, session, step_size=16)
        assert found == plain(recurrent, prompt, 6), at
    assert most and max(most) <= room * ONE
    assert (max(most) == room * ONE) is (room < 1000)  # what is there is used


@pytest.mark.parametrize(("keeps", "room"), [(True, 0), (False, 3)])
def test_a_conversation_goes_on_where_it_was(recurrent: Any, keeps: bool, room: int) -> None:
    """From the end of the answer, or from where it began: a template may leave its thought out."""
    engine = engine_of(recurrent, None, compiled=False)
    session, prompt = Session(snapshot_bytes=room * ONE), prompt_of(40, seed=2)
    for turn in range(6):
        stats = DraftStats()
        answer = run(engine, prompt, None, SHAPES["chain"], 9, session, stats)
        assert stats.prefill_tokens <= (8 if turn else 40)
        prompt += (answer if keeps else []) + prompt_of(5, seed=turn)


def test_a_later_turn_has_snapshots_too(recurrent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts begin where the last answer ended, and not at multiples of anything."""
    monkeypatch.setattr(session_file, "BETWEEN_SNAPSHOTS", 16)
    engine, session = engine_of(recurrent, None, compiled=False), Session()
    prompt = prompt_of(21)
    prompt += run(engine, prompt, None, SHAPES["chain"], 9, session) + prompt_of(60, seed=2)
    run(engine, prompt, None, SHAPES["chain"], 2, session, step_size=16)
    stands = [0, *session.snapshots]
    assert max(b - a for a, b in itertools.pairwise(stands)) <= 16 + 4


def test_the_newest_dropped_is_caught(recurrent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Snapshots, "_least", lambda self: max(self))
    with pytest.raises(AssertionError):
        test_a_conversation_goes_on_where_it_was(recurrent, False, 3)


def test_what_is_within_a_turn_makes_room_first() -> None:
    stands = [512 * i for i in range(1, 11)]
    turns = {512, 2048, 4096, 5120}
    assert turns <= set(holding(stands, turns, 5))
    assert set(holding(stands, turns, 4)) == turns
    assert set(holding(stands, turns, 2)) == {512, 5120}
    assert set(holding(stands, turns, 1)) == {5120}
    assert not list(holding(stands, turns, 0))


@pytest.mark.parametrize("count", [7, 20, 200])
def test_old_ones_are_farther_apart(count: int) -> None:
    kept = list(holding([512 * i for i in range(1, count + 1)], set(), 6))
    assert len(kept) == 6 and kept[0] == 512 and kept[-1] == 512 * count
    gaps = [b - a for a, b in itertools.pairwise(kept)]
    assert gaps[-1] <= gaps[-2] and max(gaps) <= 512 * (count * 0.75 + 1), gaps


def test_the_room_is_a_share_of_the_machine_or_as_given() -> None:
    assert Session().snapshots.limit == memory_bytes() // 16 > 0
    for wrong in (-1, 1.5, "many"):
        with pytest.raises(OptionError, match="snapshot_bytes"):
            Session(snapshot_bytes=wrong)  # type: ignore[arg-type]
    assert nbytes({0: mx.zeros((3,)), 1: (mx.zeros((2,), mx.float16), ())}) == 16


@pytest.mark.parametrize("kind", ["mamba2", "lfm2", "qwen3_5"])
def test_a_snapshot_takes_what_is_told_without_weights(kind: str) -> None:
    raw = TYPES[kind]
    told = states(adapted.sized(raw).caches, 4)
    model = AdaptedModel(module_of(raw), raw)
    session = Session().open(model.caches, 128, model.dtype)
    session.stand = 1
    session.mark()
    assert told == session.snapshots.nbytes > 0
    if kind == "mamba2":
        assert session.caches and session.snapshots.nbytes == sum(c.nbytes for c in session.caches)
    if kind == "qwen3_5":  # three delta layers: heads x Dv x Dk, and rows of a short convolution
        assert told == 4 * 3 * (4 * 32 * 32 + 2 * (2 * 4 * 32 + 4 * 32))
