"""ReDrafter checkpoints of every origin: names in, names out, sizes from the tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafters import files
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.errors import ConvertError
from mlx_redrafter.models.weights import parameters, preview
from mlx_redrafter.runtime.device import dtype_name

from .checkpoint import Checkpoint
from .formats import Format
from .mapping import Mapping
from .writer import OutputFolder, ShardWriter, sixteen_bits

# A norm that Apple's other trainer leaves in the checkpoint; no forward pass uses it.
_UNUSED = "emb_norm.weight"
# TensorRT-LLM looks for lm_head, lm_heads and 0 in turn, and for both spellings of input_proj.
_ALIASES = ((r"(?:lm_heads|0)\.(\d+\..*)", r"lm_head.\1"), (r"input_projs\.(.*)", r"input_proj.\1"))
_INSIDE = "drafter."
_SIZES = ("hidden_size", "vocab_size", "exit_dim")


class Plan(Protocol):
    """What is known of every kind of drafter."""

    @property
    def names(self) -> dict[str, str]: ...

    @property
    def dropped(self) -> list[Mapping]: ...


@dataclass(frozen=True)
class DrafterPlan:
    """A checkpoint understood: what it is, and which of its tensors are which of ours.

    Attributes:
        config: sizes, from config.json where it says them, layers from the tensors.
        names: our name -> name in the source.
        dropped: tensors that are not carried over, and why.
        quantization: of a checkpoint of ours whose weights are quantised.
        extra: what else our config.json says.
        notes: what a person should know.
    """

    config: ReDrafterConfig
    names: dict[str, str]
    dropped: list[Mapping] = field(default_factory=list)
    quantization: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_drafter(checkpoint: Checkpoint, kind: Format) -> DrafterPlan:
    """Account for every tensor of a drafter; nothing but headers is read.

    Raises:
        ConvertError: a missing, left-over or doubled tensor, or a wrong shape; it lists them.
    """
    names, dropped = _our_names(checkpoint, kind)
    shapes = {ours: checkpoint.shape(theirs) for ours, theirs in names.items()}
    notes: list[str] = []
    quantization, extra = None, {}
    if kind is Format.MLX:
        raw = checkpoint.config
        config = ReDrafterConfig.from_dict(raw)
        quantization = files.packed(raw, shapes)
        known = {"model_type", "quantization", *vars(config)}
        extra = {key: value for key, value in raw.items() if key not in known}
    else:
        config = _sizes(checkpoint, shapes, notes)
    _check(checkpoint, config, quantization, shapes, names)
    return DrafterPlan(config, names, dropped, quantization, extra, notes)


def _our_names(checkpoint: Checkpoint, kind: Format) -> tuple[dict[str, str], list[Mapping]]:
    names: dict[str, str] = {}
    dropped, others = [], []
    for theirs in checkpoint.names():
        ours = theirs
        if kind is Format.MODELOPT:
            if not theirs.startswith(_INSIDE):
                others.append(theirs)
                continue
            ours = theirs.removeprefix(_INSIDE)
        if kind is not Format.MLX:
            for pattern, replacement in _ALIASES:
                ours = re.sub(f"^{pattern}$", replacement, ours)
        if ours == _UNUSED:
            dropped.append(Mapping(theirs, "", checkpoint.shape(theirs), "dropped: never used"))
            continue
        if ours in names:
            raise ConvertError(
                f"{checkpoint.path} holds {names[ours]} and {theirs}, two names of one tensor"
            )
        names[ours] = theirs
    if others:
        what = f"{preview(others, 1)}" if len(others) == 1 else f"{len(others)} other tensors"
        dropped.append(Mapping(what, "", (), "left out: the base model's"))
    return names, dropped


def _sizes(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], notes: list[str]
) -> ReDrafterConfig:
    """The configuration: what config.json says, else what the shapes say; layers are counted."""
    last = [int(m[1]) for m in (re.fullmatch(r"lm_head\.(\d+)\.weight", n) for n in shapes) if m]
    if not last:
        raise ConvertError(f"{checkpoint.path} lacks lm_head.N.weight, the output matrix")
    layers = max(last)
    head = shapes[f"lm_head.{layers}.weight"]
    if len(head) != 2:
        raise ConvertError(f"lm_head.{layers}.weight in {checkpoint.path} is not a matrix: {head}")
    inner = shapes.get("input_proj.weight", head)
    found = {"vocab_size": head[0], "exit_dim": head[1], "hidden_size": inner[-1] // 2}
    said = {**checkpoint.config, **(checkpoint.config.get("redrafter") or {})}
    # ModelOpt's nested block is the drafter's; the vocabulary outside it may count padding.
    trusted = ("hidden_size", "exit_dim") if "redrafter" in checkpoint.config else _SIZES
    for name in trusted:
        value = said.get(name)
        if isinstance(value, int) and value > 0:
            found[name] = value
    counted = said.get("num_draft_layers")
    if isinstance(counted, int) and counted != layers:
        notes.append(f"config.json says {counted} residual blocks, the tensors are {layers}")
    has_rnn = any(name.startswith("rnn_") for name in shapes)
    cell = "elman" if said.get("rnn", has_rnn) else "sum"
    values = {"model_type": "redrafter", "num_draft_layers": layers, "cell": cell, **found}
    return ReDrafterConfig.from_dict(values)


def _check(
    checkpoint: Checkpoint,
    config: ReDrafterConfig,
    quantization: dict[str, Any] | None,
    shapes: dict[str, tuple[int, ...]],
    names: dict[str, str],
) -> None:
    """Names and shapes against those of the drafter that this configuration builds."""
    drafter = ReDrafter(config)
    if quantization:
        paths = {name.removesuffix(".scales") for name in shapes if name.endswith(".scales")}
        _quantise(drafter, quantization, paths)
    expected = {name: value.shape for name, value in parameters(drafter).items()}
    if missing := expected.keys() - shapes.keys():
        raise ConvertError(
            f"{checkpoint.path} lacks {preview(missing)}, which a drafter of its configuration "
            f"has ({_describe(config)}); download it again"
        )
    if extra := shapes.keys() - expected.keys():
        raise ConvertError(
            f"{checkpoint.path} has tensors that no ReDrafter of its configuration has: "
            f"{preview(names[n] for n in extra)} ({_describe(config)})"
        )
    wrong = [
        f"{names[name]} {shapes[name]} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if shapes[name] != tuple(shape)
    ]
    if wrong:
        raise ConvertError(
            f"wrong shapes in {checkpoint.path}: {preview(wrong)} ({_describe(config)})"
        )


def check_layout(plan: DrafterPlan, kind: Format) -> None:
    """Can this drafter be said in Apple's layout at all? Raises ConvertError with the reasons."""
    config = plan.config
    reasons = [
        reason
        for holds, reason in [
            (config.cell not in ("sum", "elman"), f"its cell is {config.cell}"),
            (config.context_layers, "it reads inner layers of the target"),
            (config.head != "own", "it has no output matrix of its own"),
            (config.draft_vocab_size, f"its vocabulary is reduced to {config.draft_vocab_size}"),
            (plan.quantization, "its weights are quantised"),
        ]
        if holds
    ]
    if reasons:
        raise ConvertError(
            f"this drafter cannot be written for {kind.value}: {' and '.join(reasons)}, which that "
            "format cannot express; needed: an unquantised sum or elman drafter with a whole "
            "vocabulary"
        )


