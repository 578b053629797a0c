"""Checkpoints of other programs in, and back out; installed as `mlx_redrafter.convert`.

    from mlx_redrafter.convert import convert
    print(convert("pytorch-drafter", "drafter").files)

docs/checkpoint_format.md lists every format, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_redrafter.errors import ConvertError, OptionError, RedrafterError
from mlx_redrafter.runtime.paths import user_path

from .summary import Summary

if TYPE_CHECKING:
    import mlx.core as mx

    from .checkpoint import Checkpoint
    from .formats import Format
    from .mapping import Mapping
    from .writer import OutputFolder, Progress

__all__ = ["ConvertError", "Summary", "convert"]

BITS, GROUP_SIZES, DTYPES = (4, 8, 16), (32, 64, 128), ("float16", "bfloat16", "float32")
LAYOUTS = ("mlx", "apple", "tensorrt-llm")


@dataclass(frozen=True)
class _Options:
    to: str
    target: str | None
    bits: int | None
    group_size: int
    dtype: str | None
    self_check: bool = True
    keep: bool = False

    @property
    def packed_bits(self) -> int | None:
        """Bits to quantise to; None: not at all."""
        return None if self.bits == 16 else self.bits

    def check(self, kind: Format) -> None:
        """Refuse combinations that mean nothing for this source."""
        if self.to not in LAYOUTS:
            raise OptionError(f"--to {self.to!r} is unknown; needed: {', '.join(LAYOUTS)}")
        if self.bits is not None and self.bits not in BITS:
            raise OptionError(f"--q-bits {self.bits} is not possible; needed: 4, 8 or 16")
        if self.group_size not in GROUP_SIZES:
            raise OptionError(
                f"--q-group-size {self.group_size} is not possible; needed: 32, 64 or 128"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(f"--dtype {self.dtype!r} is unknown; needed: {', '.join(DTYPES)}")
        if self.keep and kind.value != "gguf":
            raise OptionError(
                f"--keep-quantization is for GGUF files, and this is a {kind.label}; drop it"
            )
        if self.keep and self.bits is not None:
            raise OptionError("--keep-quantization keeps a file's own bits; drop it, or -q")
        if self.packed_bits and self.to != "mlx":
            raise OptionError(f"{self.to} has no quantised drafters; drop -q, or --to {self.to}")
        if kind.is_head and self.to != "mlx":
            raise OptionError(f"--to {self.to} is for ReDrafters, and this is a {kind.label}")
        if not kind.is_drafter and self.bits == 16:
            raise OptionError("--q-bits 16 is for drafters; for a model say --dtype float16")
        if not kind.is_drafter and self.to != "mlx":
            raise OptionError(f"--to {self.to} is for drafters, and this is a {kind.label}")
        if not kind.is_drafter and self.target:
            raise OptionError(f"--target is for drafters, and this is a {kind.label}; drop it")

    @property
    def mlx_dtype(self) -> mx.Dtype | None:
        import mlx.core as mx

        return getattr(mx, self.dtype) if self.dtype else None


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    to: str = "mlx",
    target: str | Path | None = None,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    keep_quantization: bool = False,
    self_check: bool = True,
    dry_run: bool = False,
    force: bool = False,
    upload_repo: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Convert a checkpoint and write it as a new folder, whole or not at all.

    Args:
        source: folder, file or Hugging Face id of a drafter or a base model.
        out: the folder to make.
        format: of the source: auto | apple | mlx | tensorrt-llm | modelopt | medusa |
            speculator | eagle | block | base | gguf.
        to: layout of the output: mlx | apple | tensorrt-llm (the last two for drafters).
        target: base model that a drafter must fit: folder, hub id or built-in name.
        bits: quantise to 4 or 8 bits, in groups of ``group_size``; 16: no quantisation. None: none
            either, but a GGUF file's own 4 and 8 bits are kept unless a dtype is given, and on a
            Mac with Metal heads of other kinds than ReDrafter get 4 bits unless one is given.
        dtype: float16 | bfloat16 | float32; None: as stored.
        keep_quantization: of a GGUF file keep all blocks packed, also those whose scales only
            float32 holds (then in ``dtype``), or which MLX holds in a near form only.
        self_check: load the target too and count how often the drafter's first choice is its next
            token; what the source's files leave open is settled by that.
        dry_run: read headers and account for every tensor, write nothing.
        force: replace a model folder that exists.
        upload_repo: Hugging Face repository to upload the result to, with a model card.
        progress: called with tensors done and tensors in all.

    Raises:
        ConvertError, OptionError, DrafterError, HubError: one line each; nothing is left behind.
    """
    from . import card
    from .base_files import name_turn_end
    from .writer import output_folder

    options = _Options(
        to, str(target) if target else None, bits, group_size, dtype, self_check,
        keep_quantization,
    )  # fmt: skip
    if upload_repo and not dry_run:
        card.check_upload(upload_repo)
    path = _locate(str(source))
    try:
        job = _plan(path, format, options)
    except OSError as error:
        raise ConvertError(f"{path} cannot be read ({error})") from error
    out = user_path(out)
    if dry_run:
        return Summary(str(source), job.kind, to, None, job.mapping, notes=job.notes)
    with output_folder(out, path, force) as folder:
        job.write(folder, progress or (lambda done, total: None))
        if not job.kind.is_drafter:
            job.notes.extend(name_turn_end(folder))
        elif options.target and self_check and to == "mlx":
            job.notes.append(_compared(folder.path, options.target))
        files = folder.files()
        summary = Summary(str(source), job.kind, to, out, job.mapping, files, job.notes)
        if upload_repo:
            text = card.render(summary, upload_repo, options.target)
            (folder.path / "README.md").write_text(text, encoding="utf-8")
    if upload_repo:
        summary = card.upload(summary, upload_repo)
    return summary


