"""A target over many sequences, as training wants it: writing answers, and reading them again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import mlx.core as mx
import numpy as np

from mlx_redrafter.cache.layer import Kept, Pass, new_caches
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.models import vectorised
from mlx_redrafter.models.target import Target
from mlx_redrafter.runtime.compiler import keep_memory

_CHUNK = 512  # tokens of a pass over one sequence
_TRIES = 4  # draws of a token within top-p; the likeliest is taken after so many outside it
_OPENING = 8  # tokens of an answer in which a thought begins, if it does


@dataclass(frozen=True)
class Thought:
    """What an answer may think before it is given, and how that is kept short.

    Args:
        begun: does the prompt open the thought? Else one of the first tokens does.
        most: tokens of an answer that still thinks; the next ones are those of ``closing``.
        opens, closes: do the tokens so far end with what opens, or closes, a thought?
    """

    begun: bool
    most: int
    closing: tuple[int, ...]
    opens: Callable[[Sequence[int]], bool]
    closes: Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Request:
    """A prompt to answer: token ids, temperature (0 is greedy), seed of this answer alone.

    ``top_p`` below 1: of the likeliest tokens that have this mass together. A ``thought`` comes
    before the answer and is not part of its length.
    """

    prompt: Sequence[int]
    temp: float
    seed: int
    top_p: float = 1.0
    thought: Thought | None = None

    def draws(self, count: int, tries: int = 1) -> np.ndarray:
        """(count,) numbers in [0, 1), one for every token; (count, tries) for some tries."""
        # Without top-p the first is always taken: the others do not matter.
        own = _TRIES if self.top_p < 1 else 1
        drawn = np.random.default_rng(self.seed).random((count, own))
        return drawn[:, 0] if tries == 1 else np.broadcast_to(drawn, (count, tries))

    def longest(self, max_tokens: int) -> int:
        """Tokens of an answer of at most ``max_tokens``, with its thought."""
        thought = self.thought
        return max_tokens + (thought.most + len(thought.closing) if thought else 0)


class Course:
    """An answer while it is written: the tokens it has, and whether that is all."""

    def __init__(self, request: Request, max_tokens: int, end_tokens: Collection[int]) -> None:
        self._thought, self.max_tokens, self._ends = request.thought, max_tokens, end_tokens
        self._thinking = request.thought is not None and request.thought.begun
        self._limit = max_tokens
        self.tokens: list[int] = []
        self.done = False

    @property
    def steered(self) -> bool:
        """Is the next token another than the one that the target chooses?"""
        return self._thinking and len(self.tokens) >= cast(Thought, self._thought).most

    def take(self, token: int) -> int:
        """The next token: the one the target chose, or what closes its thought."""
        thought, count = self._thought, len(self.tokens) + 1
        if self.steered:
            assert thought is not None
            token = thought.closing[count - thought.most - 1]
        self.tokens.append(token)
        if self._thinking:
            assert thought is not None
            given = count - thought.most
            if given == len(thought.closing) or (given <= 0 and thought.closes(self.tokens)):
                self._thinking, self._limit = False, count + self.max_tokens
        elif thought is not None and count <= _OPENING and thought.opens(self.tokens):
            self._thinking = True
        self.done = token in self._ends or (not self._thinking and count >= self._limit)
        return token


@dataclass
class Answer:
    """Token ids, the end token included if it was reached, and features (n, L, D) float16.

    ``features[i]`` are the hidden states that predicted ``tokens[i]``; L is the number of layers
    asked for.
    """

    tokens: list[int]
    features: np.ndarray


class Told:
    """Whoever wants to know how far the writing of answers is."""

    def tokens(self, count: int) -> None:
        """So many tokens more are written."""

    def answer(self, index: int, answer: Answer) -> None:
        """The answer to the request with this index is complete."""


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
        self,
        requests: Sequence[Request],
        max_tokens: int,
        end_tokens: Collection[int],
        told: Told | None = None,
    ) -> list[Answer]:
        """Answer every request with at most ``max_tokens`` tokens and its thought; ``told`` hears
        of it.

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
        self,
        requests: Sequence[Request],
        max_tokens: int,
        end_tokens: Collection[int],
        told: Told | None = None,
    ) -> list[Answer]:
        told, answers = told or Told(), []
        for index, request in enumerate(requests):
            answers.append(self._answer(request, Course(request, max_tokens, end_tokens), told))
            told.answer(index, answers[-1])
        return answers

    def _answer(self, request: Request, course: Course, told: Told) -> Answer:
        """Every pass is under way before the token of the one before it is looked at."""
        limit = request.longest(course.max_tokens)
        text = _Text(self, len(request.prompt) + limit)
        temp, given = mx.array([request.temp]), nucleus([request])
        draws = mx.array(request.draws(limit, tries(given)), mx.float32)
        *_, (hidden, features) = text.read(request.prompt)
        chosen = sample(self.target.logits(hidden[-1:]), temp, draws[:1], *given)
        found = [features[-1:]]
        while True:
            done, following = len(course.tokens) + 1, None
            step = partial(text.extend, self._step)
            if done < limit and not course.steered:
                following, features = step(chosen, temp, draws[done : done + 1], *given)
                mx.async_eval(following, features)
            token = course.take(cast(int, chosen.item()))
            told.tokens(1)
            if course.done:
                return Answer(course.tokens, np.array(mx.concatenate(found)))
            if following is None:
                kept = mx.array([token], chosen.dtype)
                following, features = step(kept, temp, draws[done : done + 1], *given)
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
        token: mx.array, temp: mx.array, draw: mx.array, *given: mx.array,
    ) -> tuple[mx.array, mx.array, list[Kept]]:  # fmt: skip
        """The token after a token (1,)."""
        hidden, features, caches = self.run(token.astype(mx.int32), at, slots, caches)
        return sample(self.target.logits(hidden), temp, draw, *given), features, caches


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


