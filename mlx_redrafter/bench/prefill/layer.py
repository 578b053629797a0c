"""One attention layer far into a long prompt: sparse, selection included, against dense."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_redrafter.bench.prefill.whole import STEP, read_once
from mlx_redrafter.models import DecoderConfig, Target
from mlx_redrafter.models.attention import attend
from mlx_redrafter.prefill.config import Mode, SparsePrefill
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Selection
from mlx_redrafter.prefill.sparse import SELECTORS, SparseAttention, attend_densely, attend_to

PROGRAM, FUSED = "dense, own", "dense, mx.fast"
Seconds = tuple[float, float]  # of selection, and of all


class Capture(SparseAttention):
    """Reads densely and keeps the queries and the slab of one layer's last chunk."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__(SparsePrefill("a_shape", min_context=0), config)
        self.layer = layer
        self.chunk: Chunk | None = None

    def attend(self, layer: int, chunk: Chunk, mask: mx.array) -> mx.array:
        """Dense attention of every layer."""
        if layer == self.layer:
            copied = chunk.slab + 0  # another name for it would make the next chunk copy it
            mx.eval(chunk.q, copied)
            self.chunk = replace(chunk, slab=copied)
        return attend_densely(chunk, mask)


def real_chunk(target: Target, prompt: Sequence[int], layer: int, prefix: int) -> Chunk:
    """The last pass of a layer over a prompt, its keys and values repeated up to ``prefix`` tokens.

    Positions repeat with them, so that it is fit for timing and says nothing about quality.
    """
    capture = Capture(target.config, layer)
    read_once(target, prompt, capture)
    chunk = capture.chunk
    assert chunk is not None, "the layer was read"
    length = len(prompt) - 1
    slab = mx.tile(chunk.slab[:, :, :length], (1, 1, -(-prefix // length), 1))[:, :, -prefix:]
    mx.eval(slab)
    n = chunk.q.shape[1]
    return Chunk(chunk.q, slab, prefix - n, chunk.block, chunk.scale, chunk.softcap)


@dataclass(frozen=True)
class Measured:
    """Seconds of every round, of selection and of all, and the share of the pairs scored."""

    way: str
    selection: list[float]
    seconds: list[float]
    density: float


def measure(
    chunk: Chunk,
    ways: Mapping[str, SparsePrefill],
    layer: int,
    rounds: int,
    done: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Both dense paths and every way in turns, after each has run once."""
    pairs = {
        name: SELECTORS[options.mode](options)(layer, chunk).pairs(chunk)
        for name, options in ways.items()
    }
    runs: dict[str, Callable[[], Seconds]] = {
        PROGRAM: lambda: _program(chunk),
        FUSED: lambda: _fused(chunk),
        **{name: _sparse(chunk, options, layer) for name, options in ways.items()},
    }
    found: dict[str, list[Seconds]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = runs[name]()
            if turn:  # the first is for compiling
                found[name].append(seconds)
        done()
    return [
        Measured(name, [s for s, _ in times], [t for _, t in times],
                 pairs.get(name, chunk.causal_pairs) / chunk.causal_pairs)
        for name, times in found.items()
    ]  # fmt: skip


def rows(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Medians, spread, ratios to both dense paths within a round, and the ratio of scored pairs."""
    by_name = {one.way: one for one in found}
    shown = []
    for one in found:
        ratios = {
            key: [a / b for a, b in zip(by_name[name].seconds, one.seconds, strict=True)]
            for key, name in (("times_own", PROGRAM), ("times_fused", FUSED))
        }
        shown.append({
            "way": one.way,
            "milliseconds": round(1e3 * statistics.median(one.seconds), 2),
            "lowest": round(1e3 * min(one.seconds), 2),
            "highest": round(1e3 * max(one.seconds), 2),
            "selection_milliseconds": round(1e3 * statistics.median(one.selection), 2),
            "density": round(one.density, 4),
            "times_pairs": round(1 / one.density, 3),
            **{key: round(statistics.median(values), 3) for key, values in ratios.items()},
            "rounds": len(one.seconds),
        })  # fmt: skip
    return shown


def _program(chunk: Chunk) -> Seconds:
    """As `prefill.reading` reads densely: a mask over the slots."""
    filled = mx.arange(chunk.length, dtype=mx.int32)
    mask = filled <= mx.arange(chunk.offset, chunk.length)[:, None]
    mx.eval(mask)
    start = time.perf_counter()
    mx.eval(attend(chunk.q, chunk.slab, mask, chunk.scale, chunk.softcap))
    return 0.0, time.perf_counter() - start


def _fused(chunk: Chunk) -> Seconds:
    """MLX's own attention (on a CPU a composition of operations); without a soft cap."""
    half = chunk.kv_heads
    start = time.perf_counter()
    mx.eval(
        mx.fast.scaled_dot_product_attention(
            chunk.q[None], chunk.slab[:, :half], chunk.slab[:, half:], scale=chunk.scale,
            mask="causal",
        )
    )  # fmt: skip
    return 0.0, time.perf_counter() - start


def _sparse(chunk: Chunk, options: SparsePrefill, layer: int) -> Callable[[], Seconds]:
    select = SELECTORS[options.mode](options)

    def run() -> Seconds:
        start = time.perf_counter()
        chosen: Selection = select(layer, chunk)
        mx.eval(*(chosen.ids if isinstance(chosen, Blocks) else chosen.seen))
        selected = time.perf_counter()
        mx.eval(attend_to(chosen, chunk))
        return selected - start, time.perf_counter() - start

    return run


def ways(modes: Sequence[Mode]) -> dict[str, SparsePrefill]:
    """The modes as they are, and XAttention with no more blocks than pay."""
    found = {str(mode): SparsePrefill(mode) for mode in modes}
    if "xattention" in modes:
        found["xattention, capped"] = SparsePrefill("xattention", over="cap")
    return found


def captured_tokens(context: int) -> int:
    """How many tokens are read for their queries and keys."""
    return min(4096, context) // STEP * STEP
