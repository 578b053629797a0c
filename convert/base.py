"""Base models in Hugging Face layout -> MLX: the names, shapes and quantisation of mlx_lm.convert.

Tensors pass one by one, in the order of the source's files, so that one of them is in memory.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_redrafter.errors import ConvertError, ModelError, one_line
from mlx_redrafter.models import Decoder, DecoderConfig
from mlx_redrafter.models.families import decoder_config
from mlx_redrafter.models.layout import RESHAPED, beyond, exact, expert_of, ours, stored_name
from mlx_redrafter.models.loading import sanitize
from mlx_redrafter.models.stored import as_stored, packed_layers
from mlx_redrafter.models.weights import Shape, misfit, parameters, preview, shapes

from .base_files import copy_tokenizer, with_end_tokens, write_config
from .checkpoint import Checkpoint
from .mapping import Mapping
from .writer import OutputFolder, Progress, ShardWriter, sixteen_bits

Config = dict[str, Any]

# mlx-lm keeps their text half under the name it has in the multimodal model.
_NESTED = (
    "gemma3", "gemma4", "gemma4_unified", "mistral3", "qwen3_5", "qwen3_5_moe", "qwen3_vl",
    "qwen3_vl_moe",
)  # fmt: skip
NESTED_PREFIX = "language_model."
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True)
class _Piece:
    """A tensor of the output: rows [first, first + shape[0]) of a source tensor; or the part of one
    that an expert of so many is."""

    source: str
    target: str
    shape: Shape
    first: int = 0
    note: str = ""
    expert: int | None = None


@dataclass(frozen=True)
class BasePlan:
    """Every source tensor is the source of pieces, or is dropped for a reason."""

    config: Config
    pieces: dict[str, list[_Piece]]
    dropped: dict[str, str]

    def mappings(self, shape: Callable[[str], Shape]) -> list[Mapping]:
        kept = [Mapping(p.source, p.target, p.shape, p.note) for p in self.all_pieces()]
        return kept + [Mapping(name, "", shape(name), why) for name, why in self.dropped.items()]

    def all_pieces(self) -> Iterator[_Piece]:
        for pieces in self.pieces.values():
            yield from pieces


def convert_base(
    plan: BasePlan,
    checkpoint: Checkpoint,
    out: OutputFolder,
    *,
    bits: int | None,
    group_size: int,
    dtype: mx.Dtype | None,
    progress: Progress,
) -> None:
    """Write a base model as an MLX folder that mlx_lm and this package load.

    Args:
        plan: what becomes of the checkpoint's tensors.
        checkpoint: tensors and config.json of a supported model type.
        out: folder under construction; gets weights, config.json, tokenizer, generation config.
        bits, group_size: of the quantisation, as in mlx_lm.convert; bits None: none.
        dtype: of the weights; None: config.json's `torch_dtype`, else as stored, as in
            mlx_lm.convert; but 16 bits where they are quantised, or 4 bits would take 5.
        progress: called with source tensors done and in all.

    Raises:
        ConvertError: a tensor or the tokenizer's files cannot be read.
    """
    names = [piece.target for piece in plan.all_pieces()]
    chosen = Quantisation(plan.config, names, bits, group_size)
    stored_as = dtype or _DTYPES.get(str(_config_dtype(plan.config)))
    wide = stored_as is None or stored_as == mx.float32
    if bits is not None and dtype is None and wide:
        stored_as = dtype = sixteen_bits({checkpoint.dtype(name) for name in plan.pieces})
    writer, stacks = ShardWriter(out), Stacks(plan)
    for done, (name, pieces) in enumerate(plan.pieces.items()):
        progress(done, len(plan.pieces))
        value = checkpoint.load(name)
        if (stored_as is not None and not exact(name)) or value.dtype == mx.float64:
            value = value.astype(stored_as or mx.float32)
        for piece in pieces:
            rows = value[piece.first : piece.first + piece.shape[0]] if len(pieces) > 1 else value
            for target, array, stored in stacks.apply(piece, chosen.apply(piece.target, rows)):
                _evaluate(array, name)
                writer.add(target, array, stored)
                del array
        del value, rows
    writer.close()
    progress(len(plan.pieces), len(plan.pieces))
    write_config(_with_dtype(chosen.config, dtype), out)
    copy_tokenizer(checkpoint.folder, out)


def expected_shapes(config: Config, names: Sequence[str]) -> dict[str, Shape]:
    """Names and shapes of the Decoder's parameters; ``names`` decide on Gemma 3's head."""
    try:
        model = Decoder(decoder_config(config, names))
    except ModelError as error:
        raise ConvertError(str(error)) from error
    return shapes(parameters(model))


def check_fit(expected: dict[str, Shape], found: dict[str, Shape], where: Path) -> None:
    """ConvertError that lists tensors which are missing, left over or of another shape."""
    apart = misfit(expected, found)
    if names := apart.names("has {} left over"):
        raise ConvertError(
            f"{where} does not fit its configuration: it {names}; download the model again"
        )
    if apart.misshapen:
        raise ConvertError(
            f"tensors in {where} have other shapes than its configuration says: "
            f"{preview(apart.misshapen, 3)}; download configuration and weights of the same model"
        )


def plan_base(checkpoint: Checkpoint) -> BasePlan:
    """Name every tensor as Decoder does, cut fused projections, and account for all of them.

    Raises:
        ConvertError: unsupported or already quantised model; missing, left-over or misshapen
            tensors.
    """
    config = _config(checkpoint)
    pieces: dict[str, list[_Piece]] = {}
    dropped: dict[str, str] = {}
    texts = {name: _text_name(name) for name in checkpoint.names()}
    try:
        shape = decoder_config(config, [t for t in texts.values() if t])
    except ModelError as error:
        raise ConvertError(str(error)) from error
    for name, text in texts.items():
        target = text and ours(shape.model_type, text)
        if text is None or target is None:
            dropped[name] = _reason(name)
        elif beyond(text, config):
            dropped[name] = "of a layer that drafts"
        elif (one := expert_of(text)) is not None:
            target = ours(shape.model_type, one[0])
            note = f"expert {one[1]}"
            pieces[name] = [_Piece(name, target, checkpoint.shape(name), 0, note, one[1])]
        elif shape.tied and target == "lm_head.weight":
            dropped[name] = "tied to the embedding"
        else:
            pieces[name] = _cut(name, target, checkpoint.shape(name), shape)
    plan = BasePlan(config, pieces, dropped)
    found = _shapes_found(plan, checkpoint.path)
    expected = expected_shapes(config, list(found))
    if shape.model_type in RESHAPED and expected != found:
        raise ConvertError(
            f"model_type '{shape.model_type}' is stored in a layout that is not converted here; "
            f"run `mlx_lm.convert --hf-path {checkpoint.path} -q`, whose output runs as it is"
        )
    check_fit(expected, found, checkpoint.path)
    for piece in plan.all_pieces():
        if not mx.issubdtype(checkpoint.dtype(piece.source), mx.floating):
            raise ConvertError(
                f"{piece.source} in {checkpoint.path} is of type {checkpoint.dtype(piece.source)}: "
                "the model is quantised by another program; needed: the unquantised model"
            )
    return plan


def _shapes_found(plan: BasePlan, where: Path) -> dict[str, Shape]:
    """Of the output's tensors; experts are stacked in the order of their numbers."""
    found: dict[str, Shape] = {}
    experts: dict[str, list[_Piece]] = {}
    for piece in plan.all_pieces():
        if piece.expert is not None:
            experts.setdefault(piece.target, []).append(piece)
            continue
        if piece.target in found:
            raise ConvertError(f"{where} holds {piece.target} under two names")
        found[piece.target] = piece.shape
    for target, parts in experts.items():
        numbers = sorted(cast(int, part.expert) for part in parts)
        if numbers != list(range(len(parts))) or len({part.shape for part in parts}) > 1:
            raise ConvertError(
                f"{where} lacks experts of {target}, or they differ in shape; "
                "download the model again"
            )
        found[target] = (len(parts), *parts[0].shape)
    return found


