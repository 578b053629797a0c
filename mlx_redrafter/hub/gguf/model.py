"""A GGUF model in MLX's terms: config, names, weights.

llama.cpp renames every tensor and changes the values of some; all of that is undone here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_redrafter.errors import ConvertError
from mlx_redrafter.hub.gguf import rope
from mlx_redrafter.hub.gguf.architectures import architecture_of, layer_of, target_name
from mlx_redrafter.hub.gguf.blocks import dequantise
from mlx_redrafter.hub.gguf.file import GgufFile, GgufTensor
from mlx_redrafter.hub.gguf.keys import Keys
from mlx_redrafter.hub.gguf.packed import Form, quantisation_block, repack
from mlx_redrafter.hub.gguf.rows import restored
from mlx_redrafter.hub.gguf.tokenizer import GgufTokenizer
from mlx_redrafter.models.layout import exact
from mlx_redrafter.runtime.device import dtype_name

if TYPE_CHECKING:
    import mlx.core as mx

Forms = Mapping[str, Form]
# Bounds the memory of a dequantisation: elements unpacked at a time.
_CHUNK = 1 << 24
# Routers stay plain: mlx-lm's are no layers that can be packed.
_CONVOLUTION = ".ssm_conv1d.weight"
_PLAIN = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight", _CONVOLUTION)


class Converted(NamedTuple):
    """One source tensor under its new name: `parts` by suffix (weight, scales, biases, bias)."""

    source: GgufTensor
    base: str
    parts: dict[str, mx.array]


class GgufModel:
    """Raises ConvertError for other architectures, tokenizers, block types and unknown tensors."""

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        if (kind := self.file.get("general.type", "model")) != "model":
            raise ConvertError(f"{self.file.path} is a GGUF file of type {kind!r}; needed: a model")
        self.architecture = str(self.file.get("general.architecture"))
        self.keys = Keys(self.file, self.architecture)
        self.kind = architecture_of(self.keys)
        self.tokenizer = GgufTokenizer(self.file.metadata, self.file.path.name)
        tensors = [t for t in self.file.tensors.values() if t.name not in rope.FACTORS]
        # Layers behind the last one draft; they are not the model's.
        drafting = bool(self.keys.get("nextn_predict_layers", 0))
        count = self.keys.layers if drafting else 0
        last = [drafting and (layer_of(t.name) or 0) >= count for t in tensors]
        self.dropped = [t for t, out in zip(tensors, last, strict=True) if out]
        self.tensors = [t for t, out in zip(tensors, last, strict=True) if not out]
        for tensor in self.tensors:
            self.target(tensor)

    def target(self, tensor: GgufTensor) -> str:
        """The tensor's name in our decoder. Raises ConvertError."""
        return target_name(tensor.name, self.kind)

    def shape(self, tensor: GgufTensor) -> tuple[int, ...]:
        """As the model has it: llama.cpp drops axes of length 1."""
        if tensor.name.endswith(_PLAIN[1]) and len(tensor.shape) == 1:
            return (1, *tensor.shape)
        return (*tensor.shape, 1) if tensor.name.endswith(_CONVOLUTION) else tensor.shape

    def config(self) -> dict[str, Any]:
        """`config.json` as transformers and mlx-lm write it. Raises ConvertError."""
        keys, kind = self.keys, self.kind
        rows = self._shape("token_embd.weight")[0]
        if len(self.tokenizer.tokens) > rows:
            raise ConvertError(
                f"{self.file.path} has {len(self.tokenizer.tokens)} tokens and embeds {rows} of "
                "them; download it again"
            )
        hidden = keys.size("embedding_length")
        ends = self.tokenizer.end_ids()
        extra = kind.fields(keys)
        head_dim = extra.get("head_dim", keys.head_dim)
        positions = rope.positions(self.file, self.architecture, self._rotated(head_dim), kind.rope)
        rms = kind.eps == "rms_norm_eps"
        epsilon = f"attention.layer_norm_{'rms_' if rms else ''}epsilon"
        config: dict[str, Any] = {
            "architectures": [f"{kind.heading}ForCausalLM"],
            "model_type": kind.model_type,
            "attention_dropout": 0.0,
            "bos_token_id": self.tokenizer.token_id("bos"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": hidden**-0.5,
            "intermediate_size": keys.size("feed_forward_length", self._expert_size()),
            "max_position_embeddings": positions.length,
            "num_attention_heads": keys.heads,
            "num_hidden_layers": keys.layers,
            "num_key_value_heads": keys.kv_heads,
            "pad_token_id": self.tokenizer.token_id("padding"),
            kind.eps: keys.need(epsilon),
            "rope_scaling": positions.scaling,
            "rope_theta": keys.get("rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "use_cache": True,
            "vocab_size": rows,
        }
        if kind.partial:
            config["partial_rotary_factor"] = keys.rotated / head_dim
        if nested := extra.get("rope_parameters"):
            theta = {"rope_theta": config["rope_theta"]}
            scaling = positions.scaling or {"type": "default"}
            extra["rope_parameters"] = {**scaling, **theta, **nested}
            extra["rope_scaling"] = None
        keys.all_read()
        return {**config, **extra}

    def _rotated(self, head_dim: int) -> int:
        rotated = int(self.keys.get("rope.dimension_count", head_dim))
        value = self.keys.get("attention.value_length", self.keys.head_dim)
        if rotated != head_dim and not self.kind.partial:
            raise ConvertError(
                f"{self.file.path} rotates {rotated} of {head_dim} entries of a head, which a "
                f"{self.architecture} model cannot; convert the model's Hugging Face version"
            )
        if value != self.keys.head_dim and self.architecture != "deepseek2":
            self.keys.refuse(f"values of {value} entries beside keys of {self.keys.head_dim}")
        return rotated

    def _expert_size(self) -> int | None:
        """Some files of experts do not say the size of layers without any."""
        size = self.keys.get("expert_feed_forward_length")
        return int(size) if size else None

    @property
    def context_length(self) -> int:
        return int(self.keys.get("context_length", 2048))

    def dense_dtype(self, forms: Forms) -> mx.Dtype:
        """Where none is asked for: as the file's matrices; float16 if any has to be unpacked."""
        import mlx.core as mx

        kinds = {t.kind for t in self.tensors if len(t.shape) >= 2}
        if any(self.form(tensor, forms) for tensor in self.tensors):
            return mx.float16
        if len(kinds) > 1:
            kinds.discard("F32")  # routers
        names = {"F32": mx.float32, "BF16": mx.bfloat16}
        return names[kinds.pop()] if len(kinds) == 1 and kinds <= names.keys() else mx.float16

    def form(self, tensor: GgufTensor, forms: Forms) -> Form | None:
        """How MLX holds these blocks, if it is among the forms; vectors and routers are plain."""
        layer = len(tensor.shape) >= 2 and tensor.name.endswith(".weight")
        return forms.get(tensor.kind) if layer and not tensor.name.endswith(_PLAIN) else None

    def quantisation(self, forms: Forms) -> dict[str, Any] | None:
        """The `quantization` block, in our decoder's names; None where nothing is packed."""
        found = {
            self.target(t).removesuffix(".weight"): form
            for t in self.tensors
            if (form := self.form(t, forms))
        }
        return quantisation_block(found) if found else None

    def converted(self, forms: Forms, dtype: mx.Dtype) -> Iterator[Converted]:
        """All tensors, one after the other; those of the forms stay packed."""
        for tensor in self.tensors:
            target = self.target(tensor)
            base, _, part = target.rpartition(".")
            if self.form(tensor, forms):
                parts = self._packed(tensor, dtype)
            else:
                parts = {part: self._dense(tensor, dtype)}
            yield Converted(tensor, base, restored(tensor.name, parts, self.kind, self.keys))

    def _packed(self, tensor: GgufTensor, dtype: mx.Dtype) -> dict[str, mx.array]:
        import mlx.core as mx

        pieces: dict[str, list[mx.array]] = {}
        for first, rows in self._steps(tensor):
            found = repack(tensor.kind, self.file.read(tensor, first, rows), dtype)
            mx.eval(list(found.values()))
            for name, value in found.items():
                pieces.setdefault(name, []).append(value)
        whole = {name: mx.concatenate(values) for name, values in pieces.items()}
        return {name: v.reshape(*tensor.shape[:-1], v.shape[-1]) for name, v in whole.items()}

    def _dense(self, tensor: GgufTensor, dtype: mx.Dtype) -> mx.array:
        import mlx.core as mx

        norm = tensor.name.endswith("norm.weight")
        target = self.target(tensor)
        dtype = mx.float32 if exact(target) or target.endswith(".A_log") else dtype
        pieces = []
        for first, rows in self._steps(tensor):
            values = dequantise(tensor.kind, self.file.read(tensor, first, rows))
            if norm and self.kind.offset:
                values = values - np.float32(self.kind.offset)
            pieces.append(mx.array(values).astype(dtype))
            mx.eval(pieces[-1])
            if not mx.isfinite(mx.abs(pieces[-1]).max()).item() and np.isfinite(values).all():
                name = dtype_name(dtype)
                raise ConvertError(
                    f"{tensor.name} has values beyond {name}; run again with --dtype bfloat16"
                )
        whole = mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        one_row = tensor.name.endswith(_PLAIN[1])
        return whole.reshape(self.shape(tensor) if one_row else tensor.shape)

    def _steps(self, tensor: GgufTensor) -> Iterator[tuple[int, int]]:
        """First row and number of rows of what is unpacked at a time."""
        step = max(1, _CHUNK // tensor.shape[-1])
        for first in range(0, tensor.rows, step):
            yield first, min(step, tensor.rows - first)

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise ConvertError(f"{self.file.path} lacks {name}; download it again")
        return tensor.shape
