"""Answers of models that think: both modes in the data, and thoughts that leave room for an answer.

A thought that is still going on after ``thought_tokens`` is closed there, and the model answers
with what it has thought so far; models that think can do that (Qwen3, arXiv 2505.09388).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlx_redrafter.errors import OptionError
from mlx_redrafter.models.sequences import Thought
from mlx_redrafter.text.template import (
    markers,
    opens_thought,
    thinking_switch,
    thinks,
    thought_ahead,
)
from mlx_redrafter.training.config import TrainConfig

_TAIL = 16  # tokens in which what ends a thought fits


class Lengths(NamedTuple):
    """Tokens of an answer with its thought: the most, and the mean of answers that are as long."""

    most: int
    mean: float


def lengths(config: TrainConfig, tokenizer: Any) -> Lengths:
    """How long answers may become, by the options and by whether this model thinks."""
    thinking, usual = Thinking(config, tokenizer), config.max_tokens
    extra = config.thought_tokens + len(thinking.closing)
    return Lengths(usual + extra * (thinking.share > 0), usual + extra * thinking.share)


class Thinking:
    """How a run has its model think.

    Raises OptionError: a share of answers that think, for a model without a switch.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.marks = markers(tokenizer)
        self.closing = _ids(tokenizer, f"\n{self.marks[1]}\n\n") if self.marks else ()
        self.modes: tuple[dict[str, bool], ...] = ({},)
        """Variables of the chat template: what turns thinking off and on, or none at all."""
        try:
            self.modes = (thinking_switch(tokenizer, False), thinking_switch(tokenizer, True))
            self.share = config.thinking
        except OptionError:
            if config.thinking != TrainConfig.thinking:
                raise
            self.share = float(thinks(tokenizer))

    def mode(self, number: int) -> dict[str, bool]:
        """Variables of the chat template for the prompt with a number."""
        drawn = np.random.default_rng((self.config.seed, number)).random()
        return self.modes[-1 if drawn < self.share else 0]

    def thought(self, prompt: Sequence[int]) -> Thought | None:
        """What the answer to a prompt may begin with; None where that is no thought."""
        marks = thought_ahead(self.tokenizer, prompt)
        if marks is None:
            return None
        opens, closes = (_said(self.tokenizer, mark) for mark in marks)
        begun = opens_thought(self.tokenizer, prompt)
        return Thought(begun, self.config.thought_tokens, self.closing, opens, closes)


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def _said(tokenizer: Any, mark: str) -> Callable[[Sequence[int]], bool]:
    """Do tokens end with this text? One that is no token of its own may end within one."""
    ids = _ids(tokenizer, mark)
    if len(ids) == 1:
        return lambda tokens: tokens[-1] == ids[0]
    return lambda tokens: mark in tokenizer.decode(list(tokens[-_TAIL:]))
