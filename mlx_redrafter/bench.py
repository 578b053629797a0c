"""Speed side by side: mlx_lm, our plain decoding, and drafting, in turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model

from mlx_redrafter.api import Model
from mlx_redrafter.decoding.engine import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.decoding.tree import TreeShape
from mlx_redrafter.prompts import Prompt

Decode = Callable[[list[int]], tuple[list[int], float]]
"""Decodes one prompt: the tokens, and the seconds between the first token and the last."""


@dataclass(frozen=True)
class Result:
    """Speeds of one way to decode, in tokens per second, in the order they were measured."""

    name: str
    speeds: list[float]
    ratios: list[float]  # to the first way, prompt by prompt in the same round

    @property
    def median(self) -> float:
        return statistics.median(self.speeds)

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.ratios)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tokens_per_second": round(self.median, 2),
            "ratio": round(self.median_ratio, 3),
            "ratios": [round(r, 3) for r in self.ratios],
        }


def compare(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    shapes: Sequence[TreeShape] = (),
    max_tokens: int = 64,
    rounds: int = 3,
    temp: float = 0.0,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Time every way on every prompt, ``rounds`` times, one after the other.

    Speed counts the tokens after the first one, so neither reading the prompt nor the first step
    is in it. End tokens are ignored: every answer has ``max_tokens`` tokens.
    """
    plain = TreeShape.plain()
    ways: dict[str, Decode] = {"plain": _ours(model, plain, max_tokens, temp)}
    if temp == 0:
        ways = {"mlx_lm": _mlx_lm(model, max_tokens), **ways}
    for shape in shapes:
        ways[str(shape)] = _ours(model, shape, max_tokens, temp)
    ids = [p.encode(tokenizer) for p in prompts]
    for decode in ways.values():  # compile and page in
        decode(ids[0])
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for prompt in ids:
            for name, decode in ways.items():
                tokens, seconds = decode(prompt)
                speeds[name].append((len(tokens) - 1) / seconds)
                on_answer()
    first = next(iter(speeds.values()))
    return [
        Result(name, values, [v / f for v, f in zip(values, first, strict=True)])
        for name, values in speeds.items()
    ]


def _mlx_lm(model: Model, max_tokens: int) -> Decode:
    theirs, _ = load_model(model.folder)

    def decode(ids: list[int]) -> tuple[list[int], float]:
        tokens, start = [], 0.0
        for token, _ in generate_step(mx.array(ids), theirs, max_tokens=max_tokens):
            start = start or time.perf_counter()
            tokens.append(int(token))
        return tokens, time.perf_counter() - start

    return decode


def _ours(model: Model, shape: TreeShape, max_tokens: int, temp: float) -> Decode:
    params = SamplingParams(temp=temp)

    def decode(ids: list[int]) -> tuple[list[int], float]:
        tokens: list[int] = []
        start, extra = 0.0, 0
        for emitted in model.engine.generate(ids, params, shape, max_tokens, session=Session()):
            if not start:
                start, extra = time.perf_counter(), len(emitted.tokens) - 1
            tokens += emitted.tokens
        return tokens[extra:], time.perf_counter() - start

    return decode
