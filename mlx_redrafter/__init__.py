"""ReDrafter speculative decoding for MLX: the same text, in fewer passes over the model."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from mlx_redrafter.runtime import blas, moved

__version__ = "0.1.0"

_EXPORTS = {
    "load": "api",
    "batch_generate": "api.batching",
    "BatchGenerator": "api.batching",
    "generate": "api",
    "render": "text.template",
    "stream_generate": "api",
    "Model": "api",
    "GenerationResponse": "text.answer",
    "Session": "cache.session",
    "SamplingParams": "decoding.sampling",
    "TreeShape": "tree.shape",
    "SparsePrefill": "prefill.config",
    "DraftStats": "stats",
    "RedrafterError": "errors",
}
__all__ = [
    "BatchGenerator",
    "DraftStats",
    "GenerationResponse",
    "Model",
    "RedrafterError",
    "SamplingParams",
    "Session",
    "SparsePrefill",
    "TreeShape",
    "__version__",
    "batch_generate",
    "generate",
    "load",
    "render",
    "stream_generate",
]

if TYPE_CHECKING:
    from mlx_redrafter.api import (
        Model,
        generate,
        load,
        stream_generate,
    )
    from mlx_redrafter.api.batching import BatchGenerator, batch_generate
    from mlx_redrafter.cache.session import Session
    from mlx_redrafter.decoding.sampling import SamplingParams
    from mlx_redrafter.errors import RedrafterError
    from mlx_redrafter.prefill.config import SparsePrefill
    from mlx_redrafter.stats import DraftStats
    from mlx_redrafter.text.answer import GenerationResponse
    from mlx_redrafter.text.template import render
    from mlx_redrafter.tree.shape import TreeShape


def _end_quietly() -> None:
    """In a program of ours Ctrl-C is no error, nor is it one before the program has begun."""
    started = [os.path.basename(getattr(sys, "argv", [""])[0] or "")]
    if started == ["-m"]:
        started = [word.partition(".")[0] for word in sys.orig_argv]
    ours = {"mlx-redrafter", "redrafter", "mlx_redrafter"}.intersection(started)
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


_end_quietly()
# The only work at import: on Linux the BLAS must be in place before mlx.core is loaded.
blas.prepare()
moved.find_under_old_names()


def __getattr__(name: str) -> Any:
    """Import MLX and the rest only when a name is used, so that ``--help`` is instant."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
