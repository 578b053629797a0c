"""Base models in GGUF -> MLX folders."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx

from mlx_redrafter.errors import ConvertError, ModelError, one_line
from mlx_redrafter.hub.gguf.file import GgufTensor
from mlx_redrafter.hub.gguf.model import Forms, GgufModel
from mlx_redrafter.hub.gguf.packed import ALL, KEPT, Form
from mlx_redrafter.hub.gguf.rope import FACTORS
from mlx_redrafter.hub.gguf.rows import reordered_heads
from mlx_redrafter.models import decoder_config, registry
from mlx_redrafter.models.weights import Shape, parameters, shapes
from mlx_redrafter.runtime.device import dtype_name

from .base import (
    NESTED_PREFIX,
    Config,
    Quantisation,
    check_fit,
    expected_shapes,
    mlx_lm_model,
)
from .base_files import write_config
from .mapping import Mapping, size_text
from .writer import OutputFolder, Progress, ShardWriter, sixteen_bits

_UNPACKED = ("F32", "F16", "BF16")


class GgufPlan:
    """What becomes of a GGUF file, known before anything is written.

    Args:
        path: the file.
        bits, group_size: quantise anew, as mlx_lm.convert does with the dequantised model. None:
            blocks that MLX holds to the bit with scales of 16 bits (Q4_0, Q5_0, MXFP4 ...) stay
            packed in groups of 32, unless a dtype is given; all other types are dequantised.
        keep: all blocks stay packed: K-quants as they are, their scales in the dtype (float32: to
            the bit), what MLX has no form of in the nearest.
        dtype: of all that is not packed; None: the file's own for F32 and BF16 models, else
            float16, which GGUF's scales are in (Gemma: bfloat16, as float16 does not hold its
            activations); 16 bits where ``bits`` are given.

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
        keep: bool = False,
    ) -> None:
        self.model = model = GgufModel(path)
        found = {name: s for t in model.tensors for name, s in model.targets(t).items()}
        self.config = model.config()
        check_fit(_expected(self.config, list(found), model), found, path)
        default = KEPT if bits is None and dtype is None else {}
        self.forms: Forms = ALL if keep else default
        self.dtype = dtype or model.dense_dtype(self.forms)
        if bits is not None and dtype is None and self.dtype == mx.float32:
            self.dtype = sixteen_bits(())
        self.quantisation = Quantisation(self.config, list(found), bits, group_size)
        self.bits, self.keep = bits, keep

    def mappings(self) -> list[Mapping]:
        """Every tensor of the file."""
        rows = []
        for tensor in self.model.tensors:
            bits = self._bits(tensor)
            notes = [f"{tensor.kind}, {f'{bits} bits' if bits else dtype_name(self.dtype)} in MLX"]
            if reordered_heads(tensor.name, self.model.kind, self.model.keys):
                notes.append("rows back in rotary order")
            for target, shape in self.model.targets(tensor).items():
                rows.append(Mapping(tensor.name, target, shape, ", ".join(notes)))
        for name in FACTORS:
            if factors := self.model.file.tensors.get(name):
                note = "becomes rope_scaling of config.json"
                rows.append(Mapping(name, "", factors.shape, note))
        return rows + [Mapping(t.name, "", t.shape, why) for t, why in self.model.dropped]

    def notes(self) -> list[str]:
        """What a person may not expect of the size, or of the precision."""
        matrices = [t for t in self.model.tensors if len(t.shape) >= 2]
        plain = [t for t in matrices if not self._bits(t)]
        packed = {t.kind for t in plain} - set(_UNPACKED)
        if self.keep:
            return self._kept_notes(matrices)
        if self.forms and packed:
            grown = sum(math.prod(t.shape) * self.dtype.size for t in plain if t.kind in packed)
            return [
                f"MLX has no equal of {_listed(packed)} with scales of 16 bits: these tensors "
                f"become {dtype_name(self.dtype)}, {size_text(grown)}; --keep-quantization keeps "
                "them packed, -q quantises them again"
            ]
        if self.bits is None:
            return []
        notes = []
        if again := {t.kind for t in matrices if self.model.form(t, ALL)}:
            notes.append(
                f"{_listed(again)} tensors are quantised a second time; --keep-quantization keeps "
                "what MLX can hold as it is"
            )
        if plain:
            notes.append(
                f"{len(plain)} matrices stay {dtype_name(self.dtype)}: the length of their rows is "
                "no multiple of --q-group-size"
            )
        return notes

    def _kept_notes(self, matrices: list[GgufTensor]) -> list[str]:
        forms = {t.kind: form for t in matrices if (form := self.model.form(t, self.forms))}
        # 16 bits of Gemma are bfloat16, which rounds the scales of all types.
        held = KEPT if self.dtype == mx.float16 else {}
        rounded = {k for k, f in forms.items() if f.mode == "affine" and f.same and k not in held}
        nearest = [f"{k} -> {f.bits} bits" for k, f in sorted(forms.items()) if not f.same]
        notes = []
        if rounded and self.dtype != mx.float32:
            notes.append(
                f"scales of {_listed(rounded)} are rounded to {dtype_name(self.dtype)}; --dtype "
                "float32 keeps them to the bit"
            )
        if nearest:
            notes.append(
                f"MLX has no equal form of some types: {', '.join(nearest)} in groups of 32"
            )
        return notes

    def write(self, out: OutputFolder, progress: Progress) -> None:
        """Make the folder, with the tokenizer that the file holds.

        Raises ConvertError. ``progress`` is called with tensors done and in all.
        """
        self._write_files(out)
        writer = ShardWriter(out)
        total = len(self.model.tensors)
        for done, tensor in enumerate(self.model.converted(self.forms, self.dtype)):
            progress(done, total)
            form = self.model.form(tensor.source, self.forms)
            for part, value in tensor.parts.items():
                name = f"{tensor.base}.{part}"
                if form:
                    holds = value.size * 32 // form.bits if part == "weight" else 0
                    writer.add(self.quantisation.stored(name), value, holds)
                    continue
                for target, array, holds in self.quantisation.apply(name, value):
                    mx.eval(array)  # the writer would keep its source, which is larger
                    writer.add(target, array, holds)
            del tensor, value
        writer.close()
        progress(total, total)

    def _bits(self, tensor: GgufTensor) -> int | None:
        form: Form | None = self.model.form(tensor, self.forms)
        return form.bits if form else self.quantisation.bits(next(iter(self.model.targets(tensor))))

    def _write_files(self, out: OutputFolder) -> None:
        config = {**self.quantisation.config, "dtype": dtype_name(self.dtype)}
        if block := self.model.quantisation(self.forms):
            # By the names that mlx-lm has; a layer's name is that of its weight.
            config["quantization"] = {
                self._layer(name) if isinstance(value, dict) else name: value
                for name, value in block.items()
            }
        write_config(config, out)
        ids = {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
        out.write_json("generation_config.json", {k: v for k, v in ids.items() if v is not None})
        tokenizer = self.model.tokenizer
        tokenizer.save(out.path)
        out.write_json("tokenizer_config.json", tokenizer.config(self.model.context_length))

    def _layer(self, name: str) -> str:
        return self.quantisation.stored(f"{name}.weight").removesuffix(".weight")


def _expected(config: Config, names: list[str], model: GgufModel) -> dict[str, Shape]:
    """Of our decoder's parameters, or of mlx_lm's for a type that it runs or cuts otherwise."""
    kind, path = config["model_type"], model.file.path
    try:
        native = registry.way(config) == "native"
        if native:
            _check_positions(config, path)
        if not native or model.kind.recurrent:
            found = shapes(parameters(mlx_lm_model(config, names)))
            return {name.removeprefix(NESTED_PREFIX): shape for name, shape in found.items()}
        return expected_shapes(config, names)
    except ModelError as error:
        raise ConvertError(str(error)) from error
    except ConvertError:
        raise
    except (ArithmeticError, IndexError, TypeError, ValueError) as error:
        raise ConvertError(
            f"{path} has sizes that no {kind} model can have ({one_line(error)}); download it again"
        ) from error


def _check_positions(config: Config, path: Path) -> None:
    """Some types of mlx_lm do not read how positions are stretched: that would be another model."""
    if config.get("rope_scaling") and not any(r.scaling for r in decoder_config(config).ropes):
        raise ConvertError(
            f"{path} stretches its positions ({config['rope_scaling']['rope_type']}), which a "
            f"model of type {config['model_type']} cannot in mlx_lm; convert the model's Hugging "
            "Face version without"
        )


def _listed(kinds: set[str]) -> str:
    return ", ".join(sorted(kinds))
