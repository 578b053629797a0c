"""Several answers at once, from Python: names follow mlx_lm."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter import arguments
from mlx_redrafter.api import Model, checked, wired
from mlx_redrafter.budget.company import Seat
from mlx_redrafter.decoding.batch import Batch, Row
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import threads
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.text.answer import Answer, GenerationResponse

Prompt = str | Sequence[int] | mx.array


@dataclass(frozen=True)
class BatchResponse:
    """Answers in the order of their prompts, and what drafting did for each."""

    texts: list[str]
    stats: list[DraftStats]


class BatchGenerator:
    """Answers that run together, each token for token what it would be alone.

    Prompts may come and answers may be removed at any time between two calls of `next`. Use it in
    one thread at a time, and close it at the end (or use it as a context).
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper) -> None:
        self._model = model
        self._tokenizer = arguments.pair(model, tokenizer, Model)
        self._company = model.budget.company()
        self._batch = (model.batch or Batch)(model.engine, self._company)
        self._answers: dict[Row, tuple[int, Answer, Seat]] = {}
        self._numbers = itertools.count()
        self._held = contextlib.ExitStack()
        self._held.enter_context(wired(model.target))

    def __enter__(self) -> BatchGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, number: int) -> bool:
        """Does an answer run, or wait for its prompt to be read?"""
        return any(own == number for own, *_ in self._answers.values())

    def __len__(self) -> int:
        """Answers that have not ended."""
        return len(self._answers)

    def insert(self, prompt: Prompt, max_tokens: int | None = None, **options: Any) -> int:
        """Take a prompt in: its number.

        Options, and errors, which come now: see `stream_generate`. Every prompt has its own.
        """
        threads.clear_at_end()
        asked = checked(self._model, self._tokenizer, prompt, max_tokens, **options)
        request, answer = asked.chosen()
        seat = self._company.seat(self._model.engine.policy(request.shape))
        try:
            row = self._batch.add(replace(request, shape=seat))
        except BaseException:
            self._company.leave(seat)
            raise
        number = next(self._numbers)
        self._answers[row] = number, answer, seat
        return number

    def next(self) -> list[tuple[int, GenerationResponse]]:
        """Read a part of a prompt, or decode a step of all answers: the responses of single tokens,
        each with its answer's number. Empty while prompts are read.

        Raises:
            Whatever the reading of a prompt raises, its answer being gone; the others go on.
        """
        threads.clear_at_end()
        found = []
        try:
            steps = self._batch.step()
        except BaseException:
            there = {*self._batch.rows, *self._batch.waiting}
            for row in [row for row in self._answers if row not in there]:
                self._let_go(row)
            raise
        for row, emitted in steps:
            number, answer, _ = self._answers[row]
            for token, from_draft, tree in emitted.each():
                response = answer.add(token, from_draft, tree)
                found.append((number, response))
                if response.finish_reason is not None:
                    break
            if row.answer.done or response.finish_reason is not None:
                self._let_go(row)
        return found

    def remove(self, number: int) -> None:
        """Let an answer go that nobody wants any more.

        Raises:
            OptionError: no answer that runs has this number.
        """
        row = next((row for row, (own, *_) in self._answers.items() if own == number), None)
        if row is None:
            raise OptionError(f"no answer of number {number} is running: it has ended")
        self._let_go(row)

    def close(self) -> None:
        """Let all answers go."""
        for row in list(self._answers):
            self._let_go(row)
        self._held.close()

    def _let_go(self, row: Row) -> None:
        """The session keeps what was given out."""
        _, answer, seat = self._answers.pop(row)
        self._company.leave(seat)
        self._batch.remove(row)
        if answer.count:
            row.answer.request.session.trim(answer.kept)


def batch_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    max_tokens: int | Sequence[int] | None = None,
    verbose: bool = False,
    **options: Any,
) -> BatchResponse:
    """Whole answers to several prompts, which run together.

    Args:
        prompts: texts or lists of token ids; no template is applied.
        max_tokens: of every answer, or of each.
        verbose: print a line when an answer has ended.
        options: of every answer; see `stream_generate`, whose errors they raise.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise OptionError("prompts must be several: give a list of texts or of lists of token ids")
    lengths = list(max_tokens) if isinstance(max_tokens, Sequence) else [max_tokens] * len(prompts)
    if len(lengths) != len(prompts):
        raise OptionError(
            f"max_tokens has {len(lengths)} values for {len(prompts)} prompts: give one for all, "
            "or one for each"
        )
    texts = [""] * len(prompts)
    stats = [DraftStats() for _ in prompts]
    with BatchGenerator(model, tokenizer) as batch:
        for prompt, length in zip(prompts, lengths, strict=True):
            batch.insert(prompt, length, **options)
        while len(batch):
            for number, response in batch.next():
                texts[number] += response.text
                stats[number] = response.stats
                if verbose and response.finish_reason is not None:
                    done = len(prompts) - len(batch)
                    print(f"{done} of {len(prompts)}: {response.generation_tokens} tokens")
    return BatchResponse(texts, stats)
