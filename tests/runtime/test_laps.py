"""What steps that are started one ahead took, by when they were read."""

from __future__ import annotations

import pytest

from mlx_redrafter.runtime.clock import Laps


@pytest.fixture
def laps(monkeypatch: pytest.MonkeyPatch) -> Laps:
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)
    return Laps()


def test_the_first_tells_nothing_and_those_behind_it_do(laps: Laps) -> None:
    assert laps.ended(1, 11, 1) is None
    assert laps.ended(12, 21, 1) == 10
    assert laps.ended(22, 33, 1) == 12


def test_a_late_reader_saw_neither_that_step_end_nor_the_next_begin(laps: Laps) -> None:
    laps.ended(1, 11, 1)
    assert laps.ended(40, 41, 1) is None
    assert laps.ended(42, 46, 1) is None, "it may have begun long ago"
    assert laps.ended(47, 56, 1) == 10


def test_the_last_step_with_none_behind_it_is_not_the_cheapest(laps: Laps) -> None:
    laps.ended(1, 11, 1)
    assert laps.ended(12, 21, 1) == 10
    assert laps.ended(22, 23, 0) is None


def test_steps_that_are_never_started_ahead_are_timed_too(laps: Laps) -> None:
    laps.ended(1, 11, 0)
    assert laps.ended(12, 21, 0) == 10


def test_what_comes_between_is_no_steps_time(laps: Laps) -> None:
    laps.ended(1, 11, 1)
    laps.forget()
    assert laps.ended(12, 21, 1) is None
