"""The built-in model's GGUF file in MLX layout: weights, configuration, tokenizer.

`mx.load` unpacks GGUF blocks natively (Q4_1 and Q8_0 become affine quantisation in groups of 32),
so this file only renames tensors, puts rotary rows back in order and rebuilds the tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_redrafter.errors import HubError

if TYPE_CHECKING:
    import mlx.core as mx

GROUP = 32

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
_CONTROL_TOKEN = 3


class Gguf:
    """A GGUF file of the llama family, unpacked lazily.

    Raises HubError for another architecture or another tokenizer: the file is then not the
    one this package converts.
    """

    def __init__(self, path: Path) -> None:
        import mlx.core as mx

        loaded: Any = mx.load(str(path), format="gguf", return_metadata=True)
        self.tensors: dict[str, mx.array] = loaded[0]
        self.metadata: dict[str, Any] = loaded[1]
        found = tuple(
            self.get(key)
            for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre")
        )
        if found != ("llama", "gpt2", "smollm"):
            raise HubError(
                f"{path.name} holds architecture, tokenizer and splitter {found}; only a SmolLM2 "
                "GGUF ('llama', 'gpt2', 'smollm') is converted."
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python value."""
        value = self.metadata.get(key, default)
        return value.tolist() if hasattr(value, "tolist") else value

    def config(self) -> dict[str, Any]:
        """`config.json` as transformers and mlx-lm write it for this model."""
        heads = self.get("llama.attention.head_count")
        hidden = self.get("llama.embedding_length")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": hidden**-0.5,
            "intermediate_size": self.get("llama.feed_forward_length"),
            "max_position_embeddings": self.get("llama.context_length"),
            "mlp_bias": False,
            "num_attention_heads": heads,
            "num_hidden_layers": self.get("llama.block_count"),
            "num_key_value_heads": self.get("llama.attention.head_count_kv", heads),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
            "rms_norm_eps": round(self.get("llama.attention.layer_norm_rms_epsilon"), 12),
            "rope_scaling": None,
            "rope_theta": self.get("llama.rope.freq_base"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "use_cache": True,
            "vocab_size": len(self.get("tokenizer.ggml.tokens")),
        }

    def weights(self, quantised: bool) -> tuple[dict[str, mx.array], dict[str, Any] | None]:
        """Tensors under MLX names, and the `quantization` block of `config.json`.

        quantised=True keeps the packed blocks with float16 scales (everything else float16 too);
        otherwise all is float32 and the block is None.
        """
        import mlx.core as mx

        out: dict[str, mx.array] = {}
        bits: dict[str, int] = {}
        for base in (key[: -len(".weight")] for key in self.tensors if key.endswith(".weight")):
            name = mlx_name(base)
            parts = {
                part: self._in_order(base, self.tensors[f"{base}.{part}"])
                for part in ("weight", "scales", "biases")
                if f"{base}.{part}" in self.tensors
            }
            if "scales" in parts:
                bits[name] = parts["weight"].shape[-1] // parts["scales"].shape[-1]
                if not quantised:
                    parts = {"weight": _dequantise(parts, bits[name])}
            for part, value in parts.items():
                if value.dtype != mx.uint32:
                    value = value.astype(mx.float16 if quantised else mx.float32)
                out[f"{name}.{part}"] = value
        return out, quantisation_block(bits) if quantised else None

    def _in_order(self, base: str, rows: mx.array) -> mx.array:
        if base.endswith(".attn_q"):
            return unpermute(rows, self.get("llama.attention.head_count"))
        if base.endswith(".attn_k"):
            return unpermute(rows, self.get("llama.attention.head_count_kv"))
        return rows

    def save_tokenizer(self, folder: Path) -> dict[str, Any]:
        """Write `tokenizer.json`; returns what belongs in `tokenizer_config.json`."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens: list[str] = self.get("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ", 1)) for pair in self.get("tokenizer.ggml.merges")]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self.get("tokenizer.ggml.token_type")
        special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in special]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        named = {
            f"{role}_token": tokens[self.get(f"tokenizer.ggml.{key}_token_id")]
            for role, key in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("pad", "padding"),
                ("unk", "unknown"),
            )
        }
        return {
            **named,
            "add_prefix_space": False,
            "chat_template": self.get("tokenizer.chat_template"),
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": special,
            "model_max_length": self.get("llama.context_length"),
            "tokenizer_class": "PreTrainedTokenizerFast",
        }


def mlx_name(base: str) -> str:
    """`blk.3.attn_q` -> `model.layers.3.self_attn.q_proj`. Raises HubError for unknown tensors."""
    parts = base.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _BLOCK_NAMES:
        return f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}"
    if base in _OUTER_NAMES:
        return _OUTER_NAMES[base]
    raise HubError(f"The GGUF file holds an unknown tensor {base!r}; only a SmolLM2 GGUF is read.")


def unpermute(rows: mx.array, heads: int) -> mx.array:
    """(heads * Dh, ...) rows in llama.cpp's interleaved rotary order -> the half-split order.

    llama.cpp stores the two rotary partners of a head side by side; MLX and transformers keep
    all first partners, then all second ones (`permute` in llama.cpp's convert_hf_to_gguf.py).
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def quantise(weights: dict[str, mx.array]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Full-precision tensors -> the same widths as in the GGUF file, and the block that says so.

    Matrices get 4 bits; the embedding, which is also the output head, gets 8. Rest: float16.
    """
    import mlx.core as mx

    out: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    for name, value in weights.items():
        value = value.astype(mx.float16)
        if value.ndim != 2:
            out[name] = value
            continue
        base = name[: -len(".weight")]
        bits[base] = 8 if base == "model.embed_tokens" else 4
        packed = mx.quantize(value, group_size=GROUP, bits=bits[base])
        for part, array in zip(("weight", "scales", "biases"), packed, strict=True):
            out[f"{base}.{part}"] = array
    return out, quantisation_block(bits)


def quantisation_block(bits: dict[str, int]) -> dict[str, Any]:
    """mlx-lm's `quantization` block: the lowest width is the default, others are listed."""
    default = min(bits.values())
    block: dict[str, Any] = {"group_size": GROUP, "bits": default}
    for name, width in bits.items():
        if width != default:
            block[name] = {"group_size": GROUP, "bits": width}
    return block


def _dequantise(parts: dict[str, mx.array], bits: int) -> mx.array:
    import mlx.core as mx

    return mx.dequantize(
        parts["weight"],
        parts["scales"].astype(mx.float32),
        parts["biases"].astype(mx.float32),
        group_size=GROUP,
        bits=bits,
    )
