"""What the server counts, as Prometheus reads it: vLLM's names behind a prefix of ours.

The engine thread counts; any thread may read. What is known at any time (requests that run, bytes
of sessions) is asked for when it is read.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from mlx_redrafter.stats import DraftStats

TEXT = "text/plain; version=0.0.4; charset=utf-8"
# Seconds. One step of a small model takes a hundredth, a prompt of an agent on a laptop minutes.
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0)
_ANSWERS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The counters of one server, with a registry of its own."""

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # a line per counter that nobody draws
        self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)
        self.prompt_tokens = self._counter("prompt_tokens", "Of prompts that were read.")
        self.generated_tokens = self._counter("generation_tokens", "Tokens of answers.")
        self.answers = self._counter(
            "request_success",
            "Answers that ended: stop, length, tool_calls, abort (nobody waited), error.",
            "finished_reason",
        )
        self.responses = self._counter("http_responses", "Answers of HTTP by status.", "code")
        self.refused = self._counter("queue_full", "Requests that found the queue full.")
        self.errors = self._counter("engine_errors", "Faults of ours while answering.")
        self.cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self.cache_hits = self._counter("prefix_cache_hits", "Prompt tokens that were there.")
        self.cache_evictions = self._counter("prefix_cache_evictions", "Sessions that made room.")
        self.steps = self._counter("steps", "Steps of answers, drafted and plain.")
        self.drafted_steps = self._counter("spec_decode_num_drafts", "Steps that drafted.")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Drafted tokens checked.")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Drafted tokens kept.")
        self.by_place = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "The same by place in a draft.", "position"
        )
        self.first_token = self._seconds("time_to_first_token", "From arrival to a token.")
        self.between = self._seconds("inter_token_latency", "A step's, by its tokens.", _STEPS)
        self.whole = self._seconds("e2e_request_latency", "From arrival to the last token.")
        self.queued = self._seconds("request_queue_time", "Before work on it began.")
        self.reading = self._seconds("request_prefill_time", "Reading the prompt, alone.")
        self.writing = self._seconds("request_decode_time", "From its prompt to its end.")
        self.together = Histogram(
            "redrafter:step_answers", "Answers that share a step.", buckets=_ANSWERS,
            registry=self._registry,
        )  # fmt: skip

    def gauge(self, name: str, text: str, value: Callable[[], float], **labels: str) -> None:
        """Have a number asked for whenever it is read."""
        gauge = Gauge(f"redrafter:{name}", text, list(labels), registry=self._registry)
        (gauge.labels(**labels) if labels else gauge).set_function(value)

    def answered(self, status: int) -> None:
        """An answer of HTTP begins."""
        self.responses.labels(str(status)).inc()

    def page(self) -> bytes:
        """Everything, in Prometheus' text form."""
        return generate_latest(self._registry)

    def drafting(self, stats: DraftStats) -> None:
        """An answer ended, wherever it was."""
        self.steps.inc(stats.steps)
        self.drafted_steps.inc(stats.drafted_steps)
        self.drafted.inc(stats.drafted)
        self.accepted.inc(stats.accepted)
        for place, count in _by_place(stats.histogram):
            self.by_place.labels(str(place)).inc(count)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"redrafter:{name}", text, labels, registry=self._registry)

    def _seconds(self, name: str, text: str, bounds: tuple[float, ...] = _WAITS) -> Histogram:
        return Histogram(f"redrafter:{name}_seconds", text, buckets=bounds, registry=self._registry)


def _by_place(histogram: Counts[int]) -> Iterable[tuple[int, int]]:
    """(place, steps that kept the draft there), from 0 on."""
    for place in range(max(histogram, default=0)):
        yield place, sum(n for kept, n in histogram.items() if kept > place)
