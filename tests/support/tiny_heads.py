"""Published heads in miniature: folders, and what a drafter says over given tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from conftest import D, V

from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import Ask, Cell
from mlx_redrafter.drafters.levels import LevelDrafter
from mlx_redrafter.models.features import Features
from mlx_redrafter.tree.nodes import Candidates
from mlx_redrafter.tree.shape import TreeShape

Weights = dict[str, np.ndarray]
SHAPES = [TreeShape.chain(4), TreeShape(3, 4, 8), TreeShape(4, 5, 16), TreeShape(3, 3, 9, lookup=4)]
IDS = np.sort(np.random.default_rng(2).permutation(V)[:60]).astype(np.int64)
HIDDEN = np.random.default_rng(8).standard_normal(D).astype(np.float32)
PARAMS = {"greedy": SamplingParams(), "sampled": SamplingParams(temp=0.8, seed=5)}


def noise(rng: np.random.Generator, *shape: int, scale: float = 1.5) -> np.ndarray:
    return (rng.standard_normal(shape) * scale / math.sqrt(shape[-1])).astype(np.float32)


def write(
    folder: Path, config: Mapping[str, Any], weights: Weights, name: str = "model.safetensors"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / name), {key: mx.array(w) for key, w in weights.items()})
    return folder


def fitted(rows: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """An output matrix (V, width) that says these tokens of rows (tokens, width)."""
    wanted = np.zeros((len(tokens), V))
    wanted[np.arange(len(tokens)), tokens] = 100.0
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T.astype(np.float32)


def quantise(weights: Weights, bits: int, only: Sequence[str]) -> tuple[Weights, Weights]:
    """Packed weights, and what they stand for. ``only``: what the packed names contain."""
    stored, meant = dict(weights), dict(weights)
    for name, value in weights.items():
        if name.endswith(".weight") and value.ndim == 2 and any(part in name for part in only):
            base = name.removesuffix(".weight")
            w, scales, biases = mx.quantize(mx.array(value), 32, bits)
            stored |= {name: np.array(w), f"{base}.scales": np.array(scales)}
            stored[f"{base}.biases"] = np.array(biases)
            meant[name] = np.array(mx.dequantize(w, scales, biases, 32, bits))
    return stored, meant


def said(drafter: LevelDrafter, hidden: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Logits of every level over true tokens, the root first: (levels, Vd)."""
    return followed(drafter.searched(len(tokens)), mx.array(hidden), tokens)


def followed(cell: Cell, context: mx.array, tokens: Sequence[int]) -> np.ndarray:
    """Logits of a cell over true tokens, the root first: (levels, Vd)."""
    state, fixed = cell.start(context)
    rows = []
    for token in tokens:
        logits, state = cell.step(mx.array([token], mx.int32), state, fixed)
        rows.append(np.array(logits.astype(mx.float32))[0])
    return np.stack(rows)


def drafted(drafter: LevelDrafter, hidden: np.ndarray, root: int, depth: int) -> list[int]:
    """The tokens of a greedy chain behind the root."""
    state = drafter.begin(Features(mx.array(hidden)[None]))
    shape = TreeShape.chain(depth)
    ask = Ask(mx.array([root], mx.int32), mx.array([7], mx.int32), None, shape, None)
    (found,) = drafter.propose(state, ask)
    return np.array(found.paths)[0, 1 : depth + 1].tolist()


def paths(levels: Sequence[Candidates]) -> list[tuple[list[int], float]]:
    """The drafted tokens of all candidates, and their costs."""
    found = []
    for part in levels:
        rows = zip(part.paths.tolist(), part.costs.tolist(), part.depths, strict=True)  # type: ignore[arg-type]
        found += [(path[1 : depth + 1], cost) for path, cost, depth in rows if depth]
    return found
