"""How many tokens a step yields: by prompt group, tree shape and temperature, decoded live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, stream_generate
from mlx_redrafter.cache.session import Session
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.stats import DraftStats
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