@dataclass(frozen=True)
class _Job:
    kind: Format
    mapping: list[Mapping]
    notes: list[str]
    write: Callable[[OutputFolder, Progress], None]


def _plan(path: Path, format: str, options: _Options) -> _Job:
    from mlx_redrafter.models.weights import preview

    from .checkpoint import heads_files, open_checkpoint, weight_files
    from .formats import Format, recognise
    from .shards import GGUF, kind_of

    if format != "auto" and format not in [kind.value for kind in Format]:
        known = ", ".join(kind.value for kind in Format)
        raise OptionError(f"--format {format!r} is unknown; needed: auto, {known}")
    heads = heads_files(path) if format in ("auto", Format.MEDUSA.value) else []
    files = heads or weight_files(path)
    found_gguf = any(kind_of(file) == GGUF for file in files)
    if found_gguf or format == Format.GGUF.value:
        if len(files) > 1 and found_gguf:
            names = preview(file.name for file in files)
            raise ConvertError(f"{path} holds {len(files)} files of weights ({names}); give one")
        if not found_gguf:
            raise ConvertError(f"{path} is no GGUF file; drop --format gguf")
        if format not in ("auto", Format.GGUF.value):
            raise ConvertError(f"{path} is a GGUF file; drop --format {format}")
        return _plan_gguf(files[0], options)
    checkpoint = open_checkpoint(path, files)
    kind = recognise(checkpoint) if format == "auto" else Format(format)
    options.check(kind)
    if kind.is_head:
        return _plan_head(checkpoint, kind, options)
    return (
        _plan_drafter(checkpoint, kind, options)
        if kind.is_drafter
        else _plan_base(checkpoint, options)
    )


def _plan_drafter(checkpoint: Checkpoint, kind: Format, options: _Options) -> _Job:
    from . import drafters
    from .formats import Format

    plan = drafters.plan_drafter(checkpoint, kind)
    to = Format(options.to)
    if to is not Format.MLX:
        drafters.check_layout(plan, to)
    bits = options.packed_bits
    if bits and plan.quantization:
        raise OptionError(f"{checkpoint.path} is quantised already; drop -q")
    if options.target:
        _check_fit(plan.config, options.target, checkpoint.path)
    table = drafters.mappings(plan, checkpoint, bits, options.group_size)
    notes = [*plan.notes]
    if to is not Format.MLX or kind is not Format.MLX:
        notes.append(
            "beam_length: drafted tokens here and in TensorRT-LLM (draft_len_per_beam); Apple "
            "counts the root too, its 5 is 4 here"
        )

    def write(folder: OutputFolder, progress: Progress) -> None:
        drafters.write_drafter(
            plan, checkpoint, folder, to=to, bits=bits, group_size=options.group_size,
            dtype=options.mlx_dtype, progress=progress,
        )  # fmt: skip

    return _Job(kind, table, notes, write)


