"""How long an evaluation takes here, and how much of it there is time for."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model
from mlx_redrafter.evaluation import positions
from mlx_redrafter.evaluation.positions import RECORDED, SHAPES, TEMPERATURES
from mlx_redrafter.evaluation.prompts import read_prompts
from mlx_redrafter.terminal import console
from mlx_redrafter.training.config import Evaluating
from mlx_redrafter.training.folder import checkpoint

SHARE = 0.25  # of the fit and the evaluation together, at most, unless flags say otherwise
_TRIAL = 2, 16  # prompts and tokens: the first traces the graphs, the second tells the speed
MOST, _ENOUGH, _LEAST = (92, 128), (RECORDED, 32), (6, 32)  # prompts and tokens of answers


@dataclass(frozen=True)
class Pace:
    """What an evaluation takes: seconds before it has its pace, of a live step, of a token of an
    answer along which drafts are recorded, and of one of an answer before the live ones; tokens of
    a live step; seconds that telling took."""

    once: float
    step: float
    recorded: float
    per_step: float
    first: float = 0.0
    trial: float = 0.0

    def seconds(self, prompts: int, tokens: float) -> float:
        """Of so many prompts, with answers of so many tokens."""
        live = prompts * len(SHAPES) * self.step / self.per_step
        recorded = min(RECORDED, prompts) * self.recorded
        return (
            self.once
            + ((live + recorded) * len(TEMPERATURES) + _before(prompts) * self.first) * tokens
        )

    def chosen(self, asked: Evaluating, room: float) -> tuple[int, int]:
        """Prompts and tokens: those asked for, and of what was left open as much as takes so many
        seconds. First there are fewer prompts, then shorter answers, and a few in any case."""
        plan = [(n, MOST[1]) for n in range(MOST[0], _ENOUGH[0], -1)]
        plan += [(_ENOUGH[0], n) for n in range(MOST[1], _ENOUGH[1], -8)]
        plan += [(n, _LEAST[1]) for n in range(_ENOUGH[0], _LEAST[0] - 1, -1)]
        for prompts, tokens in plan:
            found = asked.prompts or prompts, asked.max_tokens or tokens
            if self.seconds(*found) <= room:
                break
        return found


def _before(prompts: int) -> int:
    """Answers before the live ones."""
    live, recorded = prompts * len(SHAPES), min(RECORDED, prompts)
    return positions.answers(prompts) - len(TEMPERATURES) * (live + recorded)


def measure(model: Model, tokenizer: TokenizerWrapper) -> Pace:
    """From an evaluation of two short answers a kind, the second of which has been compiled for."""
    times = [time.perf_counter()]
    count, tokens = _TRIAL
    found = positions.evaluate(
        model, tokenizer, read_prompts(count=count), max_tokens=tokens,
        on_answer=lambda: times.append(time.perf_counter()),
    )  # fmt: skip
    spent = [b - a for a, b in itertools.pairwise(times)]
    live = len(SHAPES) * len(TEMPERATURES)
    before, spent = spent[: _before(count)], spent[_before(count) :]
    last = before[-1] if before else 0.0
    first, second = spent[:live], spent[live : 2 * live]
    begun, warm = spent[2 * live :: 2], spent[2 * live + 1 :: 2]
    stats = [row.stats for row in found.live if row.group == "all"]
    steps, made = sum(s.steps for s in stats), sum(s.tokens for s in stats)
    return Pace(
        once=max(0.0, sum(first) + sum(begun) - sum(second) - sum(warm))
        + sum(before)
        - count * last,
        first=last / tokens,
        step=sum(second) / (steps / count),
        recorded=sum(warm) / len(TEMPERATURES) / tokens,
        per_step=made / steps,
        trial=times[-1] - times[0],
    )


def room(fit_seconds: float) -> float:
    """Seconds of an evaluation that take no more than their share beside such a fit."""
    return fit_seconds * SHARE / (1 - SHARE)


def extent(
    out: Path, asked: Evaluating, model: Model, tokenizer: TokenizerWrapper
) -> tuple[int, int]:
    """Prompts and tokens of the evaluation in a training folder: as asked for, else such that it
    takes a part of the time that the fit took."""
    saved = checkpoint(out)
    if saved is None or (asked.prompts and asked.max_tokens):
        return asked.prompts or MOST[0], asked.max_tokens or MOST[1]
    found = measure(model, tokenizer).chosen(asked, room(float(saved[1]["seconds"])))
    if found != MOST:
        console.note(
            f"note: evaluation with {found[0]} prompts, answers of {found[1]} tokens: more would "
            "take long beside the fit; --eval-prompts and --eval-tokens say otherwise"
        )
    return found
