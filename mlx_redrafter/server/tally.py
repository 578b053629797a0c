"""What is known of one answer while it is made: numbers, which any thread may read."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from mlx_redrafter.server.metrics import Metrics
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.text.answer import GenerationResponse


@dataclass(eq=False)
class Tally:
    """Counts one answer, and tells the server's metrics. The engine thread writes.

    Args:
        prompt: its tokens.
        arrived: when, by ``time.perf_counter``.
    """

    metrics: Metrics
    prompt: int
    arrived: float
    begun: float = field(default_factory=time.perf_counter)
    read: int = 0  # tokens of the prompt, those that were cached among them
    cached: int = 0
    generated: int = 0
    ready: float | None = None  # when the prompt was read
    last: float = 0.0  # when tokens came last
    stats: DraftStats = field(default_factory=DraftStats)
    _step: int = 0  # tokens since

    def __post_init__(self) -> None:
        self.metrics.queued.observe(self.begun - self.arrived)

    def progress(self, done: int) -> None:
        """So much of the prompt is read."""
        self.read = done
        if done == self.prompt:
            self.ready = time.perf_counter()

    def take(self, response: GenerationResponse) -> None:
        """The next token."""
        self.stats = response.stats
        if not self.generated:
            self._first()
        self.generated += 1
        self._step += 1
        self.metrics.generated_tokens.inc()
        if not response.from_draft or response.finish_reason is not None:
            self._step_ended()

    def _first(self) -> None:
        now = time.perf_counter()
        self.ready = now if self.ready is None else self.ready
        self.last, self.read = now, self.prompt
        self.cached = max(0, self.prompt - self.stats.prefill_tokens)
        self.metrics.prompt_tokens.inc(self.prompt)
        self.metrics.first_token.observe(now - self.arrived)
        self.metrics.reading.observe(self.stats.prefill_seconds)

    def _step_ended(self) -> None:
        now, count = time.perf_counter(), self._step
        if self.generated > count:  # the first step's time is the first token's
            for _ in range(count):
                self.metrics.between.observe((now - self.last) / count)
        self.last, self._step = now, 0

    @property
    def decoding(self) -> float:
        """Seconds from the prompt's end to the last step's."""
        return self.last - self.ready if self.ready is not None and self.generated else 0.0

    def ended(self, reason: str) -> None:
        """The answer is over."""
        self.metrics.answers.labels(reason).inc()
        self.metrics.drafting(self.stats)
        if self.generated:
            self.metrics.writing.observe(self.decoding)
            self.metrics.whole.observe(time.perf_counter() - self.arrived)

    def as_dict(self) -> dict[str, Any]:
        """For `/slots`."""
        decoding = self.decoding
        return {
            "state": "decoding" if self.ready is not None else "reading",
            "prompt_tokens": self.prompt,
            "prompt_tokens_read": self.read,
            "cached_tokens": self.cached,
            "generated_tokens": self.generated,
            "tokens_per_second": round(self.generated / decoding, 2) if decoding else 0.0,
            "drafting": self.stats.shape or None,
            "tokens_per_step": round(self.stats.tokens_per_step, 3),
        }
