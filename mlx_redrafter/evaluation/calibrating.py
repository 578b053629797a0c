"""Fits a drafter's calibration: what it says of the next token under sampling, and what came.

Before every token of sampled answers the drafter proposes its likeliest few tokens under every
setting of a grid. The setting under which the answers are likeliest is kept: the fit is by maximum
likelihood over one draft position, as the deeper ones were found to want the same numbers
(docs/decisions.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, stream_generate
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.decoding.step import State
from mlx_redrafter.drafters import UNFITTED
from mlx_redrafter.drafters.calibration import Calibration
from mlx_redrafter.evaluation.agreement import Calibration as Table
from mlx_redrafter.evaluation.agreement import Tally
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.evaluation.walk import Watched, proposing, trusted
from mlx_redrafter.tree.shape import TreeShape

TEMP = 0.8
SHARPNESS = (0.5, 0.65, 0.8, 1.0, 1.25, 1.6, 2.2)
NOISE = (0.4, 0.55, 0.7, 0.85, 1.0)
SHARES = tuple(i / 100 for i in range(100, 59, -1))
GRID = [Calibration(u, r) for u, r in product(SHARPNESS, NOISE)]
_LIKELIEST = TreeShape(4, 1, 5)
_LEAST = 1e-4  # probability of what nothing was said of


class Seen(NamedTuple):
    """Along n tokens, by setting of the grid: probabilities (n, S) of the first choice, of the
    answer's token (0: not among the likeliest) and of all of these, and was the first one right."""

    first: np.ndarray
    right: np.ndarray
    total: np.ndarray
    hit: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A calibration, and how far first choices could be trusted without it and with it, on answers
    that it was not fitted to."""

    calibration: Calibration
    prompts: int
    before: Table
    after: Table

    def as_dict(self) -> dict[str, Any]:
        tables = {"before": self.before.as_dict(), "after": self.after.as_dict()}
        return {**asdict(self.calibration), "fitted_to": self.prompts, "temp": TEMP, **tables}


def fit(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    max_tokens: int,
    seed: int = 0,
    on_answer: Callable[[], None] = lambda: None,
) -> Fitted:
    """Fit to the answers to every second prompt, and try the fit on the others. ``on_answer`` is
    called after each."""
    seen = []
    for one in _along(model, tokenizer, prompts, max_tokens, seed):
        seen.append(one)
        on_answer()
    found = best(_joined(seen[1::2] or seen))
    return Fitted(found, len(seen[1::2] or seen), *(
        _table(_joined(seen[::2]), calibration) for calibration in (UNFITTED, found)
    ))  # fmt: skip


def best(seen: Seen) -> Calibration:
    """The setting, and the share of tokens that can be drafted, of the greatest likelihood."""
    known = seen.right > 0
    found, most = UNFITTED, -math.inf
    for share in SHARES:
        likely = np.where(known, share * seen.right, 1 - share * seen.total)
        scores = np.log(np.maximum(likely, _LEAST)).mean(axis=0)  # (S,)
        if scores.max() > most:
            most, found = scores.max(), replace(GRID[int(scores.argmax())], share=share)
    return found


def _along(
    model: Model, tokenizer: TokenizerWrapper, prompts: Sequence[Prompt], max_tokens: int, seed: int
) -> Iterator[Seen]:
    """Write every answer without drafts, and see what would have been drafted along it."""
    engine, says = Watched(model.engine), _saying(model)
    given = mx.array([seed], mx.uint32)
    for prompt in prompts:
        ids, rows = list(prompt.encode(tokenizer)), list[tuple[np.ndarray, np.ndarray]]()
        written = stream_generate(
            model, tokenizer, ids, max_tokens, temp=TEMP, seed=seed, draft=False
        )
        tokens = [response.token for response in written]

        def add(state: State, rows: list[tuple[np.ndarray, np.ndarray]] = rows) -> None:
            found = says(state, given)
            mx.eval(found)
            rows.append((np.array(found[0]), np.exp(-np.array(found[1]))))

        engine.on_state = add
        tokens = engine.along(ids, tokens, SamplingParams(temp=TEMP, seed=seed))
        picks, probability = (np.stack(part) for part in zip(*rows[: len(tokens)], strict=True))
        same = picks == np.array(tokens)[:, None, None]  # (n, S, 4)
        right, total = (probability * same).sum(-1), probability.sum(-1)
        yield Seen(probability[..., 0], right, total, same[..., 0])


def _saying(model: Model) -> Callable[[State, mx.array], tuple[mx.array, mx.array]]:
    """What is likeliest in a state under every setting: tokens (S, 4) and costs (S, 4)."""
    drafter = model.drafter
    assert drafter is not None, "whoever fits has one"

    def says(state: State, seed: mx.array) -> tuple[mx.array, mx.array]:
        propose, tokens, costs = proposing(model, state, None), [], []
        draw = sampling.draw({"seed": seed, "temp": mx.array(TEMP)}, state.position + 1, 1)
        for setting in GRID:
            with trusted(drafter, setting):
                found = propose(_LIKELIEST, draw)[-1]  # the first level, behind the root
            tokens.append(found.paths[:, 1])
            costs.append(found.costs)
        return mx.stack(tokens), mx.stack(costs)

    return mx.compile(says) if model.engine.compiled else says


def _joined(seen: Sequence[Seen]) -> Seen:
    return Seen(*(np.concatenate(part) for part in zip(*seen, strict=True)))


def _table(seen: Seen, calibration: Calibration) -> Table:
    """First choices by probability."""
    at = GRID.index(replace(calibration, share=1.0))
    tally, hits = Tally(1), seen.hit[:, at : at + 1]
    tally.add(calibration.share * seen.first[:, at : at + 1], hits, np.ones_like(hits))
    return tally.result("all", TEMP).depths[0].calibration
