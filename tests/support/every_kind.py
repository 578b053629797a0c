"""A tiny target of any model type: by our decoder, or by mlx_lm's own module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_cases import TYPES, module_of, native_of
from delta_cases import DELTA_CASES
from tiny_models import CASES, build

from mlx_redrafter.models import load_model
from mlx_redrafter.models.adapter import AdaptedModel


def target_of(kind: str, folder: Path) -> Any:
    """Its files, where it has any, are written to the folder."""
    if kind in CASES:
        build(folder, kind)
        return load_model(folder)
    if kind in DELTA_CASES:
        return native_of(module_of(DELTA_CASES[kind], lively=True), DELTA_CASES[kind], False)
    return AdaptedModel(module_of(TYPES[kind], lively=True), TYPES[kind], closed=False)
