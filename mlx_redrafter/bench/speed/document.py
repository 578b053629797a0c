"""bench.json: everything that was measured, under which conditions, and the figures made of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_redrafter.api import Model
from mlx_redrafter.bench.speed import divergence, summary
from mlx_redrafter.bench.speed.compare import Turn
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import conditions as held
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.models.weights import read_json
from mlx_redrafter.runtime.device import machine

FILE = "bench.json"
SPEED, SWEEP, DIVERGENCE = "speed", "sweep", "divergence"


@dataclass
class Document:
    """A measurement, whole or not yet.

    ``kind`` is speed, sweep or divergence; ``complete`` says whether the run came to its end. The
    first two have timings, passes and, made of these, summary and cost_curve; the last has
    divergent cases and a summary.
    """

    kind: str
    conditions: dict[str, Any]
    complete: bool = False
    timings: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    summary: list[dict[str, Any]] = field(default_factory=list)
    cost_curve: dict[str, float] = field(default_factory=dict)

    def add(self, turn: Turn) -> None:
        """Keep what one more turn measured."""
        self.timings += turn.timings
        self.passes += turn.passes

    def compute(self) -> None:
        """The figures of a comparison, from what was measured so far."""
        self.summary = summary.summarise(self.timings, self.passes)
        curve = summary.cost_curve(self.passes)
        self.cost_curve = {str(nodes): seconds for nodes, seconds in curve.items()}

    def divergences(self, compared: Sequence[divergence.Compared]) -> None:
        """The figures of a comparison of texts so far."""
        self.cases = [c.case.as_dict() for c in compared if c.case is not None]
        self.summary = divergence.summarise(compared)

    def figures(self) -> dict[str, Any]:
        """What a reader wants: all but the single timings."""
        parts = ("kind", "complete", "conditions", "summary", "cost_curve", "cases")
        return {name: getattr(self, name) for name in parts if getattr(self, name) != []}

    def save(self, folder: Path) -> Path:
        """Write it whole or not at all, as a run may be stopped at any moment."""
        target = folder / FILE
        part = target.with_suffix(".part")
        part.write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")
        part.replace(target)
        return target


def read(folder: Path) -> Document:
    """What a run wrote into its folder.

    Raises:
        OptionError: nothing there, or not a file of this command.
    """
    file = folder / FILE
    try:
        return Document(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OptionError(
            f"{file} cannot be read ({error}): give the folder that `bench speed --output` wrote"
        ) from None


def conditions(
    model: Model, file: Path, prompts: Sequence[Prompt], options: dict[str, Any]
) -> dict[str, Any]:
    """What has to be known to read the figures, or to measure them again."""
    block = read_json(model.folder / "config.json").get("quantization")
    return {
        **held.of(model, list(prompts)),
        "bits": block["bits"] if block else 8 * model.target.dtype.size,
        **machine("mlx_lm", "mlx_redrafter", "python", "system"),
        "cores": os.cpu_count(),
        "prompt_file": file.name,
        "prompt_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **options,
    }
