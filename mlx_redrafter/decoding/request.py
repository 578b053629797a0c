"""What is asked of an engine: one prompt, and everything that its answer depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.grammar import Grammar
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import DecoderConfig
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.reading import USUAL, Progress
from mlx_redrafter.runtime import checks
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

UNLIMITED = -1


def length(max_tokens: Any) -> int:
    """The most tokens of an answer, -1 for no limit; raises OptionError."""
    use = "1 or more, or -1 for no limit"
    value = checks.whole("max_tokens", max_tokens, UNLIMITED, use=use)
    return value or checks.whole("max_tokens", value, 1, use=use)


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Args:
        prompt: token ids.
        shape: of every step, or what chooses it.
        max_tokens: the longest answer, -1 for no limit; it ends with the context too.
        session: what is known of the prompt already, and will be of the answer.
        stats: where steps are counted.
        step_size: prompt tokens of a pass.
        progress: called with (tokens read, tokens in the prompt).
        sparse_prefill: how the prompt is read; every step attends to all of it.
        prediction: what the answer may be, to draft from; token ids.
        grammar: what the answer may be; None: anything.
        margins: count tokens that rounding may have chosen.
        trees: keep the draft tree of every step, to look at.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    shape: TreeShape | Policy
    max_tokens: int
    session: Session = field(default_factory=Session)
    stats: DraftStats = field(default_factory=DraftStats)
    step_size: int = USUAL
    progress: Progress | None = None
    sparse_prefill: SparsePrefill | None = None
    prediction: Sequence[int] = ()
    grammar: Grammar | None = None
    margins: bool = False
    trees: bool = False

    def room(self, config: DecoderConfig) -> int:
        """How many tokens may be produced.

        Raises:
            OptionError: empty prompt, a token outside the vocabulary, a prompt that fills the
                context.
        """
        if not self.prompt:
            raise OptionError("the prompt is empty: give at least one token of text")
        vocab, limit = config.vocab_size, config.max_positions
        wrong = next((t for t in self.prompt if not 0 <= t < vocab), None)
        if wrong is not None:
            raise OptionError(
                f"the prompt holds token {wrong}, which is outside the model's vocabulary: "
                f"use 0 to {vocab - 1}"
            )
        self.sampling.check(vocab)
        max_tokens = length(self.max_tokens)
        if len(self.prompt) >= limit:
            raise OptionError(
                f"the prompt has {len(self.prompt)} tokens and the model's context {limit}: "
                "shorten the prompt, or use a model with a longer context"
            )
        room = limit - len(self.prompt)
        return room if max_tokens == UNLIMITED else min(max_tokens, room)
