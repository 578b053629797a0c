"""What llama.cpp did to the order and the values of a tensor, undone; packed rows are moved whole.

Source: modify_tensors in conversion/llama.py and conversion/qwen.py of
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_redrafter.hub.gguf.architectures import Architecture
from mlx_redrafter.hub.gguf.keys import Keys

if TYPE_CHECKING:
    import mlx.core as mx

Parts = dict[str, "mx.array"]


def reordered_heads(name: str, kind: Architecture, keys: Keys) -> int:
    """How many heads' rows lie in rotary order in a tensor; 0 for all but q and k of some."""
    base = name.rpartition(".")[0]
    if kind.permuted and base.endswith(".attn_q"):
        return keys.heads
    return keys.kv_heads if kind.permuted and base.endswith(".attn_k") else 0


def restored(name: str, parts: Parts, kind: Architecture, keys: Keys) -> Parts:
    """A tensor's parts, each with the tensor's rows, in the order of Hugging Face and mlx-lm."""
    if heads := reordered_heads(name, kind, keys):
        return {part: unpermute(rows, heads) for part, rows in parts.items()}
    if kind.recurrent:
        return {part: _of_recurrence(name, rows, keys) for part, rows in parts.items()}
    return parts


def unpermute(rows: mx.array, heads: int) -> mx.array:
    """(heads * Dh, ...) rows in llama.cpp's interleaved rotary order -> the half-split order.

    llama.cpp stores the two rotary partners of a head side by side; MLX and transformers keep
    all first partners, then all second ones (`permute` in conversion/llama.py).
    """
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _of_recurrence(name: str, value: mx.array, keys: Keys) -> mx.array:
    """Of a Gated DeltaNet: heads of values lie by their number within a head of keys."""
    import mlx.core as mx

    tensor = name.split(".", 2)[-1].removesuffix(".weight").removesuffix(".bias")
    heads, groups = keys.size("ssm.time_step_rank"), keys.size("ssm.group_count")
    each = (heads // groups, groups)
    if tensor == "ssm_a":
        value = mx.log(-value)
    if tensor in ("attn_gate", "ssm_alpha", "ssm_beta", "ssm_a", "ssm_dt"):
        return _grouped(value, each)
    if tensor == "ssm_out":  # columns, in packed words too
        return _grouped(value.T, each).T
    if tensor not in ("attn_qkv", "ssm_conv1d"):
        return value
    first = 2 * groups * keys.size("ssm.state_size")
    value = mx.concatenate([value[:first], _grouped(value[first:], each)])
    return value[..., None] if tensor == "ssm_conv1d" else value


def _grouped(rows: mx.array, each: tuple[int, int]) -> mx.array:
    """(R * G * n, ...) -> (G * R * n, ...), of G groups of R heads."""
    apart = rows.reshape(*each, -1, *rows.shape[1:])
    return apart.swapaxes(0, 1).reshape(rows.shape)
