"""Sessions of past requests serve others that begin alike, to the bit, within a budget."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from adapter_cases import TYPES, module_of
from conftest import SHAPES, engine_of, plainly, prompt_of, run, write_target
from tiny_models import build

from mlx_redrafter.cache import prefixes
from mlx_redrafter.cache.prefixes import Prefixes
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.snapshots import nbytes
from mlx_redrafter.models import load_model
from mlx_redrafter.models.adapter import AdaptedModel

N = 8


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "mamba2", "lfm2"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Slabs, windows, a recurrence, a short convolution."""
    kind = str(request.param)
    mx.disable_compile()
    request.addfinalizer(mx.enable_compile)
    if kind in ("mamba2", "lfm2"):
        return AdaptedModel(module_of(TYPES[kind], lively=True), TYPES[kind], closed=False)
    folder: Path = tmp_path_factory.mktemp(kind)
    build(folder, kind)
    return load_model(folder)


def answer(engine: Any, kept: Prefixes, prompt: list[int]) -> tuple[list[int], Session]:
    """And the session that was used, given back."""
    session = kept.take(prompt)
    found = run(engine, prompt, None, SHAPES["lookup"], N, session)
    kept.give(session)
    return found, session


def test_users_edits_and_branches(target: Any) -> None:
    """Conversations of several users in turns: each text is that without a cache."""
    engine, kept, rng = engine_of(target, compiled=False), Prefixes(1 << 30, most=4), Random(3)
    system = prompt_of(20, vocab=90)
    users = [[*system, *prompt_of(6, seed=i, vocab=90)] for i in range(3)]
    for turn in range(14):
        user = users[turn % 3]
        if turn % 5 == 4:
            del user[rng.randrange(21, len(user) - 2) :]  # an edit
            user += [3, turn]
        found, _ = answer(engine, kept, user)
        assert found == plainly(target, user, N)
        user += [*found, 2, turn % 7]
    assert kept.hits > 8 and kept.tokens > 100 and len(kept) <= 4


def test_what_is_wholly_used_is_moved_and_a_beginning_copied(target: Any) -> None:
    engine, kept = engine_of(target, compiled=False), Prefixes(1 << 30)
    first = prompt_of(30, vocab=90)
    found, session = answer(engine, kept, first)
    again, moved = answer(engine, kept, [*first, *found, 5, 6])
    assert moved is session and len(kept) == 1
    other = [*first[:-3], 7, 8, 9, 10]
    _, copied = answer(engine, kept, other)
    if len(kept) == 2:  # a recurrence may have no place to go on from
        assert copied is not session
        assert copied.tokens[:27] == session.tokens[:27] == first[:27]
    text = [*first, *found, 5, 6, *again, 1]
    assert answer(engine, kept, text)[0] == plainly(target, text, N)


def test_bytes_and_numbers_stay_within_their_limits(target: Any) -> None:
    engine = engine_of(target, compiled=False)
    one = answer(engine, Prefixes(1 << 30), prompt_of(20, vocab=90))[1].nbytes
    kept = Prefixes(int(2.5 * one))
    for i in range(6):
        answer(engine, kept, prompt_of(20, seed=i, vocab=90))
        assert kept.nbytes <= kept.limit and len(kept) <= 2
    assert kept.evictions == 4
    none = Prefixes(one // 2)
    answer(engine, none, prompt_of(20, vocab=90))
    assert len(none) == 0 and none.take(prompt_of(20, vocab=90)).tokens == []
    few = Prefixes(1 << 30, most=3)
    for i in range(5):
        answer(engine, few, prompt_of(20, seed=i, vocab=90))
    assert len(few) == 3
    few.clear()
    assert few.nbytes == 0


def test_a_shared_beginning_outlives_what_is_used_by_one(
    target: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "_TAIL", 0)  # whatever is shared is copied
    kept = Prefixes(1 << 30, most=2)
    shared, alone = (Session(prompt_of(40, seed=i, vocab=90)) for i in range(2))
    for session in (shared, alone):
        kept.give(session)
    assert kept.take([*shared.tokens[:20], 1, 2, 3]) is not shared
    kept.give(Session(prompt_of(40, seed=5, vocab=90)))
    assert kept.take(list(shared.tokens)).tokens != []
    assert kept.take(list(alone.tokens)).tokens == []


def test_equal_sessions_are_told_apart() -> None:
    """Two requests of one prompt leave as many, and either makes room."""
    prompt, kept = prompt_of(20, vocab=90), Prefixes(1 << 30, most=2)
    for _ in range(4):
        session = Session(list(prompt))
        session.caches = [mx.zeros((1, 2, 128, 4))]
        kept.give(session)
    assert len(kept) == 2 and kept.evictions == 2


def test_a_beginning_is_copied_once_and_what_is_moved_not_at_all(tmp_path: Path) -> None:
    """By the peak of memory, with sessions that are larger than everything else."""
    write_target(tmp_path, max_position_embeddings=5000)
    engine, kept = engine_of(load_model(tmp_path), compiled=False), Prefixes(1 << 30)
    first = prompt_of(2500)
    _, session = answer(engine, kept, first)
    size, slack = session.nbytes, 150_000
    assert size > 5 * slack

    def peak(prompt: list[int]) -> tuple[Session, int]:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        found = kept.take(prompt)
        return found, mx.get_peak_memory() - before

    moved, more = peak([*first, 3, 4])
    assert moved is session and more < slack
    kept.give(moved)
    copied, more = peak([*first[:1800], 3, 4, 5])
    assert copied is not session and session in kept._kept
    assert copied.nbytes < size and more < copied.nbytes + slack


def test_snapshots_count_as_bytes() -> None:
    """Of a session with a recurrence they are most of it, and the budget is for all."""
    with_states = AdaptedModel(module_of(TYPES["mamba2"], lively=True), TYPES["mamba2"])
    engine, kept = engine_of(with_states, compiled=False), Prefixes(1 << 30)
    _, session = answer(engine, kept, prompt_of(40, vocab=90))
    assert len(list(session.snapshots)) > 0
    states, own = session.snapshots.nbytes, nbytes(session.caches)
    assert states > 0 and session.nbytes == states + own
    tight = Prefixes(states + own - 1)
    tight.give(session)
    assert len(tight) == 0
