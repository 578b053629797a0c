"""GGUF files as llama.cpp writes them: of any blocks, or of a tiny model of mlx-lm."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
from tiny_gguf import F32, I32, STRING, U32, metadata, pack_text, pack_value

from mlx_redrafter.convert.gguf import GgufPlan
from mlx_redrafter.convert.writer import output_folder
from mlx_redrafter.hub.gguf.blocks import BLOCKS

GOLDEN = np.load(Path(__file__).parent / "golden" / "gguf_blocks.npz")
SHORT = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(path, meta, tensors, version=3):
    """tensors: name -> (type, shape, bytes); a file as llama.cpp writes it."""
    infos, body = b"", b""
    for name, (kind, shape, data) in tensors.items():
        number = BLOCKS[kind].number if isinstance(kind, str) else kind
        infos += pack_text(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", number, len(body))
        body += data + b"\0" * (-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(meta))
    head += b"".join(pack_text(key) + pack_value(*value) for key, value in meta.items()) + infos
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def permute(rows, heads):
    """What llama.cpp's converter does to q and k of a llama, copied from its definition."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def gguf_of(path, folder, kind, **changed):
    """A model folder of mlx-lm as the GGUF that llama.cpp's converter makes of it."""
    config = json.loads((folder / "config.json").read_text())
    arch, heads = config["model_type"], config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    tensors = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        base, _, part = name.rpartition(".")
        if base.startswith("model.layers."):
            _, _, layer, rest = base.split(".", 3)
            short = f"blk.{layer}.{SHORT[rest]}"
        else:
            short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(
                base, "output"
            )
        rows = np.array(value.astype(mx.float32))
        if arch == "llama" and short.endswith(("attn_q", "attn_k")):
            rows = permute(rows, heads if short.endswith("attn_q") else kv_heads)
        stored = kind if rows.ndim == 2 else "F32"
        tensors[f"{short}.{part}"] = (stored, rows.shape, encode(rows, stored))
    special = config["vocab_size"] - 2
    words = [f"t{i}" for i in range(1, special - 1)]
    meta = metadata(
        **{
            "tokenizer.ggml.tokens": (STRING, ["t", "1", *words, "<a>", "<b>"]),
            "tokenizer.ggml.token_type": (I32, [1] * special + [3, 3]),
            "tokenizer.ggml.merges": (STRING, ["t 1"]),
        }
    )
    given = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }
    meta = {k: v for k, v in meta.items() if not k.startswith("llama.")}
    meta |= {f"{arch}.{key}": (U32, value) for key, value in given.items()}
    meta |= {
        "general.architecture": (STRING, arch),
        f"{arch}.attention.layer_norm_rms_epsilon": (F32, config["rms_norm_eps"]),
        f"{arch}.rope.freq_base": (F32, config["rope_theta"]),
    }
    for key, value in changed.items():
        if key in tensors or isinstance(value[0], str):
            tensors[key] = value
        else:
            meta[key] = value
    return write(path, meta, tensors)


def encode(values, kind):
    if kind == "F32":
        return values.astype("<f4").tobytes()
    if kind == "F16":
        return values.astype("<f2").tobytes()
    if kind == "BF16":
        return np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16)).tobytes()
    return random_blocks(kind, values.size)


def random_blocks(kind, elements):
    """Golden blocks over and over, their scales small: some finite numbers."""
    data = GOLDEN[f"{kind}.data"].reshape(-1, BLOCKS[kind].bytes)
    count = elements // BLOCKS[kind].elements
    return np.resize(data, (count, data.shape[1])).tobytes()


def run(path, out, **options):
    plan = GgufPlan(path, **options)
    with output_folder(out, path) as folder:
        plan.write(folder, lambda done, total: None)
    return plan.mappings()


def weights_of(folder):
    return mx.load(str(folder / "model.safetensors"))
