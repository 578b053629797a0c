"""What a measurement of a model holds for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_redrafter.api import Model
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.runtime import device


def of(model: Model, prompts: Sequence[Prompt] | None = None) -> dict[str, Any]:
    """Model and machine; with prompts also their number, and the drafter."""
    drafter = model.drafter_folder.name if model.drafter_folder else None
    own = {} if prompts is None else {"drafter": drafter, "prompts": len(prompts)}
    return device.conditions(model.name, model.target.dtype, **own)
