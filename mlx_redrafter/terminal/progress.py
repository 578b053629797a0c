"""What is seen on a terminal before the first word: how far a long prompt is read."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlx_redrafter.runtime import compiler
from mlx_redrafter.terminal import console

PATIENCE = 2.0  # seconds; what is over before is not worth a bar
COMPILING = 1.0  # seconds without a word in which a kernel was begun
_LAST = 24  # chunks that an estimate is made of: sparse ones cost something else than those before
_WIDTH = 30  # columns of the bar


class Estimate:
    """When a prompt will be read, from the chunks that are read.

    A token's time grows with its position, as attention does: seconds = a + b * position, fitted
    to the chunks' means. The first chunk may have had kernels to compile, and counts only until two
    others are there.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._chunks: deque[tuple[int, int, float]] = deque(maxlen=_LAST)
        self.begun = self._mark = now()
        self.first = self.done = -1
        self.total = 0

    def update(self, done: int, total: int) -> None:
        """So many tokens are read now; the first call says how many were before."""
        now = self._now()
        if self.done < 0:
            self.first = done
        elif done > self.done:
            self._chunks.append((self.done, done, now - self._mark))
        self.done, self.total, self._mark = done, total, now

    @property
    def elapsed(self) -> float:
        return self._now() - self.begun

    @property
    def rest(self) -> float | None:
        """Seconds to the end of the prompt; None: nothing is read yet."""
        if not self._chunks:
            return None
        a, b = self._line()
        sure = a * (self.total - self.done) + b * (self.total**2 - self.done**2) / 2
        return max(0.0, sure - (self._now() - self._mark))

    @property
    def speed(self) -> float:
        """Tokens per second so far."""
        return (self.done - self.first) / max(self._mark - self.begun, 1e-9)

    def _line(self) -> tuple[float, float]:
        """a and b, neither negative: least squares, a chunk weighing as its tokens."""
        chunks = list(self._chunks)
        if len(chunks) > 2 and chunks[0][0] == self.first:
            chunks = chunks[1:]
        weights = [stop - start for start, stop, _ in chunks]
        places = [(start + stop) / 2 for start, stop, _ in chunks]
        whole = sum(weights)
        mean = sum(seconds for *_, seconds in chunks) / whole
        middle = sum(w * x for w, x in zip(weights, places, strict=True)) / whole
        spread = sum(w * (x - middle) ** 2 for w, x in zip(weights, places, strict=True))
        joint = sum((x - middle) * c[2] for x, c in zip(places, chunks, strict=True))
        b = max(0.0, joint / spread) if spread else 0.0
        b = min(b, mean / middle) if middle else b
        return mean - b * middle, b


class Waiting:
    """A bar while a prompt is read, on a terminal and where that takes seconds; gone when the
    answer begins. It also says, once, when an answer waits for kernels to be compiled: MLX does
    that with g++ on Linux, some ten seconds for the first answer with the options at hand."""

    def __init__(self) -> None:
        self._out = Console(stderr=True, highlight=False)
        self._estimate: Estimate | None = None
        self._live: Live | None = None
        self._lock = threading.Lock()
        self._bar_timer = _timer(PATIENCE, self._show)
        self._word, self._words = time.time(), 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._compilation, daemon=True)

    def on_progress(self, done: int, total: int) -> None:
        """How much of the prompt is read."""
        self._word = time.time()
        if sys.platform == "linux" and not self._watch.ident:
            self._watch.start()
        if done >= total:
            self._hide()
            return
        if self._estimate is None:
            self._estimate = Estimate()
            if self._out.is_terminal and not self._out.is_dumb_terminal:
                self._bar_timer.start()
        self._estimate.update(done, total)
        rest = self._estimate.rest
        if rest is not None and self._estimate.elapsed + rest > PATIENCE:
            self._show()

    def word(self) -> None:
        """A piece of the answer is there."""
        self._word, self._words = time.time(), self._words + 1
        if self._words == 1:
            self._hide()

    def close(self) -> None:
        """The answer is complete, or will never be."""
        self._hide()
        self._over.set()

    def _compilation(self) -> None:
        while not self._over.wait(COMPILING / 2):
            if time.time() - self._word > COMPILING and compiler.compiling(self._word):
                with self._lock:  # not into the bar
                    self._say_compiling()
                return

    def _say_compiling(self) -> None:
        ahead = "\n" if self._words and sys.stdout.isatty() and self._out.is_terminal else ""
        text = "Compiling kernels for the first answer with these options, once ..."
        if self._live is not None:
            console.show(Text(text, "dim"), self._live.console)
        elif not self._over.is_set():
            console.note(ahead + text)

    def _show(self) -> None:
        with self._lock:
            if (
                self._live is None
                and self._bar_timer.ident
                and not self._bar_timer.finished.is_set()
            ):
                self._live = Live(
                    console=self._out, get_renderable=self._line, transient=True,
                    refresh_per_second=4, redirect_stdout=False, redirect_stderr=False,
                )  # fmt: skip
                self._live.start()

    def _hide(self) -> None:
        with self._lock:
            self._bar_timer.cancel()
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _line(self) -> Table:
        assert self._estimate is not None, "there is a bar only once something is to be read"
        return line(self._estimate)


def line(estimate: Estimate) -> Table:
    """The bar, and beside it tokens, speed and what is left."""
    done, total = max(estimate.done, 0), estimate.total
    text = f"{done} of {total} tokens"
    if (rest := estimate.rest) is not None:
        text += f" · {estimate.speed:.0f} tokens/s · {_left(rest)} left"
    grid = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=max(total, 1), completed=done, width=_WIDTH)
    grid.add_row(Text("reading the prompt", "dim"), bar, Text(text, "dim"))
    return grid


def _left(seconds: float) -> str:
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02} min"


def _timer(seconds: float, what: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(seconds, what)
    timer.daemon = True
    return timer
