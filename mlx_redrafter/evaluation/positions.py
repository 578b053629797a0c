"""How good a drafter of any kind is on prompts that it was not trained on: live, and by position.

Live, every prompt is decoded with drafting, and the steps are counted. By position, the drafter
follows an answer that the target wrote: from before every a_i it consumes the true a_i, ..,
a_{i+k-2} and predicts a_{i+k-1}, for every k <= K. That tells how often its first choice is right,
and how far its own probability can be trusted: the calibration table. The drafts made along the
same answers tell what every shape of a tree yields.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model
from mlx_redrafter.budget import yields
from mlx_redrafter.budget.yields import Yields
from mlx_redrafter.drafters import calibration
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import acceptance, calibrating
from mlx_redrafter.evaluation.agreement import BINS, Agreement, of_answers
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.evaluation.walk import DEPTH
from mlx_redrafter.evaluation.yields_record import TEMPERATURES, record, tabulate
from mlx_redrafter.models.weights import read_json
from mlx_redrafter.runtime import device
from mlx_redrafter.tree.shape import DEFAULT, TreeShape

FILE = "evaluation.json"
SHAPES = (TreeShape.chain(4), TreeShape(3, 4, 8), DEFAULT)
RECORDED = 24  # prompts along whose answers drafts are recorded


@dataclass(frozen=True)
class Evaluation:
    """All that was measured, and under which conditions."""

    live: tuple[acceptance.Row, ...]
    agreement: tuple[Agreement, ...]
    yields: Yields
    fitted: calibrating.Fitted
    conditions: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. ``calibration`` is what a drafting policy reads."""
        tables = [
            {
                "group": row.group,
                "temp": row.temp,
                "depths": [{"depth": d.depth, **d.calibration.as_dict()} for d in row.depths],
            }
            for row in self.agreement
        ]
        edges = [i / BINS for i in range(BINS + 1)]
        return {
            "conditions": self.conditions,
            "live": [row.as_dict() for row in self.live],
            "teacher_forced": [row.as_dict() for row in self.agreement],
            "calibration": {"edges": edges, "tables": tables, "fitted": self.fitted.as_dict()},
        }


def evaluate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    shapes: Sequence[TreeShape] = SHAPES,
    max_tokens: int = 128,
    depth: int = DEPTH,
    seed: int = 0,
    on_answer: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure ``model.drafter``, of any kind: live with all prompts, and along the answers to the
    first of them.

    Args:
        prompts: none of them may have been trained on.
        depth: draft positions K that are compared with the answers.
        on_answer: called ``answers(...)`` times.

    Raises:
        OptionError: no drafter, or no prompts.
    """
    if model.drafter is None:
        raise OptionError(f"there is no drafter to evaluate for {model.name}: train one")
    if not prompts:
        raise OptionError("there are no prompts to evaluate with: give at least one")
    some, recorded = prompts[:RECORDED], []
    tried = prompts[: calibrating.PROMPTS]
    fitted = calibrating.fit(model, tokenizer, tried, max_tokens, seed, on_answer)
    model.drafter.calibration = fitted.calibration
    live = acceptance.measure(
        model, tokenizer, prompts, shapes=shapes, temperatures=TEMPERATURES,
        max_tokens=max_tokens, seed=seed, on_answer=on_answer,
    )  # fmt: skip
    for answer in record(model, tokenizer, some, max_tokens, seed, depth):
        recorded.append(answer)
        on_answer()
    facts = {
        **conditions(model), "prompts": dict(Counter(p.group for p in prompts)),
        "recorded": len(some), "max_tokens": max_tokens, "seed": seed,
    }  # fmt: skip
    agreement = tuple(of_answers(recorded))
    return Evaluation(tuple(live), agreement, tabulate(recorded), fitted, facts)


def answers(prompts: int, shapes: Sequence[TreeShape] = SHAPES) -> int:
    """How many answers ``evaluate`` writes: for a progress bar."""
    recorded = len(TEMPERATURES) * (prompts * len(shapes) + min(prompts, RECORDED))
    return recorded + min(prompts, calibrating.PROMPTS)


def conditions(model: Model) -> dict[str, Any]:
    """What a result holds for: the model and its precision, the machine, the versions."""
    quantization = read_json(model.folder / "config.json").get("quantization") or {}
    return device.conditions(
        short_name(model.name),
        model.target.dtype,
        *("chip", "device", "blas", "mlx", "mlx_redrafter"),
        model_bits=quantization.get("bits"),
        drafter=model.drafter_folder.name if model.drafter_folder else None,
    )


def short_name(model: str) -> str:
    """A hub id or the built-in name as it is; of a path, which is the user's own, the last part."""
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).is_dir()
    return Path(model).name if is_path else model


def write(folder: Path, evaluation: Evaluation) -> None:
    """Write ``evaluation.json``, whole or not at all, and the table that the policy reads into the
    drafter's folder."""
    file = folder / FILE
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(evaluation.as_dict(), indent=1, allow_nan=False) + "\n")
    partial.replace(file)
    yields.save(folder / yields.FILE, evaluation.yields)
    calibration.save(folder, evaluation.fitted.calibration)


def read(folder: Path) -> dict[str, Any]:
    """``Evaluation.as_dict`` of a drafter's folder. Raises OptionError."""
    file = folder / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.keys() >= {"conditions", "live", "teacher_forced", "calibration"}:
            return dict(values)
        problem = "it holds no evaluation"
    except (OSError, ValueError, AttributeError) as error:
        problem = str(error)
    raise OptionError(f"{file} cannot be read ({problem}): evaluate the drafter first")