def mappings(
    plan: Plan, checkpoint: Checkpoint, bits: int | None = None, group_size: int = 64
) -> list[Mapping]:
    """The plan as a table; bits and group size are those of a quantisation on the way."""
    table = []
    for ours, theirs in plan.names.items():
        shape = checkpoint.shape(theirs)
        packed = bits and _is_packed(shape, group_size)
        note = f"{bits} bits in groups of {group_size}" if packed else ""
        table.append(Mapping(theirs, ours, shape, note))
    return [*table, *plan.dropped]


def write_drafter(
    plan: DrafterPlan,
    checkpoint: Checkpoint,
    out: OutputFolder,
    *,
    to: Format = Format.MLX,
    bits: int | None = None,
    group_size: int = 64,
    dtype: mx.Dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write config.json and one model.safetensors; without bits and dtype, bit for bit.

    TensorRT-LLM reads exactly one file of that name, so a drafter is never split.
    """
    if bits and dtype is None:
        dtype = narrowed(plan.names, checkpoint)
    # Apple's transformers refuse a file that does not say which framework wrote it.
    framework = "mlx" if to is Format.MLX else "pt"
    kind = write_tensors(
        plan.names, checkpoint, out, framework=framework, bits=bits, group_size=group_size,
        dtype=dtype, progress=progress,
    )  # fmt: skip
    made = {"group_size": group_size, "bits": bits} if bits else plan.quantization
    out.write_json("config.json", _config(plan, to, made, kind))


def narrowed(names: dict[str, str], checkpoint: Checkpoint) -> mx.Dtype | None:
    """The 16-bit type that float32 becomes, if some is stored."""
    stored = {checkpoint.dtype(theirs) for theirs in names.values()}
    return sixteen_bits(stored) if mx.float32 in stored else None


def write_tensors(
    names: dict[str, str],
    checkpoint: Checkpoint,
    out: OutputFolder,
    *,
    framework: str = "mlx",
    bits: int | None = None,
    group_size: int = 64,
    dtype: mx.Dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> str | None:
    """One model.safetensors of our names -> theirs; the type of its numbers, if they have one."""
    writer = ShardWriter(out, None, {"format": framework})
    kinds = set()
    for done, (ours, theirs) in enumerate(names.items()):
        value = _cast(checkpoint.load(theirs), dtype)
        if mx.issubdtype(value.dtype, mx.floating):
            kinds.add(dtype_name(value.dtype))
        if bits and _is_packed(value.shape, group_size):
            if not mx.issubdtype(value.dtype, mx.floating):
                raise ConvertError(
                    f"{theirs} holds {dtype_name(value.dtype)} and cannot be quantised: its "
                    "numbers are no weights"
                )
            # As mlx_lm and nn.quantize do for a Linear layer.
            path = ours.removesuffix(".weight")
            packed = mx.quantize(value, group_size=group_size, bits=bits)
            for part, array in zip(("weight", "scales", "biases"), packed, strict=True):
                writer.add(f"{path}.{part}", array)
        else:
            writer.add(ours, value)
        del value
        if progress:
            progress(done + 1, len(names))
    writer.close()
    return kinds.pop() if len(kinds) == 1 else None


def _config(
    plan: DrafterPlan, to: Format, quantization: dict[str, Any] | None, dtype: str | None
) -> dict[str, Any]:
    config = plan.config
    if to is Format.MLX:
        extra = {"quantization": quantization} if quantization else {}
        ours = {**vars(config), "context_layers": list(config.context_layers)}
        return {"model_type": "redrafter", **ours, **extra, **plan.extra}
    return {
        "model_type": "recurrent_drafting_drafter",
        "architectures": ["Drafter"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "exit_dim": config.exit_dim,
        "num_draft_layers": config.num_draft_layers,
        "num_lookback_tokens": -1,
        "rnn": config.cell == "elman",
        **({"torch_dtype": dtype} if dtype else {}),
    }


def _quantise(drafter: ReDrafter, block: dict[str, Any], paths: Collection[str]) -> None:
    """Give these layers packed parameters; raises ConvertError for an odd block."""
    try:
        nn.quantize(
            drafter,
            group_size=block["group_size"],
            bits=block["bits"],
            class_predicate=lambda path, module: path in paths,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConvertError(f"quantisation {block} does not fit the drafter ({error})") from None


def _is_packed(shape: tuple[int, ...], group_size: int) -> bool:
    """Matrices are packed where their rows are whole groups: all are of layers that can be."""
    return len(shape) == 2 and shape[1] % group_size == 0


def _cast(value: mx.array, dtype: mx.Dtype | None) -> mx.array:
    if dtype is None or not mx.issubdtype(value.dtype, mx.floating):
        return value
    return value.astype(dtype)


def _describe(config: ReDrafterConfig) -> str:
    return (
        f"hidden size {config.hidden_size}, exit_dim {config.exit_dim}, vocabulary "
        f"{config.vocab_size}, {config.num_draft_layers} residual blocks, cell {config.cell}"
    )