def _config(checkpoint: Checkpoint) -> Config:
    """config.json as mlx-lm reads it, and as what is stored means it."""
    if not checkpoint.config:
        raise ConvertError(f"{checkpoint.folder} has no config.json; download it with the model")
    types = {t: kind for n, kind in checkpoint.types().items() if (t := _text_name(n))}
    if packed_layers(types):
        raise ConvertError(
            f"{checkpoint.path} is a quantised MLX model already: run it as it is, or convert the "
            "unquantised model"
        )
    try:
        config = as_stored(checkpoint.config, types)
    except ModelError as error:
        raise ConvertError(f"{checkpoint.path}: {error}") from None
    return with_end_tokens(config, checkpoint.folder)


def _text_name(name: str) -> str | None:
    """A tensor's name in the text half; None for what that does not have."""
    # `sanitize` looks at names only.
    renamed = list(sanitize(cast(Any, {name: name})))
    return None if not renamed or name.startswith("drafter.") else renamed[0]


def _reason(name: str) -> str:
    if name.startswith("drafter."):
        return "a drafter; convert it with --format modelopt"
    return "computed from config.json" if name.endswith("inv_freq") else "not of the text model"


def _cut(name: str, target: str, shape: Shape, config: DecoderConfig) -> list[_Piece]:
    """The pieces of one tensor: several for q/k/v or gate/up stored as one, if not Phi-3's."""
    base, _, last = target.rpartition(".")
    module, _, projection = base.rpartition(".")
    head = config.head_dim
    sizes = {
        "qkv_proj": {
            "q_proj": config.num_heads * head,
            "k_proj": config.num_kv_heads * head,
            "v_proj": config.num_kv_heads * head,
        },
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size),
    }.get(projection)
    kept = config.stored_fused or (config.stored_gate_up and projection == "gate_up_proj")
    if kept or sizes is None or not shape or shape[0] != sum(sizes.values()):
        return [_Piece(name, target, shape, note="" if name == target else "renamed")]
    pieces, first = [], 0
    for part, rows in sizes.items():
        note = f"rows {first} to {first + rows - 1}"
        pieces.append(_Piece(name, f"{module}.{part}.{last}", (rows, *shape[1:]), first, note))
        first += rows
    return pieces


