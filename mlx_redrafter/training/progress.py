"""How far a stage is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mlx_redrafter.terminal import console

_EVERY = 60.0  # seconds between two lines in a log
_WINDOW = 3600.0  # seconds that the speed is taken over: a batch of answers can take minutes


class Bar:
    """Counts up to ``total``; what was done before the start does not enter the speed."""

    def __init__(self, title: str, total: float, unit: str, done: float = 0) -> None:
        self.title, self.unit = title, unit
        self.total, self.done, self.note = total, done, ""
        self.first, self.began, self.said = done, time.monotonic(), time.monotonic()
        self.live = sys.stderr.isatty()

    def __enter__(self) -> Bar:
        if self.live:
            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
                console=Console(stderr=True), speed_estimate_period=_WINDOW,
            )  # fmt: skip
            self.task = self.progress.add_task(
                self.title, total=self.total, completed=int(self.done), count=self._count(), note=""
            )
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.progress.stop()
        elif error is None:
            console.note(f"{self.title}: {self._count()}, {duration(self._seconds)}")

    def to(self, done: float, note: str = "") -> None:
        """So much is done."""
        self.done, self.note = done, note or self.note
        self.total = max(self.total, done)
        if self.live:
            self.progress.update(
                self.task, completed=done, total=self.total, count=self._count(), note=self.note
            )
        elif time.monotonic() - self.said > _EVERY:
            self.said = time.monotonic()
            tail = f", {self.note}" if self.note else ""
            console.note(f"{self.title}: {self._count()}, {self._left()} left{tail}")

    def add(self, more: float = 1) -> None:
        self.to(self.done + more)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _left(self) -> str:
        made = self.done - self.first
        return duration(self._seconds / made * (self.total - self.done)) if made else "?"

    def _count(self) -> str:
        return f"{self.done:,.0f} of {self.total:,.0f} {self.unit}"


def duration(seconds: float) -> str:
    """3725 -> "1 h 02 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
