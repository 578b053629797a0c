"""Does a drafter fit its model? Its first choice against the model's own, along a stored answer.

For every position p of the answer the drafter reads what the model left there, consumes the true
token p + 1 and drafts one token; the model, having read as far, says what comes next. The share of
positions at which both say the same tells a wrong layer, a wrong norm or another base model at
once, where the text, which no drafter can change, tells nothing.
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.drafters import Drafter, files, loading
from mlx_redrafter.drafters.rollout import first_choices
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Target
from mlx_redrafter.models.features import Features
from mlx_redrafter.runtime.paths import ASSETS
from mlx_redrafter.text.template import prompt_ids

FILE = ASSETS / "selfcheck.json"
LONGEST = 400  # tokens of the answer that are read
LEAST = 0.35  # a smaller share says that something is wrong


class Reading(NamedTuple):
    """A text that the model has read: tokens (P,), features of P rows, the model's own next token
    (P,) after each of them, and the position at which the answer begins."""

    tokens: mx.array
    read: Features
    choices: mx.array
    start: int


@dataclass(frozen=True)
class Fit:
    """How often the drafter's first choice is the model's next token.

    Args:
        agreement: share of the positions.
        positions: of the stored answer.
        chosen: keys of config.json that were left open, as they fit best.
        tried: how many readings of the files were compared.
    """

    agreement: float
    positions: int
    chosen: Mapping[str, Any] = field(default_factory=dict)
    tried: int = 1

    def __str__(self) -> str:
        best = f"; the best of {self.tried} readings of its files: {json.dumps(dict(self.chosen))}"
        return (
            f"the drafter's first choice is the model's next token at {self.agreement:.0%} of "
            f"{self.positions} positions{best * (self.tried > 1)}"
        )

    def warn(self, model: str) -> None:
        """Say what to try, if they agree too seldom."""
        if self.agreement < LEAST:
            warnings.warn(
                f"this head hardly fits {model}: it agrees at {self.agreement:.0%} of the "
                f"positions, and one that fits at {LEAST:.0%} and more; use the model that it was "
                "made for, download both again, or choose another head: mlx-redrafter drafters "
                f"{shlex.quote(model)}",
                stacklevel=2,
            )


class Along:
    """The stored answer, read by a model once for every set of layers that a drafter wants."""

    def __init__(self, target: Target, tokenizer: TokenizerWrapper) -> None:
        stored = json.loads(FILE.read_text(encoding="utf-8"))
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": stored["question"]}])
        answer = tokenizer.encode(stored["answer"], add_special_tokens=False)
        self.target, self._start = target, len(prompt)
        self._tokens = [*prompt, *answer[:LONGEST]]
        self._read: dict[tuple[int, ...], Reading] = {}

    def read(self, layers: Sequence[int]) -> Reading:
        """The reading with the outputs of these layers."""
        wanted = tuple(layers)
        if wanted not in self._read:
            self._read[wanted] = read(self.target, self._tokens, wanted, self._start)
        return self._read[wanted]


def read(
    target: Target, tokens: Sequence[int], layers: Sequence[int] = (), start: int = 1
) -> Reading:
    """Read a text in one pass; an answer begins at position ``start``."""
    capacity = capacity_for(len(tokens))
    slots, ids = mx.arange(capacity, dtype=mx.int32), mx.array(list(tokens), mx.int32)
    positions = slots[: len(tokens)]
    caches = Pass(new_caches(target.caches, capacity, target.dtype), mx.array([0], mx.int32))
    mask = slots[None] <= positions[:, None]
    hidden, outputs = target(ids, positions, mask, slots, caches, layers)
    choices = mx.argmax(target.logits(hidden), axis=-1).astype(mx.int32)
    mx.eval(hidden, outputs, choices)
    return Reading(ids, Features(hidden, tuple(layers), outputs), choices, start)


def check(folder: Path, along: Along) -> Fit:
    """Measure the drafter in a folder as it stands.

    Raises:
        DrafterError: missing or broken files, or a drafter for another model.
    """
    kind = loading.kind_of(folder)
    return _measured(kind.load(folder, along.target), along)


def settle(folder: Path, along: Along) -> Fit:
    """Try what config.json leaves open, and leave what fits best in it.

    Raises:
        DrafterError: as `check`, for every alternative.
    """
    kind, raw = loading.kind_of(folder), files.raw_config(folder)
    alternatives = kind.alternatives(raw)
    if len(alternatives) == 1:
        return check(folder, along)
    found: list[Fit] = []
    problem = None
    for keys in alternatives:
        files.write_config(folder, {**raw, **keys})
        try:
            fit = _measured(kind.load(folder, along.target), along)
        except DrafterError as error:
            problem = problem or error
        else:
            found.append(Fit(fit.agreement, fit.positions, keys, len(alternatives)))
    if problem is not None and not found:
        raise problem
    best = max(found, key=lambda fit: fit.agreement)  # of equal ones the first
    files.write_config(folder, {**raw, **best.chosen})
    return best


def _measured(drafter: Drafter, along: Along) -> Fit:
    return Fit(*agreement(drafter, along.read(drafter.features or ())))


def agreement(drafter: Drafter, reading: Reading) -> tuple[float, int]:
    """The share of positions at which drafter and model say the same, and their number."""
    drafts = first_choices(drafter, reading.read, reading.tokens)  # (P-1,)
    same = (drafts == reading.choices[1:])[reading.start - 1 :]
    return same.astype(mx.float32).mean().item(), same.size  # type: ignore[return-value]
