"""Which way a model type is run: by our own decoder, by the adapter over mlx_lm, or not at all."""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mlx_redrafter.errors import ModelError
from mlx_redrafter.models.families import SUPPORTED
from mlx_redrafter.models.families_nested import elsewhere

Way = Literal["native", "adapter"]
DECLINED: dict[str, str] = {
    "plamo3": "mlx_lm's own chunks and single tokens disagree about its window by one token",
    "deepseek_v41": "its caches hold compressed groups of tokens, which no tree can branch in",
    "phi3small": "its mask is laid out in blocks by the order of the tokens",
}
"""Types that mlx_lm runs and that cannot be drafted for, with the reason."""
_NEAREST = 4
_USUAL = ("gemma3", "llama", "mistral", "qwen3")  # where nothing is near


def way(raw: Mapping[str, Any], native: bool = True) -> Way:
    """How the model of a config.json is run; native: by our own decoder where it can.

    Raises ModelError: a type that nothing runs, or of which no draft could be verified.
    """
    kind = str(raw.get("model_type"))
    if native and kind in SUPPORTED and not elsewhere(raw):
        return "native"
    known = mlx_lm_type(raw)
    if reason := DECLINED.get(known or kind):
        raise ModelError(
            f"model_type '{kind}' is not supported: {reason}; run it with mlx_lm.generate"
        )
    if known is not None:
        return "adapter"
    every = sorted({*SUPPORTED, *mlx_lm_types()} - DECLINED.keys())
    found = difflib.get_close_matches(kind, every, _NEAREST, 0.4) if raw.get("model_type") else []
    nearest = found or _USUAL
    raise ModelError(
        f"model_type '{kind}' is not supported, and mlx-lm {_version()} does not have it either; "
        f"nearest: {', '.join(nearest)} (of {len(every)} types; a later mlx-lm may have more)"
    )


def mlx_lm_type(raw: Mapping[str, Any]) -> str | None:
    """The file of mlx_lm.models that runs a model; None: there is none."""
    from mlx_lm import utils

    kind = str(raw.get("model_type"))
    given = raw.get("architectures") or ()
    for architecture in (given,) if isinstance(given, str) else given:
        if found := utils.MODEL_ARCHITECTURE_REMAPPING.get((kind, architecture)):
            return str(found)
    kind = utils.MODEL_REMAPPING.get(kind, kind)
    return kind if kind in _files() and _holds_a_model(kind) else None


def mlx_lm_types() -> list[str]:
    """Files of mlx_lm.models that hold a model."""
    return sorted(name for name in _files() if _holds_a_model(name))


def _files() -> list[str]:
    import mlx_lm.models

    return [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]


def _holds_a_model(name: str) -> bool:
    spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
    if spec is None or spec.origin is None:
        return False
    return "\nclass Model(" in Path(spec.origin).read_text(encoding="utf-8")


def _version() -> str:
    from importlib.metadata import version

    return version("mlx-lm")
