"""Offline search of MInference's pattern for every query head (arXiv 2407.02490, Algorithm 1).

Candidates are the paper's (its appendix C.2): A-shape, four splits of vertical-slash, block-sparse.
As there each is scaled until all cost the same, and the one whose output is nearest to dense
attention is taken. The cost is counted in the keys that our consumer gathers, per head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_redrafter.errors import ModelError
from mlx_redrafter.models import DecoderConfig
from mlx_redrafter.prefill import minference
from mlx_redrafter.prefill.config import HeadPattern, Patterns, SparsePrefill
from mlx_redrafter.prefill.selectors import Chunk, Selection
from mlx_redrafter.prefill.xattention import everything

CANDIDATES = (  # in the order of what finding their place costs: of equals the first is taken
    HeadPattern("stream_llm", 1024, 4096),
    HeadPattern("vertical_and_slash", 30, 2048),
    HeadPattern("vertical_and_slash", 100, 1800),
    HeadPattern("vertical_and_slash", 500, 1500),
    HeadPattern("vertical_and_slash", 3000, 200),
    HeadPattern("block_sparse", 100, 1),
)
SIZES = tuple(2.0 ** (i / 2) for i in range(-6, 4))  # times the size that the target suggests
_KEYS = 5120  # of a query in the paper: 1024 global and 4096 local
_EQUAL = 1e-3  # of the output: errors that near are the same
_ROWS = 8  # queries of a block that are compared with dense attention


@dataclass(frozen=True)
class Found:
    """A head's pattern and the candidate it is a size of (-1: none): recall of attention mass,
    relative error of the output, density."""

    pattern: HeadPattern
    candidate: int = -1
    recall: float = 1.0
    error: float = 0.0
    density: float = 0.0


@dataclass
class Search:
    """Measures every candidate on what passes by; a selector that then asks for dense attention.

    Args:
        config: of the target.
        options: sink, local window and block of the sparse prefill that is to use the patterns.
        density: share of the pairs of dense attention that a head may score.
        keys: keys before a query, on average: what the candidates are scaled to at first.
    """

    config: DecoderConfig
    options: SparsePrefill
    density: float
    keys: float
    _sums: dict[int, np.ndarray] = field(default_factory=dict)
    _chunks: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        suggested = self.density * self.keys / _KEYS
        self.sizes = [[scaled(c, suggested * size) for size in SIZES] for c in CANDIDATES]

    def __call__(self, layer: int, chunk: Chunk) -> Selection:
        """Measure, and look at everything."""
        dense = Dense.of(chunk)
        ranks = minference.ranks(chunk, self.options.last_queries)
        found = [
            [self._measure(pattern, chunk, ranks, dense) for pattern in family]
            for family in self.sizes
        ]
        values = np.array(mx.stack([mx.stack(family) for family in found]))  # (F, S, 3, H)
        self._sums[layer] = self._sums.get(layer, 0.0) + values
        self._chunks[layer] = self._chunks.get(layer, 0) + 1
        return everything(chunk)

    def _measure(
        self, pattern: HeadPattern, chunk: Chunk, ranks: tuple[mx.array, mx.array], dense: Dense
    ) -> mx.array:
        """Recall, error and density of one pattern for all heads: (3, H)."""
        patterns = [pattern] * chunk.heads
        columns, distances = minference.lines_of(ranks, patterns)
        blocks = minference.top_blocks(chunk, patterns)
        seen = list(minference.keys_seen(chunk, columns, distances, blocks, self.options))
        keys = mx.stack([row.astype(mx.int32).sum(axis=1) for row in seen]).sum(axis=0)
        pairs = keys.astype(mx.float32) * chunk.block + chunk.own_pairs / chunk.heads
        recall, error = dense.compare(seen)
        return mx.stack([recall, error, pairs / (chunk.causal_pairs / chunk.heads)])

    def results(self) -> list[dict[int, Found]]:
        """By layer and head. A layer with a sliding window, or none measured, has its window."""
        return [
            {head: self._best(layer, head) for head in range(self.config.num_heads)}
            for layer in range(self.config.num_layers)
        ]

    def _best(self, layer: int, head: int) -> Found:
        if layer not in self._sums:
            return Found(HeadPattern("stream_llm", 0, self.config.layer_windows[layer]))
        fitting = self.fitting(layer, head)
        least = min(found.error for found in fitting)
        if not math.isfinite(least):
            raise ModelError(
                f"layer {layer} has no finite attention: the model's weights are damaged, or its "
                "config.json is another model's"
            )
        return next(found for found in fitting if found.error <= least + _EQUAL)

    def fitting(self, layer: int, head: int) -> list[Found]:
        """Of every candidate the largest size that the density allows; of none the cheapest."""
        means = self._sums[layer][:, :, :, head] / self._chunks[layer]  # (F, S, 3)
        found = [
            [Found(p, i, *row) for p, row in zip(self.sizes[i], rows, strict=True)]
            for i, rows in enumerate(means.tolist())
        ]
        fit = [[f for f in family if f.density <= self.density] for family in found]
        largest = [max(family, key=lambda f: f.density) for family in fit if family]
        return largest or [min((f for family in found for f in family), key=lambda f: f.density)]


@dataclass(frozen=True)
class Dense:
    """Some rows of each query block of a chunk, attending to everything."""

    chunk: Chunk
    mass: list[mx.array]  # per query block (H, R, its end) float32
    out: list[mx.array]  # (H, R, Dh)

    @classmethod
    def of(cls, chunk: Chunk) -> Dense:
        step = max(1, chunk.block // _ROWS)
        mass = []
        for j, number in enumerate(chunk.past_blocks):
            rows = mx.arange(step - 1, chunk.block, step) + j * chunk.block
            mass.append(minference.probabilities(chunk, rows)[..., : (number + 1) * chunk.block])
        dense = cls(chunk, mass, [_output(chunk, part) for part in mass])
        mx.eval(dense.mass, dense.out)
        return dense

    def compare(self, seen: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """Means over the rows: share of the mass that is seen, relative error of the output.

        seen: for every query block (H, past) bool; the own block is seen too. Two (H,).
        """
        recalls, errors = [], []
        for keys, mass, out in zip(seen, self.mass, self.out, strict=True):
            own = mx.ones((len(keys), self.chunk.block), mx.bool_)
            kept = mx.where(mx.concatenate([keys, own], axis=1)[:, None], mass, 0.0)
            recall = kept.sum(axis=-1)
            sparse = _output(self.chunk, kept) / recall[..., None]
            errors.append(mx.linalg.norm(sparse - out, axis=-1) / mx.linalg.norm(out, axis=-1))
            recalls.append(recall)
        return mx.stack(recalls).mean(axis=(0, 2)), mx.stack(errors).mean(axis=(0, 2))


def _output(chunk: Chunk, mass: mx.array) -> mx.array:
    """mass (H, R, K) of the first K keys -> (H, R, Dh)."""
    heads, rows, keys = mass.shape
    values = chunk.slab[0, chunk.kv_heads :, :keys].astype(mx.float32)
    return (mass.reshape(chunk.kv_heads, -1, keys) @ values).reshape(heads, rows, -1)


def scaled(pattern: HeadPattern, size: float) -> HeadPattern:
    """A pattern of another size; what vertical_and_slash has at least is in its numbers."""
    vertical, slash = max(1, round(size * pattern.vertical)), max(1, round(size * pattern.slash))
    if pattern.kind == "vertical_and_slash":
        return HeadPattern(pattern.kind, max(30, vertical), max(50, slash))
    if pattern.kind == "block_sparse":
        return HeadPattern(pattern.kind, min(100, vertical), 1)
    return HeadPattern(pattern.kind, vertical, slash)


def split(results: Sequence[dict[int, Found]]) -> tuple[Patterns, list[dict[int, float]]]:
    """Patterns and scores as `config.write_patterns` takes them; a score is the recall."""
    patterns = tuple({head: f.pattern for head, f in layer.items()} for layer in results)
    return patterns, [{h: round(f.recall, 4) for h, f in layer.items()} for layer in results]
