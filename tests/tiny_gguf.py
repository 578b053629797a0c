"""A tiny SmolLM2-like GGUF file, and stand-ins for what fetches one."""

from __future__ import annotations

import shutil
import struct

import numpy as np
import pytest

from mlx_redrafter.errors import HubError
from mlx_redrafter.hub import builtin

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 2, 1, 32, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
FLOAT, Q4_1, Q8_0 = 0, 3, 8


def vocabulary():
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠĠ", "in"]
    return special, plain


def metadata(**changed):
    special, plain = vocabulary()
    given = {
        "general.architecture": (STRING, "llama"),
        "llama.block_count": (U32, LAYERS),
        "llama.context_length": (U32, 8192),
        "llama.embedding_length": (U32, HIDDEN),
        "llama.feed_forward_length": (U32, FFN),
        "llama.attention.head_count": (U32, HEADS),
        "llama.attention.head_count_kv": (U32, KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "llama.rope.freq_base": (F32, 100000.0),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (STRING, [*special, *plain]),
        "tokenizer.ggml.token_type": (I32, [3] * len(special) + [1] * len(plain)),
        "tokenizer.ggml.merges": (STRING, ["Ġ Ġ", "i n"]),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.padding_token_id": (U32, 2),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
        "tokenizer.ggml.add_bos_token": (BOOL, False),
        "tokenizer.chat_template": (STRING, TEMPLATE),
    }
    return {**given, **changed}


def pack_value(kind, value):
    if isinstance(value, list):
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        return head + b"".join(pack_value(kind, v)[4:] for v in value)
    if kind == STRING:
        return struct.pack("<I", kind) + pack_text(value)
    return struct.pack("<I" + {U32: "I", I32: "i", F32: "f", BOOL: "?"}[kind], kind, value)


def pack_text(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def pack_blocks(kind, values):
    """float32 (R, C) -> the bytes of the blocks, and the values they stand for."""
    blocks = values.reshape(-1, 32)
    if kind == FLOAT:
        return values.astype("<f4").tobytes(), values
    if kind == Q4_1:
        low = blocks.min(1, keepdims=True).astype(np.float16)
        scale = ((blocks.max(1, keepdims=True) - low) / 15).astype(np.float16)
        q = np.clip(np.rint((blocks - low) / scale), 0, 15).astype(np.uint8)
        data = np.concatenate(
            [scale.view(np.uint8), low.view(np.uint8), q[:, :16] | q[:, 16:] << 4], 1
        )
        real = q.astype(np.float32) * scale.astype(np.float32) + low.astype(np.float32)
    else:
        scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
        q = np.clip(np.rint(blocks / scale), -127, 127).astype(np.int8)
        data = np.concatenate([scale.view(np.uint8), q.view(np.uint8)], 1)
        real = q.astype(np.float32) * scale.astype(np.float32)
    return data.tobytes(), real.reshape(values.shape)


def write_gguf(path, meta=None, extra=()):
    """A tiny SmolLM2-like GGUF; returns the float32 values of its tensors by GGUF name."""
    random = np.random.default_rng(0)
    meta = metadata() if meta is None else meta
    shapes = {
        "token_embd": (Q8_0, sum(map(len, vocabulary())), HIDDEN),
        "output_norm": (FLOAT, HIDDEN),
    }
    for i in range(LAYERS):
        kv = KV_HEADS * HEAD_DIM
        shapes |= {
            f"blk.{i}.attn_norm": (FLOAT, HIDDEN),
            f"blk.{i}.ffn_norm": (FLOAT, HIDDEN),
            f"blk.{i}.attn_q": (Q4_1, HIDDEN, HIDDEN),
            f"blk.{i}.attn_k": (Q4_1, kv, HIDDEN),
            f"blk.{i}.attn_v": (Q4_1, kv, HIDDEN),
            f"blk.{i}.attn_output": (Q4_1, HIDDEN, HIDDEN),
            f"blk.{i}.ffn_gate": (Q4_1, FFN, HIDDEN),
            f"blk.{i}.ffn_up": (Q4_1, FFN, HIDDEN),
            f"blk.{i}.ffn_down": (Q4_1, HIDDEN, FFN),
        }
    shapes |= dict.fromkeys(extra, (FLOAT, HIDDEN))
    infos, body, real = b"", b"", {}
    for name, (kind, *shape) in shapes.items():
        data, real[name] = pack_blocks(kind, random.normal(0, 0.3, shape).astype(np.float32))
        infos += pack_text(f"{name}.weight") + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        infos += struct.pack("<IQ", kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(meta))
    head += b"".join(pack_text(key) + pack_value(*value) for key, value in meta.items()) + infos
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return real


def source(path, calls, work):
    """A stand-in for a download."""
    calls.append(work)
    shutil.copy(path, work / "model.gguf")
    return builtin.Original(work / "model.gguf", "test")


def left_over(cache):
    return [p.name for p in cache.iterdir() if not p.name.endswith(".lock")]


def failure(kind, *sources):
    with pytest.raises(HubError) as caught:
        builtin.ensure(kind, sources)
    assert "\n" not in str(caught.value)
    return str(caught.value)
