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
from mlx_redrafter.hub.gguf.architectures import architecture_of, layer_of, target_names
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
# Bounds the memory of a dequantisation: elements unpacked at a time; of bits, a quarter.
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
        self.dropped: list[tuple[GgufTensor, str]] = []
        self.tensors: list[GgufTensor] = []
        for tensor in self.file.tensors.values():
            if reason := self._beyond(tensor.name):
                self.dropped.append((tensor, reason))
            elif tensor.name not in rope.FACTORS:
                self.tensors.append(tensor)
                self.targets(tensor)

    def _beyond(self, name: str) -> str:
        """Why a tensor is not the model's; else nothing."""
        layer, layers = layer_of(name), int(self.keys.need("block_count"))
        if layer is None:
            return ""
        if layer >= layers - int(self.keys.get("nextn_predict_layers", 0)) and layer < layers:
            return "of a layer that drafts"
        shared = int(self.keys.get("attention.shared_kv_layers", 0))
        own = not name.split(".")[2].startswith(("attn_k", "attn_v"))
        return "" if own or layer < layers - shared else "of a layer that reads an earlier one's"

    def targets(self, tensor: GgufTensor) -> dict[str, tuple[int, ...]]:
        """Names in our decoder of what a tensor holds, and the shapes. Raises ConvertError."""
        names, shape = target_names(tensor.name, self.kind), self._whole_shape(tensor)
        if len(names) > 1:
            shape = (*shape[:-2], shape[-2] // len(names), shape[-1])
        return dict.fromkeys(names, shape)

    def _whole_shape(self, tensor: GgufTensor) -> tuple[int, ...]:
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
        positions = self._positions(head_dim)
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
            "intermediate_size": extra.get("intermediate_size") or self._inner(),
            "max_position_embeddings": positions.length,
            "num_attention_heads": keys.heads,
            "num_hidden_layers": keys.layers,
            "num_key_value_heads": extra.get("num_key_value_heads") or keys.kv_heads,
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
        nested = extra.get("rope_parameters")
        if nested and not kind.own_positions:
            theta = {"rope_theta": config["rope_theta"]}
            scaling = positions.scaling or {"type": "default"}
            extra["rope_parameters"] = {**scaling, **theta, **nested}
            extra["rope_scaling"] = None
        keys.all_read()
        return {**config, **extra}

    def _positions(self, head_dim: int) -> rope.Positions:
        if self.kind.own_positions:
            return rope.Positions(self.context_length, None)
        rotated = int(self.keys.get("rope.dimension_count", head_dim))
        value = self.keys.get("attention.value_length", self.keys.head_dim)
        if rotated != head_dim and not self.kind.partial:
            raise ConvertError(
                f"{self.file.path} rotates {rotated} of {head_dim} entries of a head, which a "
                f"{self.architecture} model cannot; convert the model's Hugging Face version"
            )
        if value != self.keys.head_dim and self.architecture != "deepseek2":
            self.keys.refuse(f"values of {value} entries beside keys of {self.keys.head_dim}")
        return rope.positions(self.file, self.architecture, rotated, self.kind.rope)

    def _inner(self) -> int:
        """Some files of experts do not say the size of layers without any."""
        size = self.keys.get("expert_feed_forward_length")
        return self.keys.size("feed_forward_length", int(size) if size else None)

    @property
    def context_length(self) -> int:
        return int(self.keys.get("context_length", 2048))

    def dense_dtype(self, forms: Forms) -> mx.Dtype:
        """Where none is asked for: as the file's matrices; float16 if any has to be unpacked, or of
        Gemma, whose activations exceed it, bfloat16."""
        import mlx.core as mx

        half = mx.bfloat16 if self.kind.model_type.startswith("gemma") else mx.float16
        kinds = {t.kind for t in self.tensors if len(t.shape) >= 2}
        if any(self.form(tensor, forms) for tensor in self.tensors):
            return half
        if len(kinds) > 1:
            kinds.discard("F32")  # routers
        names = {"F32": mx.float32, "BF16": mx.bfloat16}
        return names[kinds.pop()] if len(kinds) == 1 and kinds <= names.keys() else half

    def form(self, tensor: GgufTensor, forms: Forms) -> Form | None:
        """How MLX holds these blocks, if it is among the forms; vectors and routers are plain."""
        layer = len(tensor.shape) >= 2 and tensor.name.endswith(".weight")
        return forms.get(tensor.kind) if layer and not tensor.name.endswith(_PLAIN) else None

    def quantisation(self, forms: Forms) -> dict[str, Any] | None:
        """The `quantization` block, in our decoder's names; None where nothing is packed."""
        found = {
            name.removesuffix(".weight"): form
            for t in self.tensors
            if (form := self.form(t, forms))
            for name in self.targets(t)
        }
        return quantisation_block(found) if found else None

    def converted(self, forms: Forms, dtype: mx.Dtype) -> Iterator[Converted]:
        """All tensors, one after the other; those of the forms stay packed."""
        import mlx.core as mx

        for tensor in self.tensors:
            names = list(self.targets(tensor))
            if self.form(tensor, forms):
                parts = self._packed(tensor, dtype)
            else:
                part = names[0].rpartition(".")[2]
                parts = {part: self._dense(tensor, names[0], dtype)}
            parts = restored(tensor.name, parts, self.kind, self.keys)
            for i, name in enumerate(names):
                own = parts
                if len(names) > 1:
                    own = {part: mx.split(v, len(names), -2)[i] for part, v in parts.items()}
                yield Converted(tensor, name.rpartition(".")[0], own)

    def _packed(self, tensor: GgufTensor, dtype: mx.Dtype) -> dict[str, mx.array]:
        import mlx.core as mx

        pieces: dict[str, list[mx.array]] = {}
        for first, rows in self._steps(tensor, _CHUNK // 4):
            found = repack(tensor.kind, self.file.read(tensor, first, rows), dtype)
            mx.eval(list(found.values()))
            for name, value in found.items():
                pieces.setdefault(name, []).append(value)
        whole = {name: mx.concatenate(values) for name, values in pieces.items()}
        return {name: v.reshape(*tensor.shape[:-1], v.shape[-1]) for name, v in whole.items()}

    def _dense(self, tensor: GgufTensor, target: str, dtype: mx.Dtype) -> mx.array:
        import mlx.core as mx

        norm = tensor.name.endswith("norm.weight")
        dtype = mx.float32 if exact(target) or target.endswith(".A_log") else dtype
        pieces = []
        for first, rows in self._steps(tensor, _CHUNK):
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
        return whole.reshape(self._whole_shape(tensor) if one_row else tensor.shape)

    def _steps(self, tensor: GgufTensor, elements: int) -> Iterator[tuple[int, int]]:
        """First row and number of rows of what is unpacked at a time."""
        step = max(1, elements // tensor.shape[-1])
        for first in range(0, tensor.rows, step):
            yield first, min(step, tensor.rows - first)

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise ConvertError(f"{self.file.path} lacks {name}; download it again")
        return tensor.shape
