"""A GGUF model of the llama or qwen2 architecture in MLX's terms: config, names, weights.

llama.cpp renames every tensor, and for llama reorders the rows of q and k; both are undone here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_redrafter.errors import ConvertError
from mlx_redrafter.hub.gguf import rope
from mlx_redrafter.hub.gguf.blocks import GROUP, KEPT_BITS, dequantise, repack
from mlx_redrafter.hub.gguf.file import GgufFile, GgufTensor
from mlx_redrafter.hub.gguf.tokenizer import GgufTokenizer
from mlx_redrafter.runtime.device import dtype_name

if TYPE_CHECKING:
    import mlx.core as mx

_BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Bounds the memory of a dequantisation: elements unpacked at a time.
_CHUNK = 1 << 24


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
        if self.architecture not in ARCHITECTURES or self._get("expert_count", 0):
            experts = " with experts" if self._get("expert_count", 0) else ""
            raise ConvertError(
                f"{self.file.path} holds the architecture {self.architecture!r}{experts}; needed: "
                f"{' or '.join(ARCHITECTURES)}: convert the model's Hugging Face version"
            )
        self.tokenizer = GgufTokenizer(self.file.metadata, self.file.path.name)
        self.tensors = [t for t in self.file.tensors.values() if t.name != rope.ROPE_FACTORS]
        for tensor in self.tensors:
            mlx_name(tensor.name.rpartition(".")[0])

    def config(self) -> dict[str, Any]:
        """`config.json` as transformers and mlx-lm write it. Raises ConvertError."""
        rows = self._shape("token_embd.weight")[0]
        heads, hidden = self._size("attention.head_count"), self._size("embedding_length")
        if len(self.tokenizer.tokens) > rows:
            raise ConvertError(
                f"{self.file.path} has {len(self.tokenizer.tokens)} tokens and embeds {rows} of "
                "them; download it again"
            )
        head_dim = self._size("attention.key_length", hidden // heads)
        rotated = self._get("rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ConvertError(
                f"{self.file.path} rotates {rotated} of {head_dim} entries of a head, which a "
                f"{self.architecture} model cannot; convert the model's Hugging Face version"
            )
        positions = rope.positions(self.file, self.architecture, head_dim)
        names = self.file.tensors
        ends = self.tokenizer.end_ids()
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "attention_dropout": 0.0,
            "bos_token_id": self.tokenizer.token_id("bos"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": hidden**-0.5,
            "intermediate_size": self._size("feed_forward_length"),
            "max_position_embeddings": positions.length,
            "num_attention_heads": heads,
            "num_hidden_layers": self._size("block_count"),
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": self.tokenizer.token_id("padding"),
            "rms_norm_eps": round(self._needed("attention.layer_norm_rms_epsilon"), 12),
            "rope_scaling": positions.scaling,
            "rope_theta": self._get("rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in names,
            "use_cache": True,
            "vocab_size": rows,
        }
        if self.architecture == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in names
            config["mlp_bias"] = "blk.0.ffn_gate.bias" in names
        return config

    @property
    def context_length(self) -> int:
        return int(self._get("context_length", 2048))

    @property
    def kv_heads(self) -> int:
        return self._size("attention.head_count_kv", self._size("attention.head_count"))

    def dense_dtype(self, quantised: bool) -> mx.Dtype:
        """Where none is asked for: as the file's matrices; float16 if any has to be unpacked."""
        import mlx.core as mx

        kinds = {t.kind for t in self.tensors if len(t.shape) == 2}
        if quantised and any(map(self.kept, self.tensors)):
            return mx.float16
        names = {"F32": mx.float32, "BF16": mx.bfloat16}
        return names[kinds.pop()] if len(kinds) == 1 and kinds <= names.keys() else mx.float16

    def kept(self, tensor: GgufTensor) -> bool:
        """Has MLX an equal of these blocks? Vectors have to be plain there."""
        matrix = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
        return matrix and tensor.kind in KEPT_BITS

    def quantisation(self) -> dict[str, Any] | None:
        """The `quantization` block if blocks are kept; None where there are none to keep."""
        bits = {
            mlx_name(t.name.removesuffix(".weight")): KEPT_BITS[t.kind]
            for t in self.tensors
            if self.kept(t)
        }
        return quantisation_block(bits) if bits else None

    def converted(self, quantised: bool, dtype: mx.Dtype) -> Iterator[Converted]:
        """All tensors, one after the other; quantised=True keeps the blocks that MLX can."""
        import mlx.core as mx

        for tensor in self.tensors:
            base, _, part = tensor.name.rpartition(".")
            if quantised and self.kept(tensor):
                weight, *scales = repack(tensor.kind, self.file.read(tensor))
                parts = {"weight": mx.array(weight)}
                for name, value in zip(("scales", "biases"), scales, strict=True):
                    parts[name] = mx.array(value).astype(dtype)
            else:
                parts = {part: self._dense(tensor, dtype)}
            heads = self.reordered_heads(tensor)
            if heads:
                parts = {name: unpermute(rows, heads) for name, rows in parts.items()}
            yield Converted(tensor, mlx_name(base), parts)

    def reordered_heads(self, tensor: GgufTensor) -> int:
        """How many heads llama.cpp has reordered in this tensor; 0 for all but llama's q and k."""
        if self.architecture != "llama":
            return 0
        base = tensor.name.rpartition(".")[0]
        if base.endswith(".attn_q"):
            return self._size("attention.head_count")
        return self.kv_heads if base.endswith(".attn_k") else 0

    def _dense(self, tensor: GgufTensor, dtype: mx.Dtype) -> mx.array:
        import mlx.core as mx

        step = max(1, _CHUNK // tensor.shape[-1])
        pieces = []
        for first in range(0, tensor.rows, step):
            rows = min(step, tensor.rows - first)
            values = dequantise(tensor.kind, self.file.read(tensor, first, rows))
            pieces.append(mx.array(values).astype(dtype))
            mx.eval(pieces[-1])
            if not mx.isfinite(mx.abs(pieces[-1]).max()).item() and np.isfinite(values).all():
                name = dtype_name(dtype)
                raise ConvertError(
                    f"{tensor.name} has values beyond {name}; run again with --dtype bfloat16"
                )
        whole = mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        return whole.reshape(tensor.shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise ConvertError(f"{self.file.path} lacks {name}; download it again")
        return tensor.shape

    def _size(self, key: str, default: int | None = None) -> int:
        """A size of the model, which cannot exceed what the file holds."""
        value = int(self._needed(key) if default is None else self._get(key, default))
        most = max((max(*t.shape, len(self.tensors)) for t in self.tensors), default=0)
        if value > most:
            raise ConvertError(
                f"{self.file.path} gives {self.architecture}.{key} as {value}, more than its "
                "tensors have; download it again"
            )
        return value

    def _needed(self, key: str) -> Any:
        if (value := self._get(key)) is None:
            raise ConvertError(
                f"{self.file.path} lacks {self.architecture}.{key}; download it again"
            )
        return value

    def _get(self, key: str, default: Any = None) -> Any:
        return self.file.get(f"{self.architecture}.{key}", default)


def mlx_name(base: str) -> str:
    """`blk.3.attn_q` -> `model.layers.3.self_attn.q_proj`. ConvertError for unknown tensors."""
    parts = base.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}"
    if base in _OUTER_NAMES:
        return _OUTER_NAMES[base]
    raise ConvertError(
        f"the GGUF file holds an unknown tensor {base!r}; needed: a model of the architecture "
        f"{' or '.join(ARCHITECTURES)}"
    )


def unpermute(rows: mx.array, heads: int) -> mx.array:
    """(heads * Dh, ...) rows in llama.cpp's interleaved rotary order -> the half-split order.

    llama.cpp stores the two rotary partners of a head side by side; MLX and transformers keep
    all first partners, then all second ones (`permute` in llama.cpp's convert_hf_to_gguf.py).
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def quantisation_block(bits: dict[str, int]) -> dict[str, Any]:
    """mlx-lm's `quantization` block: the lowest width is the default, others are listed."""
    default = min(bits.values())
    block: dict[str, Any] = {"group_size": GROUP, "bits": default}
    for name, width in bits.items():
        if width != default:
            block[name] = {"group_size": GROUP, "bits": width}
    return block