def nucleus(requests: Sequence[Request]) -> tuple[mx.array, ...]:
    """(B,) top-p of every request, for `sample`; nothing where none restricts its tokens."""
    if all(r.top_p >= 1 for r in requests):
        return ()
    return (mx.array([r.top_p if r.top_p < 1 else np.inf for r in requests], mx.float32),)


def tries(given: tuple[mx.array, ...]) -> int:
    """Numbers that `sample` wants for a token."""
    return _TRIES if given else 1


def sample(
    logits: mx.array, temps: mx.array, draws: mx.array, top_p: mx.array | None = None
) -> mx.array:
    """logits (B, V), temps (B,), draws (B,) in [0, 1) -> tokens (B,), by the quantile.

    With top_p (B,), draws (B, tries): the first drawn token that is in the nucleus, which it is
    where the likelier ones have less than top_p together (arXiv 1904.09751). So nothing is sorted.
    """
    logits = logits.astype(mx.float32)
    best = mx.argmax(logits, axis=-1)
    top = mx.max(logits, axis=-1, keepdims=True)
    p = vectorised.exp((logits - top) / mx.maximum(temps, 1e-3)[:, None])
    mass = mx.cumsum(p, axis=-1)

    def drawn(draws: mx.array) -> mx.array:
        below = mass <= draws[:, None] * mass[:, -1:]
        return mx.minimum(mx.sum(below, axis=-1), logits.shape[-1] - 1).astype(mx.uint32)

    if top_p is None:
        return mx.where(temps > 0, drawn(draws), best)
    sampled = best
    for i in reversed(range(draws.shape[1])):
        token = drawn(draws[:, i])
        likelier = mx.where(p > mx.take_along_axis(p, token[:, None], axis=-1), p, 0).sum(-1)
        sampled = mx.where(likelier < top_p * mass[:, -1], token, sampled)
    return mx.where(temps > 0, sampled, best)
