"""Turning the tokens of an answer into text, and where it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.told import ToldTree


@dataclass(frozen=True)
class GenerationResponse:
    """One token of an answer, as in mlx_lm, and what drafting did so far.

    ``text`` is the next piece of text, possibly empty. ``from_draft`` tells an accepted draft from
    a bonus token. ``prompt_tps`` counts the prompt tokens that were read, not those that a session
    held already. ``peak_memory`` is in GB. ``finish_reason`` is None until the last response,
    then ``stop`` (end token, stop string or stop token) or ``length``; ``stop`` is the string that
    ended it. ``tree``, where trees are wanted: that of the step, with its first token.
    """

    text: str
    token: int
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None
    stats: DraftStats
    stop: str | None = None
    tree: ToldTree | None = None


@dataclass
class Answer:
    """Turns tokens into text, and decides where the answer ends."""

    tokenizer: TokenizerWrapper
    prompt_tokens: int
    stop: Sequence[str]
    end_tokens: set[int]
    room: int  # the most tokens that the answer can have
    stats: DraftStats = field(default_factory=DraftStats)
    count: int = 0
    started: float = 0.0
    pending: str = ""  # text that may be the beginning of a stop string

    def __post_init__(self) -> None:
        self.detokenizer = self.tokenizer.detokenizer
        self.detokenizer.reset()
        self.start = time.perf_counter()

    @property
    def kept(self) -> int:
        """Tokens of prompt and answer that may stay in the cache."""
        return self.prompt_tokens + self.count

    def add(self, token: int, from_draft: bool, tree: ToldTree | None = None) -> GenerationResponse:
        """Take the next token; tree: of a step's first one."""
        self.count += 1
        if self.count == 1:
            self.started = time.perf_counter()
        reason = None
        if token in self.end_tokens:
            reason = "stop"
        else:
            self.detokenizer.add_token(token)
            if self.count == self.room:
                reason = "length"
        if reason is not None:
            self.detokenizer.finalize()
        self.pending += self.detokenizer.last_segment
        text, hit = split_at_stop(self.pending, self.stop, final=reason is not None)
        self.pending = "" if hit or reason else self.pending[len(text) :]
        found = self._response(text, token, from_draft, "stop" if hit else reason, hit)
        return found if tree is None else replace(found, tree=tree)

    def _response(
        self, text: str, token: int, from_draft: bool, reason: str | None, stop: str | None
    ) -> GenerationResponse:
        now = time.perf_counter()
        stats = self.stats
        prefill = stats.prefill_seconds or (self.started - self.start)
        # In company an answer waits while others are read: that is neither.
        decoding = stats.decode_seconds + stats.host_seconds or now - self.start - prefill
        return GenerationResponse(
            text=text,
            token=token,
            from_draft=from_draft,
            prompt_tokens=self.prompt_tokens,
            prompt_tps=stats.prefill_tokens / prefill if prefill else 0.0,
            generation_tokens=self.count,
            generation_tps=self.count / max(decoding, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
            stats=stats,
            stop=stop,
        )


def split_at_stop(text: str, stop: Sequence[str], final: bool) -> tuple[str, str | None]:
    """What of ``text`` may be emitted now, and the stop string that was found in it."""
    found = [(at, s) for s in stop if (at := text.find(s)) >= 0]
    if found:
        at, first = min(found)
        return text[:at], first
    if final:
        return text, None
    held = max(
        (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])),
        default=0,
    )
    return text[: len(text) - held], None
