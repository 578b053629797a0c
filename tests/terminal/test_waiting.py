"""The bar while a long prompt is read: its estimate, when it shows, and what it leaves."""

from __future__ import annotations

import io
import re
import sys
import time
from typing import Any

import pytest
from rich.console import Console

from mlx_redrafter.terminal import progress as waiting
from mlx_redrafter.terminal.progress import Estimate, Waiting, line


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def reading(total: int, until: int, step: int, first: float = 0.0, start: int = 0) -> Estimate:
    """A prompt whose token at position p takes 1e-3 + 1e-6 * p seconds."""
    clock = Clock()
    estimate = Estimate(clock)
    for done in range(start, until + 1, step):
        if done > start:
            clock.now += step * 1e-3 + 1e-6 * step * (2 * done - step) / 2
            clock.now += first if done == start + step else 0.0
        estimate.update(done, total)
    return estimate


def true_rest(done: int, total: int) -> float:
    return 1e-3 * (total - done) + 1e-6 * (total**2 - done**2) / 2


def test_the_estimate_knows_that_later_tokens_take_longer() -> None:
    for until, first in ((1024, 0.0), (2048, 5.0), (7168, 0.0)):
        estimate = reading(8192, until, 512, first)
        assert estimate.rest == pytest.approx(true_rest(until, 8192), rel=1e-6), until
        flat = (estimate._mark - 100.0 - first) / until * (8192 - until)
        assert flat < 0.8 * true_rest(until, 8192), "the mean so far promises too much"
    behind = reading(8192, 6144, 512, start=4096)
    assert behind.rest == pytest.approx(true_rest(6144, 8192), rel=1e-6)
    assert behind.speed == pytest.approx(2048 / (behind._mark - 100.0))


def test_the_estimate_of_few_or_odd_chunks() -> None:
    assert reading(4096, 0, 512).rest is None
    assert reading(4096, 512, 512).rest == pytest.approx(7 * 512 * (1e-3 + 256e-6))
    clock = Clock()
    estimate = Estimate(clock)
    for done, seconds in ((0, 0.0), (512, 9.0), (1024, 1.0)):  # it was faster the second time
        clock.now += seconds
        estimate.update(done, 2048)
    assert estimate.rest == pytest.approx(10.0)  # two chunks: the mean, and nothing negative
    clock.now += 3.0
    assert estimate.rest == pytest.approx(7.0), "it goes down within a chunk"
    clock.now += 60.0
    assert estimate.rest == 0.0


def test_the_line_shows_tokens_speed_and_what_is_left() -> None:
    out = Console(file=io.StringIO(), width=120)
    out.print(line(reading(8192, 2048, 512)))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"reading the prompt .*2048 of 8192 tokens · 494 tokens/s · 38 s left", text)
    assert (waiting._left(0.2), waiting._left(125)) == ("1 s", "2:05 min")


def through(monkeypatch: pytest.MonkeyPatch, terminal: bool, chunk: float) -> str:
    """What is written while 4 chunks of so many seconds are read."""
    written = io.StringIO()
    out = Console(file=written, force_terminal=terminal, width=100)
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    bar = Waiting()
    bar._out = out
    for done in range(0, 2000, 500):
        bar.on_progress(done, 2000)
        time.sleep(chunk)
    bar.on_progress(2000, 2000)
    bar.close()
    return written.getvalue()


def test_the_bar_shows_only_on_a_terminal_and_only_for_a_long_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = through(monkeypatch, True, 0.1)
    assert "reading the prompt" in shown and "500 of 2000 tokens" in shown
    assert shown.rstrip().endswith("\x1b[2K"), "it is erased"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is back"
    assert through(monkeypatch, True, 0.01) == ""
    assert through(monkeypatch, False, 0.1) == ""


def test_a_single_long_chunk_shows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(waiting, "PATIENCE", 0.05)
    bar = Waiting()
    bar._out = Console(file=written, force_terminal=True, width=100)
    bar._bar_timer = waiting._timer(0.05, bar._show)
    bar.on_progress(0, 300)
    time.sleep(0.3)
    bar.close()
    assert "0 of 300 tokens" in written.getvalue() and "left" not in written.getvalue()


def compiled(monkeypatch: pytest.MonkeyPatch, capsys: Any, *, words: int, kernels: bool) -> str:
    """What is said of a pause in front of the prompt's end, or behind so many words."""
    began = time.time()
    monkeypatch.setattr(waiting, "COMPILING", 0.1)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(waiting.compiler, "compiling", lambda since: kernels and since >= began)
    wait = Waiting()
    wait.on_progress(5, 5)
    for _ in range(words):
        wait.word()
    time.sleep(0.5)
    wait.word()
    time.sleep(0.3)
    wait.close()
    return str(capsys.readouterr().err)


@pytest.mark.parametrize("words", [0, 3], ids=["before the first word", "within the answer"])
def test_compiling_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: int
) -> None:
    said = compiled(monkeypatch, capsys, words=words, kernels=True)
    assert said == "Compiling kernels for the first answer with these options, once ...\n"
    assert compiled(monkeypatch, capsys, words=words, kernels=False) == "", "only a slow model"


def test_nothing_is_said_of_an_answer_that_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "COMPILING", 0.1)
    monkeypatch.setattr(waiting.compiler, "compiling", lambda since: True)
    wait = Waiting()
    wait.on_progress(5, 5)
    wait.close()
    time.sleep(0.3)
    assert capsys.readouterr().err == ""