class Quantisation:
    """mlx-lm's choice of what is quantised and how, and its names.

    mlx-lm decides on a model; it gets one whose weights are never evaluated. The weights
    themselves are then quantised one by one, by the call that its layers make.

    Attributes:
        config: config.json with the `quantization` block.
    """

    def __init__(
        self, config: Config, names: Sequence[str], bits: int | None, group_size: int
    ) -> None:
        from mlx_lm.utils import quantize_model

        self.config = config
        self._prefix = NESTED_PREFIX if config["model_type"] in _NESTED else ""
        names = [self.stored(name) for name in names]
        self._chosen: dict[str, tuple[int, int, str]] = {}
        if bits is None:
            return
        model = mlx_lm_model(config, names)
        try:
            # It prints how many bits came out.
            with contextlib.redirect_stdout(io.StringIO()):
                model, self.config = quantize_model(model, config, group_size, bits)
        except (ValueError, RuntimeError) as error:
            raise ConvertError(
                f"{bits} bits in groups of {group_size} do not fit this model "
                f"({one_line(error)}); choose another --q-group-size"
            ) from error
        self._chosen = {
            path: (module.group_size, module.bits, module.mode)
            for path, module in model.named_modules()
            if hasattr(module, "scales")
        }
        if not self._chosen:
            raise ConvertError(
                f"no matrix of this model has rows whose length is a multiple of {group_size}, "
                "so none can be quantised; choose another --q-group-size"
            )

    def stored(self, target: str) -> str:
        return self._prefix + stored_name(self.config["model_type"], target)

    def bits(self, target: str) -> int | None:
        """Of a tensor when it is quantised; None if it is not."""
        base, _, last = self.stored(target).rpartition(".")
        return self._chosen[base][1] if last == "weight" and base in self._chosen else None

    def apply(self, target: str, value: mx.array) -> Iterator[tuple[str, mx.array, int]]:
        """The arrays to store for one weight, under mlx-lm's names; how many weights each holds."""
        if self.bits(target) is None:
            yield self.stored(target), value, value.size
            return
        base = self.stored(target).removesuffix(".weight")
        group_size, bits, mode = self._chosen[base]
        packed = mx.quantize(value, group_size, bits, mode=mode)
        for part, array in zip(("weight", "scales", "biases"), packed, strict=False):
            yield f"{base}.{part}", array, value.size if part == "weight" else 0


class Stacks:
    """Experts wait here until all of a tensor are there: of one layer at a time, as they lie in
    files. Every one is quantised alone, which is what quantising all of them does."""

    def __init__(self, plan: BasePlan) -> None:
        targets = (p.target for p in plan.all_pieces() if p.expert is not None)
        self._left = Counter(targets)
        self._waiting: dict[str, dict[int, list[tuple[str, mx.array, int]]]] = {}

    def apply(
        self, piece: _Piece, arrays: Iterator[tuple[str, mx.array, int]]
    ) -> Iterator[tuple[str, mx.array, int]]:
        """What is to be written now of a piece's arrays, as `Quantisation.apply` gives them."""
        if piece.expert is None:
            yield from arrays
            return
        waiting = self._waiting.setdefault(piece.target, {})
        waiting[piece.expert] = found = list(arrays)
        for _, array, _ in found:
            _evaluate(array, piece.source)
        self._left[piece.target] -= 1
        if self._left[piece.target]:
            return
        experts = [waiting[i] for i in sorted(waiting)]
        del self._waiting[piece.target], waiting, found
        for parts in zip(*experts, strict=True):
            yield parts[0][0], mx.stack([p[1] for p in parts]), sum(p[2] for p in parts)


def mlx_lm_model(config: Config, names: Sequence[str]) -> Any:
    """mlx-lm's model of this configuration; its arrays are promises and must stay so."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    if hasattr(model, "sanitize"):
        # Gemma 3 drops its head here if the weights hold none.
        model.sanitize({name: mx.array([0]) for name in names})
    return model


def _evaluate(array: mx.array, name: str) -> None:
    """Now, not in the writer: what waits there would keep its source, which is larger."""
    try:
        mx.eval(array)
    except RuntimeError as error:
        raise ConvertError(f"{name} cannot be read ({one_line(error)})") from error


def _config_dtype(config: Config) -> str | None:
    return config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")


def _with_dtype(config: Config, dtype: mx.Dtype | None) -> Config:
    """config.json must not go on naming a dtype that the weights no longer have."""
    if dtype is None:
        return config
    name = next(name for name, known in _DTYPES.items() if known == dtype)
    text = config.get("text_config")
    if text:
        config = {**config, "text_config": {**text, **_named(text, name)}}
    return {**config, **_named(config, name)}


def _named(config: Config, name: str) -> Config:
    return {key: name for key in ("torch_dtype", "dtype") if key in config}
