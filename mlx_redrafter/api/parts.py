"""What a model is put together of, read from its folders."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_redrafter import arguments
from mlx_redrafter.cache.packed import GROUP
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.drafters.loading import load_drafter
from mlx_redrafter.drafters.model import DraftModel
from mlx_redrafter.hub import find_drafter, resolve
from mlx_redrafter.kernels import verdicts
from mlx_redrafter.models import Decoder, Loaded, load_model, small_rows
from mlx_redrafter.models.share import Plan
from mlx_redrafter.runtime import blas, metal, threads
from mlx_redrafter.runtime.paths import BUILTIN, user_path
from mlx_redrafter.terminal import console
from mlx_redrafter.text.tokenizer import check_same, load_tokenizer


class Parts(NamedTuple):
    """What a model is put together of; ``tokenizer`` None: not wanted."""

    name: str
    folder: Path
    target: Loaded
    drafter: Drafter | None
    drafter_folder: Path | None
    drafting: bool
    compiled: bool
    tokenizer: Any


def parts_of(
    path_or_hf_repo: str | os.PathLike[str] = BUILTIN,
    drafter: str | os.PathLike[str] | None = "auto",
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = GROUP,
    exact: bool = False,
    plan: Plan | None = None,
    text: bool = True,
) -> Parts:
    """As `load`; plan: of a machine that has a share of the model; text: is a tokenizer wanted?"""
    blas.status()  # an unknown choice is said before anything is downloaded
    verdicts.choice()
    name, dtype = arguments.name_or_folder("model", path_or_hf_repo), arguments.dtype(dtype)
    arguments.instance("revision", revision, str, "a branch, tag or commit as text")
    arguments.options("tokenizer_config", tokenizer_config)
    arguments.instance("exact", exact, int, "True or False")
    packing = arguments.packing(kv_bits, kv_group_size)
    given = None if drafter is None else arguments.name_or_folder("drafter", drafter)
    user_path(given or "")  # what cannot be a path is said before the model is downloaded
    blas.warn_if_slow()
    threads.clear_at_end()
    compiled = _compiler_present()
    folder = resolve(name, revision)
    if given == "auto":
        drafter_folder = find_drafter(name, folder)
    else:
        drafter_folder = resolve(given) if given is not None else None
    metal.prepare(folder)
    target = load_model(folder, dtype, plan=plan)
    if isinstance(target, Decoder):
        # What single machines find quickest may round otherwise on each.
        usual = None if plan is None else "off"
        small_rows.switch_on(target, console.note, "exact" if exact else usual)
    if packing is not None:
        target.pack(packing)
    loaded = load_drafter(drafter_folder, target) if drafter_folder is not None else None
    tokenizer = load_tokenizer(folder, tokenizer_config) if text else None
    if tokenizer is not None and isinstance(loaded, DraftModel) and drafter_folder is not None:
        check_same(tokenizer, drafter_folder)
    return Parts(
        name, folder, target, loaded, drafter_folder, given is not None, compiled, tokenizer
    )


def _compiler_present() -> bool:
    """MLX compiles CPU graphs with g++ on Linux; without it everything runs uncompiled."""
    if sys.platform != "linux" or shutil.which("g++") is not None:
        return True
    mx.disable_compile()
    warnings.warn(
        "no C++ compiler found (g++): running uncompiled and slower; install g++ to change that",
        stacklevel=2,
    )
    return False
