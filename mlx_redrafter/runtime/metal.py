"""Which of MLX's kernels attention takes on Metal: by the rules of MLX, read and not asked.

`has_fused_kernel` and `use_fallback` of mlx/backend/metal/scaled_dot_product_attention.cpp at
846d176, which MLX 0.32.4 contains. Whoever has a Mac can ask: `mlx-redrafter doctor` does.
"""

from __future__ import annotations

VECTOR, FULL, UNFUSED = "vector", "full", "unfused"
FEW = 8  # queries of the vector kernel, at most
_LANES = 32  # queries times query heads per key head: what one of its threadgroups holds
_VECTOR_SIZES = (64, 96, 128, 256)
_FULL_SIZES = (64, 72, 80, 96, 128)
LONG = 1024  # queries from which an M5 has a causal kernel for a head size of 256


def attention_kernel(queries: int, heads: int, kv_heads: int, size: int) -> str:
    """`VECTOR` (up to 8 queries), `FULL`, or `UNFUSED`: products and a softmax, with all scores in
    memory. heads, kv_heads: of queries and of keys; size: of a head."""
    if queries > FEW:
        return FULL if size in _FULL_SIZES else UNFUSED
    fits = queries * heads // kv_heads <= _LANES
    return VECTOR if size in _VECTOR_SIZES and fits else UNFUSED


def attention_calls(queries: int, heads: int, kv_heads: int, size: int) -> list[int]:
    """How many queries to hand to one call of the fused kernels after the other, as even as they
    can be; empty where there is no kernel for them."""
    most = min(queries, _LANES * kv_heads // heads)
    if attention_kernel(queries, heads, kv_heads, size) != UNFUSED:
        return [queries]
    if queries > FEW or attention_kernel(most, heads, kv_heads, size) == UNFUSED or not most:
        return []
    calls = -(-queries // most)
    return [(queries + i) // calls for i in range(calls)]
