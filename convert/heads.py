"""Medusa heads and speculators of every layout: names in, one folder that loads as it is.

Medusa heads are written as vLLM names them, speculators as IBM does, tensors that are copies left
out. Shapes are checked against the module that will read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafters import files, medusa, speculator
from mlx_redrafter.drafters.medusa import Medusa, MedusaConfig
from mlx_redrafter.drafters.speculator import Speculator, SpeculatorConfig
from mlx_redrafter.models import Decoder

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
        shape: sizes, told from config.json and the tensors.
        config: our config.json.
        names: our name -> name in the source.
        dropped: tensors that are not carried over, and why.
        quantization: of weights that are packed already.
        notes: what a person should know.
    """

    shape: MedusaConfig | SpeculatorConfig
    config: dict[str, Any]
    names: dict[str, str]
    dropped: list[Mapping]
    quantization: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


def plan_head(checkpoint: Checkpoint, kind: Format) -> HeadPlan:
    """Account for every tensor; nothing but headers is read.

    Raises:
        DrafterError: a missing or unknown tensor, a wrong shape, a configuration that says less
            than is needed.
    """
    raw, path = checkpoint.config, checkpoint.path
    reader = medusa.renamed if kind is Format.MEDUSA else speculator.renamed
    theirs = reader({name: name for name in checkpoint.names()}, raw)
    given = {name: checkpoint.shape(source) for name, source in theirs.items()}
    shape: MedusaConfig | SpeculatorConfig
    module: nn.Module
    if kind is Format.MEDUSA:
        shape = MedusaConfig.of(raw, given, path)
        module, title = Medusa(shape), medusa.KIND
        config = {**medusa.stored_config(shape), **({_BASE: raw[_BASE]} if raw.get(_BASE) else {})}
        names = {medusa.written(name): source for name, source in theirs.items()}
    else:
        shape = SpeculatorConfig.of(raw, given, path)
        module, title = Speculator(shape), speculator.KIND
        config, names = {**raw, "model_type": "mlp_speculator"}, theirs
    quantization = files.packed(raw, given)
    files.check_tensors(files.quantised(module, raw, given, path), given, path, title)
    config.pop("quantization", None)
    dropped, notes = _left_out(checkpoint, kind, set(theirs.values()))
    if base := raw.get(_BASE):
        notes.insert(0, f"made for {base}")
    if drafters.narrowed(names, checkpoint):
        notes.append("float32 weights become 16-bit ones, unless --dtype float32 is given")
    return HeadPlan(shape, config, names, dropped, quantization, notes)


def _left_out(
    checkpoint: Checkpoint, kind: Format, kept: set[str]
) -> tuple[list[Mapping], list[str]]:
    """Copies of what levels share one by one, the base model's tensors as one line."""
    others = [name for name in checkpoint.names() if name not in kept]
    copies = [n for n in others if kind is Format.SPECULATOR or "lm_heads." in n]
    rest = [name for name in others if name not in copies]
    dropped = [Mapping(n, "", checkpoint.shape(n), "left out: a copy") for n in copies]
    if not rest:
        return dropped, []
    what = rest[0] if len(rest) == 1 else f"{len(rest)} other tensors"
    dropped.append(Mapping(what, "", (), "left out: the base model's"))
    note = "a model lies around these heads; they draft best for it if it was trained with them"
    return dropped, [note]


def check_fit(plan: HeadPlan, target: Decoder, path: Path) -> None:
    """Are the heads for a model of this one's sizes? Raises DrafterError."""
    shape, vocabulary = plan.shape, target.config.vocab_size
    files.check_sizes(shape.hidden_size, shape.vocab_size or vocabulary, target, path)
    if shape.rows:
        files.check_rows(shape.rows, vocabulary, shape.draft_vocab_size, path)


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