def _plan_head(checkpoint: Checkpoint, kind: Format, options: _Options) -> _Job:
    import mlx.core as mx

    from . import drafters, heads
    from .checkpoint import model_beside

    plan = heads.plan_head(checkpoint, kind)
    bits = options.packed_bits
    if bits and plan.quantization:
        raise OptionError(f"{checkpoint.path} is quantised already; drop -q")
    if not (options.bits or options.dtype or plan.quantization) and mx.metal.is_available():
        bits = 4
        plan.notes.append(
            f"4 bits in groups of {options.group_size}, as this Mac drafts fastest; --q-bits 16 "
            "keeps what is stored"
        )
    if options.target:
        heads.check_fit(plan, _sizes_of(options.target), checkpoint.path)
    dtype = options.mlx_dtype or drafters.narrowed(plan.names, checkpoint)
    table = drafters.mappings(plan, checkpoint, bits, options.group_size)
    if model_beside(checkpoint):
        plan.notes.append("a model lies beside these heads; --format base converts that one")

    def write(folder: OutputFolder, progress: Progress) -> None:
        heads.write_head(
            plan, checkpoint, folder, bits=bits, group_size=options.group_size, dtype=dtype,
            progress=progress,
        )  # fmt: skip

    return _Job(kind, table, plan.notes, write)


def _plan_base(checkpoint: Checkpoint, options: _Options) -> _Job:
    from .base import convert_base, plan_base
    from .formats import Format

    plan = plan_base(checkpoint)

    def write(folder: OutputFolder, progress: Progress) -> None:
        convert_base(
            plan, checkpoint, folder, bits=options.packed_bits, group_size=options.group_size,
            dtype=options.mlx_dtype, progress=progress,
        )  # fmt: skip

    return _Job(Format.BASE, plan.mappings(checkpoint.shape), [], write)


def _plan_gguf(path: Path, options: _Options) -> _Job:
    from .formats import Format
    from .gguf import GgufPlan

    options.check(Format.GGUF)
    plan = GgufPlan(
        path, bits=options.bits, group_size=options.group_size, dtype=options.mlx_dtype,
        keep=options.keep,
    )  # fmt: skip
    return _Job(Format.GGUF, plan.mappings(), plan.notes(), plan.write)


def _locate(source: str) -> Path:
    """A local folder or file, else a hub id; pickles are fetched only where nothing else is."""
    path = user_path(source)
    if path.exists():
        return path
    from mlx_redrafter.hub import resolve

    return resolve(source, also=("*.bin", "*.pt"))


def _check_fit(config: object, target: str, path: Path) -> None:
    from typing import cast

    from mlx_redrafter.drafters.loading import check_compatible

    check_compatible(cast(Any, config), _sizes_of(target), path)


def _compared(folder: Path, target: str) -> str:
    """Settle what the source left open, and say how well the drafter fits the target."""
    from mlx_redrafter.evaluation import selfcheck
    from mlx_redrafter.hub import resolve
    from mlx_redrafter.models import load_model
    from mlx_redrafter.text.tokenizer import load_tokenizer

    try:
        base = resolve(target)
        tokenizer = load_tokenizer(base)  # what fails at once goes first
        along = selfcheck.Along(load_model(base), tokenizer)
        fit = selfcheck.settle(folder, along)
    except RedrafterError as error:
        return f"the drafter was not compared with {target}: {error}"
    fit.warn(target)
    return str(fit)


def _sizes_of(target: str) -> Any:
    """What a check asks of a target: its configuration alone."""
    from types import SimpleNamespace

    from mlx_redrafter.hub import resolve
    from mlx_redrafter.models import config_of
    from mlx_redrafter.models.weights import read_json

    return SimpleNamespace(config=config_of(read_json(resolve(target) / "config.json")))
