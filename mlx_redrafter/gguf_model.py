"""A GGUF model of the llama or qwen2 architecture in MLX's terms: config, names, weights.

llama.cpp renames every tensor, and for llama reorders the rows of q and k; both are undone here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlx_redrafter.errors import ConvertError
from mlx_redrafter.gguf_blocks import GROUP, KEPT_BITS, dequantise, repack
from mlx_redrafter.gguf_file import GgufFile, GgufTensor
from mlx_redrafter.gguf_tokenizer import GgufTokenizer

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
# Llama 3.1's rotary factors; configuration rather than weights.
ROPE_FACTORS = "rope_freqs.weight"
# (low, high) frequency factors and first context length of every published Llama 3.x.
_LLAMA3 = (1.0, 4.0, 8192)
# Bounds the memory of a dequantisation: elements unpacked at a time.
_CHUNK = 1 << 24


class Converted(NamedTuple):
    """One source tensor under its new name: `parts` by suffix (weight, scales, biases, bias)."""

    source: str
    base: str
    parts: dict[str, mx.array]


class GgufModel:
    """Raises ConvertError for other architectures, tokenizers, block types and unknown tensors."""

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        self.architecture = str(self.file.get("general.architecture"))
        if self.architecture not in ARCHITECTURES or self._get("expert_count", 0):
            experts = " with experts" if self._get("expert_count", 0) else ""
            raise ConvertError(
                f"{self.file.path} holds the architecture {self.architecture!r}{experts}; needed: "
                f"{' or '.join(ARCHITECTURES)}: convert the model's Hugging Face version"
            )
        self.tokenizer = GgufTokenizer(self.file.metadata, self.file.path.name)
        self.tensors = [t for t in self.file.tensors.values() if t.name != ROPE_FACTORS]
        for tensor in self.tensors:
            mlx_name(tensor.name.rpartition(".")[0])

    def config(self) -> dict[str, Any]:
        """`config.json` as transformers and mlx-lm write it. Raises ConvertError."""
        try:
            return self._config()
        except (TypeError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, ConvertError):
                raise
            raise ConvertError(
                f"{self.file.path} lacks sizes of the model ({error}); download it again"
            ) from error

    def _config(self) -> dict[str, Any]:
        heads, hidden = int(self._get("attention.head_count")), int(self._get("embedding_length"))
        rows = self._shape("token_embd.weight")[0]
        head_dim = int(self._get("attention.key_length", hidden // heads))
        rotated = self._get("rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ConvertError(
                f"{self.file.path} rotates {rotated} of {head_dim} entries of a head, which a "
                f"{self.architecture} model cannot; convert the model's Hugging Face version"
            )
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
            "intermediate_size": int(self._get("feed_forward_length")),
            "max_position_embeddings": self.context_length,
            "num_attention_heads": heads,
            "num_hidden_layers": int(self._get("block_count")),
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": self.tokenizer.token_id("padding"),
            "rms_norm_eps": round(self._get("attention.layer_norm_rms_epsilon"), 12),
            "rope_scaling": self._rope_scaling(),
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
        return int(self._get("attention.head_count_kv", self._get("attention.head_count")))

    def dense_dtype(self, quantised: bool) -> mx.Dtype:
        """Where none is asked for: as the file's matrices; float16 if any has to be unpacked."""
        import mlx.core as mx

        kinds = {t.kind for t in self.tensors if len(t.shape) == 2}
        if quantised and kinds & KEPT_BITS.keys():
            return mx.float16
        names = {"F32": mx.float32, "BF16": mx.bfloat16}
        return names[kinds.pop()] if len(kinds) == 1 and kinds <= names.keys() else mx.float16

    def quantisation(self) -> dict[str, Any] | None:
        """The `quantization` block if blocks are kept; None where there are none to keep."""
        bits = {
            mlx_name(t.name.removesuffix(".weight")): KEPT_BITS[t.kind]
            for t in self.tensors
            if t.kind in KEPT_BITS
        }
        return quantisation_block(bits) if bits else None

    def converted(self, quantised: bool, dtype: mx.Dtype) -> Iterator[Converted]:
        """All tensors, one after the other; quantised=True keeps the blocks that MLX can."""
        import mlx.core as mx

        for tensor in self.tensors:
            base, _, part = tensor.name.rpartition(".")
            if quantised and tensor.kind in KEPT_BITS:
                weight, *scales = repack(tensor.kind, self.file.read(tensor))
                parts = {"weight": mx.array(weight)}
                for name, value in zip(("scales", "biases"), scales, strict=True):
                    parts[name] = mx.array(value).astype(dtype)
            else:
                parts = {part: self._dense(tensor, dtype)}
            heads = self.reordered_heads(tensor)
            if heads:
                parts = {name: unpermute(rows, heads) for name, rows in parts.items()}
            yield Converted(tensor.name, mlx_name(base), parts)

    def reordered_heads(self, tensor: GgufTensor) -> int:
        """How many heads llama.cpp has reordered in this tensor; 0 for all but llama's q and k."""
        if self.architecture != "llama":
            return 0
        base = tensor.name.rpartition(".")[0]
        if base.endswith(".attn_q"):
            return int(self._get("attention.head_count"))
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
                raise ConvertError(
                    f"{tensor.name} has values beyond {dtype}; run again with --dtype bfloat16"
                )
        whole = mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        return whole.reshape(tensor.shape)

    def _rope_scaling(self) -> dict[str, Any] | None:
        kind, factor = self._get("rope.scaling.type"), self._get("rope.scaling.factor")
        if ROPE_FACTORS in self.file.tensors:
            return self._llama3_scaling()
        if kind in (None, "none") or not factor or factor == 1.0:
            return None
        if kind == "linear":
            return {"type": "linear", "rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self._get("rope.scaling.original_context_length", self.context_length)
            scaling = {"type": "yarn", "rope_type": "yarn", "factor": factor}
            return {**scaling, "original_max_position_embeddings": original}
        raise ConvertError(f"{self.file.path} has the rope scaling {kind!r}; needed: linear, yarn")

    def _llama3_scaling(self) -> dict[str, Any]:
        """The parameters behind the factors of Llama 3.1, which the file stores computed."""
        tensor = self.file.tensors[ROPE_FACTORS]
        stored = dequantise(tensor.kind, self.file.read(tensor)).reshape(-1)
        factor = round(float(stored.max()), 6)
        low, high, original = _LLAMA3
        steps = np.arange(stored.size) / stored.size
        wavelengths = 2 * math.pi * float(self._get("rope.freq_base", 10000.0)) ** steps
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        if not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            raise ConvertError(
                f"{self.file.path} stretches its positions in a way that is not Llama 3's "
                f"({ROPE_FACTORS}); convert the model's Hugging Face version"
            )
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = dict(zip(names, _LLAMA3, strict=True))
        return {"rope_type": "llama3", "factor": factor, **scaling}

    def _shape(self, name: str) -> tuple[int, ...]:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise ConvertError(f"{self.file.path} lacks {name}; download it again")
        return tensor.shape

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
