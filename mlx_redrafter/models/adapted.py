"""A model folder -> AdaptedModel, through mlx_lm's own loading."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils

from mlx_redrafter.errors import ModelError, one_line
from mlx_redrafter.models.adapter import AdaptedModel
from mlx_redrafter.models.files import weight_files
from mlx_redrafter.models.unread import unread
from mlx_redrafter.models.weights import finite, materialise, parameters, read_header, read_json
from mlx_redrafter.runtime.device import fused_kernels

_WRONG = (
    ArithmeticError, AttributeError, ImportError, LookupError, NotImplementedError, OSError,
    RuntimeError, SystemExit, TypeError, ValueError,
)  # fmt: skip


def load(folder: Path, dtype: mx.Dtype | None = None, closed: bool | None = None) -> AdaptedModel:
    """The target model in a folder; dtype as of `loading.load_model`, closed as of `AdaptedModel`.

    Raises ModelError.
    """
    module, raw = lazily(folder)
    if dtype is None and not fused_kernels():
        dtype = mx.float32
    if dtype is not None:
        module.set_dtype(dtype)
    for index, layer in enumerate(getattr(module, "layers", ())):
        materialise(layer, finite(parameters(layer), f"layers.{index}."), folder)
    materialise(module, finite(parameters(module)), folder)
    return AdaptedModel(module, raw, closed)


def lazily(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """mlx_lm's module of a folder, of whose weights nothing is read yet, and its config.json.

    Raises ModelError.
    """
    raw = read_json(folder / "config.json")
    for file in weight_files(folder):
        read_header(file)
    try:
        module, _ = mlx_lm_utils.load_model(folder, lazy=True, get_model_classes=_text_only)
    except _WRONG as error:
        raise ModelError(
            f"mlx-lm cannot load {folder} of model_type '{raw.get('model_type')}' "
            f"({one_line(error)}); download the model again, or convert it with mlx_lm.convert"
        ) from error
    del module.sanitize
    return module, raw


def _text_only(config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx_lm's classes of a model, which does not see what is `unread`: what mlx_lm drops of it
    itself depends on the type, and on who converted the checkpoint."""
    made, arguments = mlx_lm_utils._get_classes(config)

    def make(given: Any) -> nn.Module:
        module: Any = made(given)
        stock = getattr(module, "sanitize", dict)
        module.sanitize = lambda weights: stock(
            {name: value for name, value in weights.items() if not unread(name)}
        )
        return module

    return make, arguments


def sized(raw: Mapping[str, Any]) -> AdaptedModel:
    """A model of a config.json without its weights: for its sizes. Nothing of it is evaluated.

    Raises ModelError.
    """
    try:
        model, arguments = mlx_lm_utils._get_classes(dict(raw))
        module = model(arguments.from_dict(copy.deepcopy(dict(raw))))
    except _WRONG as error:
        raise ModelError(
            f"config.json of model_type '{raw.get('model_type')}' does not make a model in mlx-lm "
            f"({one_line(error)}); download the model's config.json again"
        ) from error
    module.eval()
    return AdaptedModel(module, raw)
