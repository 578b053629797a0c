"""Reading a prompt in one pass, traced as on Metal: launches, and the bytes that they move."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx

from mlx_redrafter.bench.counts import metal
from mlx_redrafter.bench.counts.graph import graph, metal_shaped
from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.attention import causal
from mlx_redrafter.models.decoder import Functions

TOKENS = 2048


def count(target: Decoder, tokens: int = TOKENS, masked: bool = False) -> dict[str, Any]:
    """Of a pass over so many tokens into empty slabs. masked: with the mask that other layers
    than those of MLX's causal kernel read.

    Returns:
        dispatches, and those by kind; bytes of masks that attention reads, once a head.
    """
    with metal_shaped():
        capacity = capacity_for(tokens)
        caches = new_caches(target.caches, capacity, target.dtype)
        windows = target.config.layer_windows
        functions = Functions() if masked else Functions(causal(tokens, target.config))

        def read(start: mx.array, ids: mx.array, *kept: mx.array) -> list[mx.array]:
            at = mx.arange(tokens, dtype=mx.int32)
            slots = mx.arange(capacity, dtype=mx.int32)
            run = Pass(kept, start)
            seen = slots[None] <= at[:, None]
            hidden, _ = target(ids, at, seen, slots, run, (), functions)
            return [hidden[-1:], *run.caches]

        inputs = mx.array([0], mx.int32), mx.zeros((tokens,), mx.int32), *caches
        found: Counter[str] = metal.dispatches(graph(read, *inputs))
    layers = [target.config.layer(i) for i in range(target.config.num_layers)]
    heads = sum(
        layer.num_heads
        for layer, window in zip(layers, windows, strict=False)
        if layer.delta is None and (masked or window)
    )
    return {
        "tokens": tokens,
        "dispatches": found.total(),
        "by_kind": dict(found.most_common()),
        "mask_bytes": heads * tokens * capacity,
    }
