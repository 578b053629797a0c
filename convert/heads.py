"""Medusa heads, speculators, EAGLE heads and block drafters become one folder that loads as it is.

Medusa heads are written as vLLM names them, speculators as IBM does, EAGLE heads as SafeAILab does,
block drafters by their module's names; tensors that are copies are left out. Shapes are checked
against the module that will read them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafters import block_files, eagle_files, files, medusa, speculator
from mlx_redrafter.drafters.block import Block
from mlx_redrafter.drafters.eagle import Eagle
from mlx_redrafter.drafters.medusa import Medusa, MedusaConfig
from mlx_redrafter.drafters.speculator import Speculator, SpeculatorConfig
from mlx_redrafter.models import Target
from mlx_redrafter.models.weights import Shape

from . import drafters
from .checkpoint import Checkpoint
from .formats import Format
from .mapping import Mapping
from .writer import OutputFolder

_BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class HeadPlan:
    """Heads understood.

    Attributes:
        config: our config.json.
        names: our name -> name in the source.
        dropped: tensors that are not carried over, and why.
        fits: raises DrafterError for a model of other sizes.
        quantization: of weights that are packed already.
        notes: what a person should know.
    """

    config: dict[str, Any]
    names: dict[str, str]
    dropped: list[Mapping]
    fits: Callable[[Target], object]
    quantization: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def plan_head(checkpoint: Checkpoint, kind: Format) -> HeadPlan:
    """Account for every tensor; nothing but headers is read.

    Raises:
        DrafterError: a missing or unknown tensor, a wrong shape, a configuration that says less
            than is needed.
    """
    raw, path, head = checkpoint.config, checkpoint.path, _KINDS[kind]
    theirs = head.layout.renamed({name: name for name in checkpoint.names()}, raw)
    given = {name: checkpoint.shape(source) for name, source in theirs.items()}
    head.layout.renamed({n: checkpoint.load(n) for n in checkpoint.names() if n in _READ}, raw)
    shape = head.shape(raw, given, path)
    quantization = files.packed(raw, given)
    module = files.quantised(head.module(shape), raw, given, path)
    files.check_tensors(module, given, path, head.layout.kind)
    config, names = head.config(shape, raw), {head.written(n): s for n, s in theirs.items()}
    config.pop("quantization", None)
    dropped, notes = _left_out(checkpoint, kind, set(theirs.values()))
    if base := config.get(_BASE):
        notes.insert(0, f"made for {base}")
    if drafters.narrowed(names, checkpoint):
        notes.append("float32 weights become 16-bit ones, unless --dtype float32 is given")

    def fits(target: Target) -> object:
        return head.layout.module(raw, given, target, path)

    return HeadPlan(config, names, dropped, fits, quantization, notes)


def _left_out(
    checkpoint: Checkpoint, kind: Format, kept: set[str]
) -> tuple[list[Mapping], list[str]]:
    """Copies of what levels share one by one, the base model's tensors as one line."""
    others = [name for name in checkpoint.names() if name not in kept]
    copies = [n for n in others if _KINDS[kind].copies.fullmatch(n)]
    rest = [name for name in others if name not in copies]
    dropped = [Mapping(n, "", checkpoint.shape(n), "left out: a copy") for n in copies]
    if not rest:
        return dropped, []
    what = rest[0] if len(rest) == 1 else f"{len(rest)} other tensors"
    dropped.append(Mapping(what, "", (), "left out: the base model's"))
    note = "a model lies around these heads; they draft best for it if it was trained with them"
    return dropped, [note]


def _made_for(raw: dict[str, Any]) -> dict[str, Any]:
    return {_BASE: raw[_BASE]} if raw.get(_BASE) else {}


class _Kind(NamedTuple):
    """What the kinds differ in.

    shape: config.json, shapes by the module's names and the source -> what ``module`` is made of.
    config: that and config.json -> ours. written: the module's name of a tensor -> ours. copies:
    what of the tensors that are left out is stored once more.
    """

    layout: files.Layout[Any]
    shape: Callable[[dict[str, Any], dict[str, Shape], Path], Any]
    module: Callable[[Any], nn.Module]
    config: Callable[[Any, dict[str, Any]], dict[str, Any]]
    written: Callable[[str], str] = lambda name: name
    copies: re.Pattern[str] = re.compile(".*")


_KINDS = {
    Format.MEDUSA: _Kind(
        medusa.LAYOUT, MedusaConfig.of, Medusa,
        lambda shape, raw: {**medusa.stored_config(shape), **_made_for(raw)}, medusa.written,
        re.compile(r".*lm_heads\..*"),
    ),
    Format.SPECULATOR: _Kind(
        speculator.LAYOUT, SpeculatorConfig.of, Speculator,
        lambda shape, raw: {**raw, "model_type": "mlp_speculator"},
    ),
    Format.EAGLE: _Kind(
        eagle_files.LAYOUT, eagle_files.shape_of, Eagle, eagle_files.flat_config,
        eagle_files.written,
    ),
    Format.BLOCK: _Kind(
        block_files.LAYOUT, block_files.shape_of, Block, block_files.flat_config,
        eagle_files.written,
    ),
}  # fmt: skip
_READ = (eagle_files.OFFSETS, eagle_files.MEMBERS)
"""Tensors that are checked by what is in them."""


def check_fit(plan: HeadPlan, target: Target, path: Path) -> None:
    """Are the heads for a model of this one's sizes? Raises DrafterError."""
    plan.fits(target)


def write_head(
    plan: HeadPlan,
    checkpoint: Checkpoint,
    out: OutputFolder,
    *,
    bits: int | None = None,
    group_size: int = 64,
    dtype: mx.Dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write config.json and one model.safetensors."""
    kind = drafters.write_tensors(
        plan.names, checkpoint, out, bits=bits, group_size=group_size, dtype=dtype,
        progress=progress,
    )  # fmt: skip
    made = {"group_size": group_size, "bits": bits} if bits else plan.quantization
    config = {**plan.config, **({"torch_dtype": kind} if kind else {})}
    out.write_json("config.json", {**config, **({"quantization": made} if made else {})})
