"""How many tokens a step yields: by prompt group, tree shape and temperature, decoded live."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, load, stream_generate
from mlx_redrafter.cache.session import Session
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import conditions
from mlx_redrafter.evaluation.prompts import DEV, Prompt, read_prompts
from mlx_redrafter.runtime.checks import at_least
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.terminal import tables
from mlx_redrafter.tree.shape import DEFAULT, TreeShape

SHAPES = (TreeShape.chain(4), TreeShape(3, 4, 8), TreeShape(4, 5, 16), DEFAULT)
TEMPERATURES = (0.0, 0.8)


@dataclass(frozen=True)
class Row:
    """Statistics of one tree shape and temperature over the prompts of one group."""

    shape: TreeShape
    temp: float
    group: str
    stats: DraftStats

    def as_dict(self) -> dict[str, Any]:
        return {
            "shape": str(self.shape),
            "temp": self.temp,
            "group": self.group,
            **self.stats.as_dict(),
        }


def measure(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    shapes: Sequence[TreeShape] = SHAPES,
    temperatures: Sequence[float] = TEMPERATURES,
    max_tokens: int = 128,
    seed: int = 0,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Decode every prompt with every shape and temperature. ``on_answer`` is called after each.

    Tokens per step is taken over all steps of a group, so long answers weigh more.
    """
    rows = {
        (shape, temp, group): Row(shape, temp, group, DraftStats())
        for shape in shapes
        for temp in temperatures
        for group in [*dict.fromkeys(p.group for p in prompts), "all"]
    }
    for prompt in prompts:
        ids, session = prompt.encode(tokenizer), Session()
        for shape in shapes:
            for temp in temperatures:
                *_, last = stream_generate(
                    model, tokenizer, ids, max_tokens, tree=shape, temp=temp, seed=seed,
                    session=session,
                )  # fmt: skip
                for group in (prompt.group, "all"):
                    rows[shape, temp, group].stats.add(last.stats)
                on_answer()
    return list(rows.values())


def run(
    model: str,
    drafter: str,
    prompts: Path | None,
    count: int | None,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Show tokens per step by tree, temperature and prompt group; raises OptionError."""
    at_least(1, count=count, max_tokens=max_tokens)
    loaded, tokenizer = load(model, drafter)
    if loaded.drafter is None:
        raise OptionError(f"there is no drafter for {model}: give one with --drafter")
    chosen = read_prompts(prompts or DEV, count)
    total = len(chosen) * len(SHAPES) * len(TEMPERATURES)
    with tables.progress(total) as step:
        rows = measure(loaded, tokenizer, chosen, max_tokens=max_tokens, on_answer=step)
    facts = {**conditions.of(loaded, chosen), "max_tokens": max_tokens}
    if as_json:
        print(json.dumps({"rows": [row.as_dict() for row in rows], **facts}))
        return
    groups = list(dict.fromkeys(row.group for row in rows))
    rates = tables.table("tree", "temperature", *groups, "accepted of checked")
    for i in range(0, len(rows), len(groups)):
        part = rows[i : i + len(groups)]
        cells = [f"{row.stats.tokens_per_step:.2f}" for row in part]
        share = f"{part[-1].stats.acceptance_rate:.0%}"
        rates.add_row(str(part[0].shape), f"{part[0].temp:g}", *cells, share)
    tables.show("Tokens per step", rates, facts)
