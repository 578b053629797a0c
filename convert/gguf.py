"""Base models in GGUF (llama and qwen2 architectures) -> MLX folders."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx

from mlx_redrafter.hub.gguf.blocks import KEPT_BITS
from mlx_redrafter.hub.gguf.file import GgufTensor
from mlx_redrafter.hub.gguf.model import GgufModel, mlx_name
from mlx_redrafter.hub.gguf.rope import ROPE_FACTORS
from mlx_redrafter.runtime.device import dtype_name

from .base import Quantisation, check_fit, expected_shapes
from .base_files import write_config
from .mapping import Mapping, size_text
from .writer import OutputFolder, Progress, ShardWriter, sixteen_bits


class GgufPlan:
    """What becomes of a GGUF file, known before anything is written.

    Args:
        path: the file.
        bits, group_size: quantise anew, as mlx_lm.convert does with the dequantised model. None:
            Q4_0, Q4_1 and Q8_0 blocks become MLX's quantisation in groups of 32, to the bit,
            unless a dtype is given; all other types are dequantised.
        dtype: of all that is not packed; None: the file's own for F32 and BF16 models, else
            float16, which GGUF's scales are in; 16 bits where ``bits`` are given.

    Raises:
        ConvertError: another architecture, tokenizer or block type; a damaged file; missing,
            left-over or misshapen tensors.
    """

    def __init__(
        self,
        path: Path,
        *,
        bits: int | None = None,
        group_size: int = 64,
        dtype: mx.Dtype | None = None,
    ) -> None:
        self.model = model = GgufModel(path)
        shapes = {_target(tensor): tensor.shape for tensor in model.tensors}
        self.config = model.config()
        check_fit(expected_shapes(self.config, list(shapes)), shapes, path)
        self.keep = bits is None and dtype is None
        self.dtype = dtype or model.dense_dtype(self.keep)
        if bits is not None and dtype is None and self.dtype == mx.float32:
            self.dtype = sixteen_bits(())
        self.quantisation = Quantisation(self.config, list(shapes), bits, group_size)
        self.bits = bits

    def mappings(self) -> list[Mapping]:
        """Every tensor of the file."""
        rows = []
        for tensor in self.model.tensors:
            target, bits = _target(tensor), self._bits(tensor)
            notes = [f"{tensor.kind}, {f'{bits} bits' if bits else dtype_name(self.dtype)} in MLX"]
            if self.model.reordered_heads(tensor):
                notes.append("rows back in rotary order")
            rows.append(Mapping(tensor.name, target, tensor.shape, ", ".join(notes)))
        if factors := self.model.file.tensors.get(ROPE_FACTORS):
            note = "becomes rope_scaling of config.json"
            rows.append(Mapping(ROPE_FACTORS, "", factors.shape, note))
        return rows

    def notes(self) -> list[str]:
        """What a person may not expect of the size, or of the precision."""
        matrices = [t for t in self.model.tensors if len(t.shape) == 2]
        plain = [t for t in matrices if not self._bits(t)]
        packed = sorted({t.kind for t in plain} - {"F32", "F16", "BF16"})
        if self.keep and packed:
            grown = sum(math.prod(t.shape) * self.dtype.size for t in plain if t.kind in packed)
            return [
                f"MLX has no equal of {', '.join(packed)}: these tensors become "
                f"{dtype_name(self.dtype)}, {size_text(grown)}; with -q they are quantised again"
            ]
        if self.bits is None:
            return []
        notes = []
        if kept := sorted({t.kind for t in matrices if self.model.kept(t)}):
            notes.append(
                f"{', '.join(kept)} tensors are quantised a second time; without -q they are "
                "kept to the bit"
            )
        if plain:
            notes.append(
                f"{len(plain)} matrices stay {dtype_name(self.dtype)}: the length of their rows is "
                "no multiple of --q-group-size"
            )
        return notes

    def write(self, out: OutputFolder, progress: Progress) -> None:
        """Make the folder, with the tokenizer that the file holds.

        Raises ConvertError. ``progress`` is called with tensors done and in all.
        """
        self._write_files(out)
        writer = ShardWriter(out)
        total = len(self.model.tensors)
        for done, tensor in enumerate(self.model.converted(self.keep, self.dtype)):
            progress(done, total)
            packed = self.keep and self.model.kept(tensor.source)
            for part, value in tensor.parts.items():
                name = f"{tensor.base}.{part}"
                if packed:
                    holds = math.prod(tensor.source.shape) if part == "weight" else 0
                    writer.add(name, value, holds)
                    continue
                for target, array, holds in self.quantisation.apply(name, value):
                    mx.eval(array)  # the writer would keep its source, which is larger
                    writer.add(target, array, holds)
            del tensor, value
        writer.close()
        progress(total, total)

    def _bits(self, tensor: GgufTensor) -> int | None:
        if self.keep and self.model.kept(tensor):
            return KEPT_BITS[tensor.kind]
        return self.quantisation.bits(_target(tensor))

    def _write_files(self, out: OutputFolder) -> None:
        config = {**self.quantisation.config, "dtype": dtype_name(self.dtype)}
        if self.keep and (block := self.model.quantisation()):
            config["quantization"] = block
        write_config(config, out)
        ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
        out.write_json("generation_config.json", {k: v for k, v in ids.items() if v is not None})
        tokenizer = self.model.tokenizer
        tokenizer.save(out.path)
        out.write_json("tokenizer_config.json", tokenizer.config(self.model.context_length))


def _target(tensor: GgufTensor) -> str:
    base, _, part = tensor.name.rpartition(".")
    return f"{mlx_name(base)}.{part}"
