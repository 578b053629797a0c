"""Base models in GGUF (llama and qwen2 architectures) -> MLX folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_redrafter.convert.base import check_fit, expected_shapes
from mlx_redrafter.convert.base_files import write_config
from mlx_redrafter.convert.mapping import Mapping
from mlx_redrafter.convert.writer import OutputFolder, ShardWriter
from mlx_redrafter.gguf_blocks import KEPT_BITS
from mlx_redrafter.gguf_file import GgufTensor
from mlx_redrafter.gguf_model import ROPE_FACTORS, GgufModel, mlx_name

Progress = Callable[[int, int], None]


def plan_gguf(path: Path) -> list[Mapping]:
    """What convert_gguf would do with each tensor. Raises ConvertError."""
    return _mappings(_checked(path))


def convert_gguf(
    path: Path,
    out: OutputFolder,
    *,
    keep_quantized: bool,
    dtype: mx.Dtype | None,
    progress: Progress,
) -> list[Mapping]:
    """Write a GGUF file's model as an MLX folder, with the tokenizer that the file holds.

    Args:
        path: the file.
        out: folder under construction.
        keep_quantized: Q4_0, Q4_1 and Q8_0 blocks become MLX's quantisation in groups of 32, to
            the bit; all other types, and these too if False, are dequantised.
        dtype: of all that is not packed; None: the file's own for F32 and BF16 models, else
            float16, which GGUF's scales are in.
        progress: called with tensors done and in all.

    Raises:
        ConvertError: another architecture, tokenizer or block type; a damaged file; missing,
            left-over or misshapen tensors.
    """
    model = _checked(path)
    block = model.quantisation() if keep_quantized else None
    kind = dtype or model.dense_dtype(keep_quantized)
    _write_files(model, kind, block, out)
    writer = ShardWriter(out)
    for done, tensor in enumerate(model.converted(keep_quantized, kind)):
        progress(done, len(model.tensors))
        for part, value in tensor.parts.items():
            writer.add(f"{tensor.base}.{part}", value)
        del tensor, value
    writer.close()
    progress(len(model.tensors), len(model.tensors))
    return _mappings(model)


def _write_files(
    model: GgufModel, dtype: mx.Dtype, block: dict[str, Any] | None, out: OutputFolder
) -> None:
    config = {**model.config(), "dtype": str(dtype).rpartition(".")[2]}
    if block is not None:
        config["quantization"] = block
    write_config(config, out)
    ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    out.write_json("generation_config.json", {k: v for k, v in ids.items() if v is not None})
    model.tokenizer.save(out.path)
    out.write_json("tokenizer_config.json", model.tokenizer.config(model.context_length))


def _checked(path: Path) -> GgufModel:
    """The model, if its tensors are those of its configuration."""
    model = GgufModel(path)
    shapes = {_target(tensor): tensor.shape for tensor in model.tensors}
    check_fit(expected_shapes(model.config(), list(shapes)), shapes, path)
    return model


def _target(tensor: GgufTensor) -> str:
    base, _, part = tensor.name.rpartition(".")
    return f"{mlx_name(base)}.{part}"


def _mappings(model: GgufModel) -> list[Mapping]:
    rows = []
    for tensor in model.tensors:
        bits = KEPT_BITS.get(tensor.kind)
        notes = [f"{tensor.kind}, {bits} bits in MLX" if bits else tensor.kind]
        if model.reordered_heads(tensor):
            notes.append("rows back in rotary order")
        rows.append(Mapping(tensor.name, _target(tensor), tensor.shape, ", ".join(notes)))
    if factors := model.file.tensors.get(ROPE_FACTORS):
        rows.append(Mapping(ROPE_FACTORS, "", factors.shape, "becomes rope_scaling of config.json"))
    return rows
