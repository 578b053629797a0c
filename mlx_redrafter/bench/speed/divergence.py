"""Greedy drafted text against greedy plain text, and why they part where they do.

In 16-bit and 4-bit a pass over N rows may round differently from a pass over one. Where two tokens
are nearly equally likely that can turn the choice, and the texts differ from there on. Anywhere
else a difference is a bug.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx

from mlx_redrafter.api import Model
from mlx_redrafter.bench.speed import ways
from mlx_redrafter.bench.speed.compare import Encoded
from mlx_redrafter.budget.chunks import USUAL
from mlx_redrafter.budget.costs import bare_pass
from mlx_redrafter.cache.layer import new_caches
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.evaluation.model_checks import TOLERANCE
from mlx_redrafter.runtime.device import dtype_name
from mlx_redrafter.tree.shape import TreeShape


@dataclass(frozen=True)
class Case:
    """The first difference of one prompt's two answers.

    ``margin``: logit of the likeliest token less that of the second; ``deficit``: less that of the
    token that drafting took. Both from a plain pass over one row behind the common text.
    ``limit``: what rounding can explain, by dtype and the size of the logits (``doctor``'s rule).
    """

    prompt: int
    group: str
    way: str
    position: int  # tokens of the answer that are the same
    plain_token: int
    drafted_token: int
    margin: float
    deficit: float
    limit: float

    @property
    def bug(self) -> bool:
        """Is the difference larger than rounding explains?"""
        return not self.deficit <= self.limit  # so that NaN is a bug too

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bug": self.bug}


@dataclass(frozen=True)
class Compared:
    """One drafted answer: its way, its length, and its first difference, if there is one."""

    way: str
    tokens: int
    case: Case | None


def compare(
    model: Model, prompts: Sequence[Encoded], shapes: Sequence[ways.Way], max_tokens: int
) -> Iterator[Compared]:
    """Every way on every prompt against plain decoding, all greedy."""
    plain = ways.ours(model, TreeShape.plain(), max_tokens, 0)
    run = bare_pass(model.target)
    read = mx.compile(run) if model.engine.compiled else run
    for number, (group, ids) in enumerate(prompts):
        expected = plain.decode(ids, 0.0).tokens
        for way in shapes:
            given = way.decode(ids, 0.0).tokens
            pairs = enumerate(zip(expected, given, strict=True))
            at = next((i for i, (a, b) in pairs if a != b), None)
            case = None
            if at is not None:
                logits = _one_row(model, read, [*ids, *expected[:at]], len(ids))
                facts = _measure(logits, given[at], model.target.dtype)
                case = Case(number, group, way.name, at, expected[at], given[at], *facts)
            yield Compared(way.name, len(given), case)


def summarise(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Per way: answers, tokens, how many diverge per hundred, margins, bugs."""
    rows = []
    for way in dict.fromkeys(c.way for c in compared):
        mine = [c for c in compared if c.way == way]
        cases = [c.case for c in mine if c.case is not None]
        rows.append(
            {
                "way": way,
                "answers": len(mine),
                "tokens": sum(c.tokens for c in mine),
                "diverged": len(cases),
                "per_hundred": 100 * len(cases) / len(mine),
                "largest_margin": max((c.margin for c in cases), default=None),
                "largest_deficit": max((c.deficit for c in cases), default=None),
                "bugs": sum(c.bug for c in cases),
            }
        )
    return rows


def _one_row(model: Model, read: Any, text: Sequence[int], prompt: int) -> mx.array:
    """Logits (V,) after the text: the prompt in chunks, then token by token, as plain decoding
    reads it. ``prompt`` is how many tokens of the text the prompt has."""
    target = model.target
    caches = new_caches(target.caches, capacity_for(len(text)), target.dtype)
    # The last token of the prompt is the root of the first step: a row of its own.
    starts = [*range(0, prompt - 1, USUAL), *range(prompt - 1, len(text)), len(text)]
    for start, end in pairwise(starts):
        ids = mx.array(list(text[start:end]), mx.int32)
        hidden, caches = read(ids, mx.array([start], mx.int32), caches)
        mx.eval(hidden, caches)
    return target.logits(hidden[-1:])[0].astype(mx.float32)


def _measure(logits: mx.array, drafted: int, dtype: mx.Dtype) -> tuple[float, float, float]:
    """Margin, deficit of the drafted token, and what rounding explains."""
    name = dtype_name(dtype)
    second, best = cast(list[float], mx.sort(logits)[-2:].tolist())
    scale, taken = (cast(float, x.item()) for x in (mx.abs(logits).max(), logits[drafted]))
    return best - second, best - taken, TOLERANCE[name] * scale
