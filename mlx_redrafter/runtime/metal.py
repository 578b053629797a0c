"""What MLX does on Metal with what it is given: by its rules, read in its sources and not asked.

`has_fused_kernel` and `use_fallback` of mlx/backend/metal/scaled_dot_product_attention.cpp, and
`needs_commit` of metal/device.cpp, at 846d176. Whoever has a Mac can ask: `mlx-redrafter doctor`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from mlx_redrafter.runtime.paths import cache_dir, write_whole

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


QMV, WIDE, TILE = "qmv", "qmv_wide", "tile"
_SMALL, _MIDDLE = 2048, 4096  # inputs and outputs of a matrix, up to which there is a limit
# Rows from which a product is one of matrices: up to 2048, up to 4096, larger.
_LIMITS = {"17": (33, 25, 13), "15": (13, 15, 13), "13": (14, 10, 6), "ultra": (32, 18, 12)}


def product_kernel(
    rows: int, inputs: int, outputs: int, generation: int, ultra: bool = False
) -> str:
    """Of an affine quantised matrix: `QMV` (the weights are read once a row), `WIDE` (once for
    every five rows), or `TILE`. generation: 13 is M1, 14 M2, 15 M3, 16 M4, 17 M5."""
    known = next(str(least) for least in (17, 15, 13) if generation >= least or least == 13)
    largest = max(inputs, outputs)
    limits = _LIMITS["ultra" if ultra else known]
    if rows >= limits[(largest > _SMALL) + (largest > _MIDDLE)]:
        return TILE
    return WIDE if rows > 1 and generation >= 15 else QMV


BUFFERS = 14  # command buffers of a step from which its slabs are surely written in place
LAUNCHES = 12  # of a plain step, by layer of a dense model; others have more
OPS = "MLX_MAX_OPS_PER_BUFFER"
VARIABLE, OWN, MLX = "MLX_REDRAFTER_BUFFERS", "own", "mlx"  # whose limit: ours or MLX's
USUAL_OPS, _MOST, _LEAST = 40, 50, 8  # launches in a buffer: MLX's limits, and our least
_HEAVY = 3 * 2**30  # bytes of weights that fill so many buffers by themselves


def ops_per_buffer(layers: int, weights: int) -> int | None:
    """How many launches to a command buffer a model of so many layers and bytes of weights should
    have; None: MLX's own limit does.

    MLX holds what a command buffer reads until it is done, and encodes up to ten ahead of the one
    that runs. A step of no more than ten would find the slabs that it is to write into held by
    the step before, and MLX would copy them all, every time (docs/metal.md).
    """
    fitting = layers * LAUNCHES // BUFFERS
    if weights >= _HEAVY or fitting >= _MOST:
        return None
    return max(min(fitting, USUAL_OPS), _LEAST)


def limit() -> str:
    """Whose limit holds, in a few words."""
    if (given := os.environ.get(OPS)) is None:
        return "MLX's own"
    return f"{given} launches"


def prepare(folder: Path) -> None:
    """Set MLX's limit for a model, where neither the user nor what was measured (`keep`) says
    otherwise. MLX reads it when the GPU is first used: to be called before the model is loaded, and
    for the first model of a process alone."""
    if sys.platform != "darwin" or OPS in os.environ:
        return
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError):
        if (os.environ.get(VARIABLE) or _kept().get(str(folder.resolve()))) == MLX:
            return
        raw = json.loads((folder / "config.json").read_text())
        layers = int(raw.get("num_hidden_layers") or raw["text_config"]["num_hidden_layers"])
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if ops := ops_per_buffer(layers, weights):
            os.environ[OPS] = str(ops)


def keep(folder: Path, choice: str) -> None:
    """Remember whose limit is the better for a model on this machine: `OWN` or `MLX`."""
    known = {**_kept(), str(folder.resolve()): choice}
    with contextlib.suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_file(), json.dumps(known))


def _file() -> Path:
    return cache_dir() / "buffers.json"


def _kept() -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(_file().read_text())
        return known if isinstance(known, dict) else {}
    return {}
