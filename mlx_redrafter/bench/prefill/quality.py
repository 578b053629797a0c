"""What every method keeps of a dense prefill's attention, layer by layer, and its time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.bench.prefill import controls
from mlx_redrafter.bench.prefill.recall import Sample, blocks_seen, kept, sample, seen
from mlx_redrafter.models import DecoderConfig
from mlx_redrafter.prefill.config import HeadPattern, Mode, SparsePrefill
from mlx_redrafter.prefill.selectors import Chunk, Selector
from mlx_redrafter.prefill.sparse import SELECTORS, SparseAttention, attend_densely

ROWS = 32  # of the sampled query block, of 128
ITSELF = "itself"
TAUS = (0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
WINDOWS = (512, 1024, 2048, 4096)
LINES = ((100, 800), (500, 700), (3500, 100), (1000, 6096))  # sizes of MInference's own search


@dataclass(frozen=True)
class Method:
    """A selector under a name; with ``controls`` also others that spend as many blocks."""

    name: str
    options: SparsePrefill
    controls: bool = False

    @property
    def select(self) -> Selector:
        return SELECTORS[self.options.mode](self.options)


def defaults(modes: Sequence[Mode], compared: bool) -> list[Method]:
    """The modes as they are without an option."""
    return [Method(mode, SparsePrefill(mode), compared) for mode in modes]


def sweep(modes: Sequence[Mode], heads: int, layers: int) -> list[Method]:
    """XAttention by tau, stride and layers, TriangleMix by its window, MInference by its lines."""
    found: list[Method] = []
    if "xattention" in modes:
        for start, where in ((0, ""), (layers // 2, ", upper half")):
            found += [
                Method(
                    f"xattention, tau {tau:g}{where}",
                    SparsePrefill("xattention", tau=tau, start_layer=start),
                )
                for tau in TAUS
            ]
            options = SparsePrefill("xattention", stride=8, start_layer=start)
            found.append(Method(f"xattention, stride 8{where}", options))
    if "trianglemix" in modes:
        found += [
            Method(f"trianglemix, local {n}", SparsePrefill("trianglemix", local=n))
            for n in WINDOWS
        ]
    if "minference" in modes:
        for vertical, slash in LINES:
            pattern = HeadPattern("vertical_and_slash", vertical, slash)
            patterns = (dict.fromkeys(range(heads), pattern),) * layers
            options = SparsePrefill("minference", patterns=patterns)
            found.append(Method(f"minference, {vertical}/{slash}", options))
    return found


@dataclass(frozen=True)
class Look:
    """One method at one sampled query block of one layer pass.

    recall and error: (H, R). looked and causal: pairs of the query block. ``pays``: the layer pass
    would not be read densely for scoring too many pairs, which ``scored`` counts.
    """

    method: str
    control: str
    layer: int
    recall: np.ndarray
    error: np.ndarray
    looked: int
    causal: int
    pays: bool


class Probe(SparseAttention):
    """Reads densely, every layer on the clock, and looks at what the methods would have kept.

    All of them see the same hidden states. One query block of a chunk is sampled, the next one in
    the next chunk; chunks before ``min_context`` are timed only. ``seconds`` are those of dense
    attention, ``looking`` those that reading densely would not have taken.
    """

    def __init__(
        self, config: DecoderConfig, methods: Sequence[Method], min_context: int, rows: int = ROWS
    ) -> None:
        super().__init__(SparsePrefill("a_shape", min_context=0), config)
        self.methods, self.min_context, self.rows = methods, min_context, rows
        self.seconds = self.looking = 0.0
        self.looks: list[Look] = []

    def attend(self, layer: int, chunk: Chunk, mask: mx.array) -> mx.array:
        """Dense attention, timed; what it read is looked at afterwards."""
        mx.eval(chunk.q, chunk.slab, mask)
        start = time.perf_counter()
        out = attend_densely(chunk, mask)
        mx.eval(out)
        done = time.perf_counter()
        self.seconds += done - start
        if chunk.offset >= self.min_context and not self.config.layer_windows[layer]:
            self._look(layer, chunk)
        self.looking += time.perf_counter() - done
        return out

    def _look(self, layer: int, chunk: Chunk) -> None:
        blocks = len(chunk.past_blocks)
        j = chunk.offset // chunk.q.shape[1] % blocks
        dense = sample(chunk, j, self.rows)
        mx.eval(dense.weights)
        for method in self.methods:
            if layer >= method.options.first_layer(self.config.num_layers):
                self.looks += look(method, layer, chunk, j, dense)


def look(method: Method, layer: int, chunk: Chunk, j: int, dense: Sample) -> list[Look]:
    """A method, and its controls if they are wanted, at query block j."""
    chosen = method.select(layer, chunk)
    pays = chosen.pairs(chunk) <= method.options.max_density * chunk.causal_pairs
    views = [(ITSELF, seen(chosen, chunk, j), controls.pairs(chosen, chunk, j))]
    if method.controls:
        count = controls.block_count(chosen, chunk, j)
        for name in controls.CONTROLS:
            ids = controls.control(name, dense, count, seed=1000 * layer + chunk.past_blocks[j])
            looked = chunk.heads * (count * chunk.block**2 + controls.own_pairs(chunk.block))
            views.append((name, blocks_seen(ids, chunk.past_blocks[j], chunk), looked))
    found = []
    for name, visible, looked in views:
        recall, error = kept(dense, visible)
        mx.eval(recall, error)
        found.append(
            Look(method.name, name, layer, np.array(recall), np.array(error), looked,
                 controls.causal_pairs(chunk, j), pays)
        )  # fmt: skip
    return found


def figures(looks: Iterable[Look]) -> dict[str, Any]:
    """Mean and 5th percentile of recall over all rows and heads, mean error, density."""
    looks = list(looks)
    if not looks:
        return {}
    recall = np.concatenate([one.recall.ravel() for one in looks])
    error = np.concatenate([one.error.ravel() for one in looks])
    return {
        "recall": round(float(recall.mean()), 4),
        "recall_p5": round(float(np.percentile(recall, 5)), 4),
        "error": round(float(error.mean()), 4),
        "density": round(sum(o.looked for o in looks) / sum(o.causal for o in looks), 4),
        "passes": len(looks),
        "sparse": sum(one.pays for one in looks),
    }


def rows(looks: Sequence[Look], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """The figures of every method over all its layers, and ``layers`` with those of each."""
    found = []
    for method in methods:
        mine = [one for one in looks if one.method == method.name]
        names = (ITSELF, *controls.CONTROLS) if method.controls else (ITSELF,)
        if mine:
            layers = sorted({one.layer for one in mine})
            found.append({
                "method": method.name,
                **_by_control(mine, names),
                "layers": [
                    {"layer": n, **_by_control([o for o in mine if o.layer == n], names)}
                    for n in layers
                ],
            })  # fmt: skip
    return found


def _by_control(looks: Sequence[Look], names: Sequence[str]) -> dict[str, Any]:
    own = figures(one for one in looks if one.control == ITSELF)
    others = {}
    for name in names:
        if name != ITSELF:
            found = figures(one for one in looks if one.control == name)
            others[name] = {k: found[k] for k in ("recall", "recall_p5", "error", "density")}
    return {**own, **others}
