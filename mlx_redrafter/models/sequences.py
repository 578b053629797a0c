"""A target over many sequences, as training wants it: writing answers, and reading them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import mlx.core as mx
import numpy as np

from mlx_redrafter.cache.layer import Kept, Pass, new_caches
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.models import vectorised
from mlx_redrafter.models.target import Target
from mlx_redrafter.runtime.compiler import keep_memory

_CHUNK = 512  # tokens of a pass over one sequence


@dataclass(frozen=True)
class Request:
    """A prompt to answer: token ids, temperature (0 is greedy), seed of this answer alone."""

    prompt: Sequence[int]
    temp: float
    seed: int

    def draws(self, count: int) -> np.ndarray:
        """(count,) numbers in [0, 1), one for every token."""
        return np.random.default_rng(self.seed).random(count)


@dataclass
class Answer:
    """Token ids, the end token included if it was reached, and features (n, L, D) float16.

    ``features[i]`` are the hidden states that predicted ``tokens[i]``; L is the number of layers
    asked for.
    """

    tokens: list[int]
    features: np.ndarray


class Sequences(ABC):
    """A target that runs sequences and returns features of chosen layers.

    A feature is a layer's output divided by its root mean square: what every norm after it reads,
    and small enough for 16 bits.

    Args:
        layers: indices of the layers whose outputs are wanted.
    """

    together: ClassVar[bool]
    """Does a pass read the weights once for many sequences?"""

    def __init__(self, target: Target, layers: Sequence[int]) -> None:
        self.target, self.layers = target, tuple(layers)

    @abstractmethod
    def write(
        self, requests: Sequence[Request], max_tokens: int, end_tokens: Collection[int]
    ) -> list[Answer]:
        """Answer every request with at most ``max_tokens`` tokens.

        An answer depends on its own request; to the bit where matrix products do not depend on
        their number of rows, else up to rounding.
        """

    @abstractmethod
    def read(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """Features (n, L, D) of (prompt, answer) pairs with n answer tokens, as ``write`` makes."""

    @abstractmethod
    def choices(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """(n,) what the target would choose itself at the place of each of n answer tokens."""


class OneByOne(Sequences):
    """Any target, one sequence after the other: nothing is asked of its layers but to decode."""

    together = False

    def __init__(self, target: Target, layers: Sequence[int]) -> None:
        super().__init__(target, layers)
        keep_memory()
        self._step = mx.compile(self._next)

    def write(
        self, requests: Sequence[Request], max_tokens: int, end_tokens: Collection[int]
    ) -> list[Answer]:
        return [self._answer(request, max_tokens, end_tokens) for request in requests]

    def _answer(self, request: Request, max_tokens: int, end_tokens: Collection[int]) -> Answer:
        """Every pass is under way before the token of the one before it is looked at."""
        text = _Text(self, len(request.prompt) + max_tokens)
        temp, draws = mx.array([request.temp]), mx.array(request.draws(max_tokens), mx.float32)
        *_, (hidden, features) = text.read(request.prompt)
        chosen = sample(self.target.logits(hidden[-1:]), temp, draws[:1])
        tokens: list[int] = []
        found = [features[-1:]]
        while True:
            done, following = len(tokens) + 1, None
            if done < max_tokens:
                following, features = text.extend(self._step, chosen, temp, draws[done : done + 1])
                mx.async_eval(following, features)
            tokens.append(cast(int, chosen.item()))
            if following is None or tokens[-1] in end_tokens:
                return Answer(tokens, np.array(mx.concatenate(found)))
            chosen = following
            found.append(features)

    def read(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        result = []
        for prompt, answer in sequences:
            parts = self._through(prompt, answer)
            every = np.concatenate([np.array(features) for _, features in parts])
            result.append(every[len(every) - len(answer) :])
        return result

    def choices(self, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        found = [
            np.array(mx.argmax(self.target.logits(hidden), axis=-1))
            for hidden, _ in self._through(prompt, answer)
        ]
        return np.concatenate(found)[-len(answer) :]

    def _through(
        self, prompt: Sequence[int], answer: Sequence[int]
    ) -> Iterator[tuple[mx.array, mx.array]]:
        tokens = [*prompt, *answer[:-1]]
        return _Text(self, len(tokens)).read(tokens)

    def run(
        self, tokens: mx.array, at: mx.array, slots: mx.array, caches: list[Kept]
    ) -> tuple[mx.array, mx.array, list[Kept]]:
        """Tokens (n,) from position ``at`` (1,) on, in slots (S,): hidden (n, D), features
        (n, L, D) float16, caches."""
        n = tokens.shape[0]
        positions, into = at + mx.arange(n, dtype=mx.int32), Pass(caches, at)
        mask = slots[None] <= positions[:, None]
        hidden, inner = self.target(tokens, positions, mask, slots, into, self.layers)
        return hidden, stacked(inner, n), into.caches

    def _next(
        self, at: mx.array, slots: mx.array, caches: list[Kept],
        token: mx.array, temp: mx.array, draw: mx.array,
    ) -> tuple[mx.array, mx.array, list[Kept]]:  # fmt: skip
        """The token after a token (1,)."""
        hidden, features, caches = self.run(token.astype(mx.int32), at, slots, caches)
        return sample(self.target.logits(hidden), temp, draw), features, caches


class _Text:
    """One sequence that grows.

    Args:
        capacity: tokens that it may have.
    """

    def __init__(self, of: OneByOne, capacity: int) -> None:
        self.of, self.length, self.capacity = of, 0, capacity_for(capacity)
        self.caches = new_caches(of.target.caches, self.capacity, of.target.dtype)
        self.slots = mx.arange(self.capacity, dtype=mx.int32)

    def read(self, tokens: Sequence[int]) -> Iterator[tuple[mx.array, mx.array]]:
        """Hidden (n, D) and features (n, L, D) of one part after the other."""
        for start in range(0, len(tokens), _CHUNK):
            part = mx.array(list(tokens[start : start + _CHUNK]), mx.int32)
            slots = self.slots[: capacity_for(start + len(part))]
            hidden, features, self.caches = self.of.run(part, self._at(), slots, self._taken())
            mx.eval(hidden, features, self.caches)
            self.length += len(part)
            yield hidden, features

    def extend(self, step: Callable[..., Any], *given: mx.array) -> tuple[mx.array, mx.array]:
        """One token more: what ``step`` makes of it."""
        chosen, features, self.caches = step(self._at(), self.slots, self._taken(), *given)
        self.length += 1
        return chosen, features

    def _at(self) -> mx.array:
        return mx.array([self.length], mx.int32)

    def _taken(self) -> list[Kept]:
        """The caches, for a pass that writes into them: they must have no other owner."""
        caches, self.caches = self.caches, []
        return caches


def stacked(outputs: Sequence[mx.array], rows: int) -> mx.array:
    """What layers put out, (R, D) each -> features (R, L, D) float16."""
    if not outputs:
        return mx.zeros((rows, 0, 0), mx.float16)
    return mx.stack([_normalised(x) for x in outputs], axis=1)


def _normalised(x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return (x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + 1e-12)).astype(mx.float16)


def sample(logits: mx.array, temps: mx.array, draws: mx.array) -> mx.array:
    """logits (B, V), temps (B,), draws (B,) in [0, 1) -> tokens (B,), by the quantile."""
    logits = logits.astype(mx.float32)
    best = mx.argmax(logits, axis=-1)
    top = mx.max(logits, axis=-1, keepdims=True)
    mass = mx.cumsum(vectorised.exp((logits - top) / mx.maximum(temps, 1e-3)[:, None]), axis=-1)
    below = mass <= draws[:, None] * mass[:, -1:]
    sampled = mx.minimum(mx.sum(below, axis=-1), logits.shape[-1] - 1)
    return mx.where(temps > 0, sampled.astype(mx.uint32), best)
