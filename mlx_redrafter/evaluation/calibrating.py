"""Fits a drafter's calibration: what it says of the next token under sampling, and what came.

Before every token of sampled answers the drafter is asked for its first choice, and how likely the
token is that came, under every setting of a grid. The setting under which the answers are likeliest
is kept. One draft position is enough: the deeper ones were found to want the same numbers
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
from mlx_redrafter.drafters import UNFITTED, Draw
from mlx_redrafter.drafters.calibration import Calibration
from mlx_redrafter.evaluation.agreement import Calibration as Table
from mlx_redrafter.evaluation.agreement import Tally
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.evaluation.walk import Watched, proposing, trusted
from mlx_redrafter.tree.shape import TreeShape

TEMP, PROMPTS = 0.8, 48  # half of them for the fit
SHARPNESS = (0.5, 0.65, 0.8, 1.0, 1.25, 1.6, 2.2)
NOISE = (0.4, 0.55, 0.7, 0.85, 1.0)
GRID = [Calibration(u, r) for u, r in product(SHARPNESS, NOISE)]
_RAISE = 8.0  # added to the logit of the token that came, to be told how likely it was without
_LEAST = 1e-5  # probability of what is not drafted at all


class Seen(NamedTuple):
    """Along n tokens, by setting of the grid (n, S): probabilities of the first choice and of the
    answer's token (0: hardly any, or it cannot be drafted), and was the first choice right."""

    first: np.ndarray
    right: np.ndarray
    hit: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A calibration, and how far first choices could be trusted without it and with it, on answers
    that it was not fitted to."""

    calibration: Calibration
    prompts: int
    before: Table
    after: Table

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {value:g}" for name, value in asdict(self.calibration).items())
        return (
            f"sampled drafts, fitted to {self.prompts} answers: {numbers}; ECE on others "
            f"{self.before.error:.3f} before, {self.after.error:.3f} after"
        )

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
    """The setting of the greatest likelihood; with it, the share of first choices that were right
    over what was said of them."""
    scores = np.log(np.maximum(seen.right, _LEAST)).mean(axis=0)  # (S,)
    at = int(scores.argmax())
    share = float(seen.hit[:, at].sum() / seen.first[:, at].sum())
    return replace(GRID[at], share=round(min(max(share, 0.1), 1.0), 2))


def _along(
    model: Model, tokenizer: TokenizerWrapper, prompts: Sequence[Prompt], max_tokens: int, seed: int
) -> Iterator[Seen]:
    """Write every answer without drafts, and see what would have been drafted along it."""
    engine, says = Watched(model.engine), _saying(model)
    given, grid = mx.array([seed], mx.uint32), mx.array(list(product(SHARPNESS, NOISE)))
    for prompt in prompts:
        ids, rows = list(prompt.encode(tokenizer)), list[list[np.ndarray]]()
        written = stream_generate(
            model, tokenizer, ids, max_tokens, temp=TEMP, seed=seed, draft=False
        )
        tokens = [response.token for response in written]
        right = mx.array([*tokens, tokens[-1]], mx.int32)

        def add(state: State, rows: list[list[np.ndarray]] = rows, right: mx.array = right) -> None:
            at = min(len(rows), right.size - 1)
            found = says(state, right[at : at + 1], given, grid)
            mx.eval(found)
            rows.append([np.array(part) for part in found])

        engine.on_state = add
        tokens = engine.along(ids, tokens, SamplingParams(temp=TEMP, seed=seed))
        picks, costs, raised, raised_costs = (
            np.stack(part) for part in zip(*rows[: len(tokens)], strict=True)
        )
        wanted = np.array(tokens)[:, None]
        right_ones = np.where(raised == wanted, _lowered(np.exp(-raised_costs)), 0.0)
        yield Seen(np.exp(-costs), right_ones, picks == wanted)


def _lowered(probability: np.ndarray) -> np.ndarray:
    """Of a token whose logit was raised: what it is without."""
    return probability / (math.exp(_RAISE) * (1 - probability) + probability)


class _Raised:
    """A draw in which one token (1,) is likelier; a `drafters.Draw`. by: in units of its noise."""

    def __init__(self, draw: Draw, token: mx.array, by: mx.array) -> None:
        self.temperature, self._draw, self._token, self._by = draw.temperature, draw, token, by

    def noise(self, ahead: int, tokens: mx.array) -> mx.array:
        """(M,) -> (1, M)."""
        return self._draw.noise(ahead, tokens) + mx.where(tokens == self._token, self._by, 0.0)


def _saying(model: Model) -> Callable[..., list[mx.array]]:
    """What is said in a state under every setting (S,) of a grid (S, 2): the first choice and its
    cost, and the same where the token that came, (1,), is raised."""
    drafter = model.drafter
    assert drafter is not None, "whoever fits has one"

    def says(state: State, right: mx.array, seed: mx.array, grid: mx.array) -> list[mx.array]:
        propose, found = proposing(model, state, None), []
        draw = sampling.draw({"seed": seed, "temp": mx.array(TEMP)}, state.position + 1, 1)
        assert draw is not None
        for row in range(len(GRID)):
            sharpness, noise = grid[row, :1], grid[row, 1:]
            raised = _Raised(draw, right, _RAISE / (sharpness * noise * TEMP))
            with trusted(drafter, Calibration(sharpness, noise)):
                chains = [propose(TreeShape.chain(1), one)[0] for one in (draw, raised)]
            found.append([part for c in chains for part in (c.paths[0, 1], c.costs[0])])
        return [mx.stack(list(column)) for column in zip(*found, strict=True)]

    return mx.compile(says) if model.engine.compiled else says


def _joined(seen: Sequence[Seen]) -> Seen:
    return Seen(*(np.concatenate(part) for part in zip(*seen, strict=True)))


def _table(seen: Seen, calibration: Calibration) -> Table:
    """First choices by probability."""
    at = GRID.index(replace(calibration, share=1.0))
    tally, hits = Tally(1), seen.hit[:, at : at + 1]
    tally.add(calibration.share * seen.first[:, at : at + 1], hits, np.ones_like(hits))
    return tally.result("all", TEMP).depths[0].calibration
