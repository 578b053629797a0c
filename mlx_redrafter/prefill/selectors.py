"""What a selector gets and gives, and the static ones: A-shape, tri-shape, TriangleMix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.consumer import padded_together


@dataclass(frozen=True)
class Chunk:
    """n queries of one layer at positions offset..offset+n-1 and the slab with their keys.

    q (H, n, Dh), slab (1, 2*Hkv, C, Dh); n, offset and C are multiples of ``block``.
    """

    q: mx.array
    slab: mx.array
    offset: int
    block: int
    scale: float
    softcap: float = 0.0

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.slab.shape[1] // 2

    @property
    def length(self) -> int:
        """Keys so far, the chunk's own included."""
        return self.offset + self.q.shape[1]

    @property
    def keys(self) -> mx.array:
        """(Hkv, offset + n, Dh)."""
        return self.slab[0, : self.kv_heads, : self.length]

    @property
    def past_blocks(self) -> range:
        """For every query block the number of key blocks before it, which is its own number."""
        return range(self.offset // self.block, self.length // self.block)

    @property
    def causal_pairs(self) -> int:
        """Pairs of a query and a key that dense attention has to score, over all heads."""
        n = self.q.shape[1]
        return self.heads * (n * self.offset + n * (n + 1) // 2)

    @property
    def own_pairs(self) -> int:
        """Of these, the ones within the query blocks themselves."""
        return self.heads * len(self.past_blocks) * self.block * (self.block + 1) // 2


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of keys: for every query block (Hkv, B_j) int32, none twice, all before it."""

    ids: Sequence[mx.array]

    def pairs(self, chunk: Chunk) -> int:
        """Pairs that the consumer scores, future ones of the own block not counted."""
        past = sum(ids.shape[1] for ids in self.ids) * chunk.block**2
        return chunk.heads * past + chunk.own_pairs


@dataclass(frozen=True)
class Columns:
    """Single keys per query head: for query block j (H, offset + j*block) bool, and how many."""

    seen: Sequence[mx.array]
    counts: Sequence[Sequence[int]]

    def pairs(self, chunk: Chunk) -> int:
        """Pairs that the consumer scores, padding included."""
        columns = sum(
            len(heads) * max(counts[head] for head in heads)
            for counts in self.counts
            for heads in padded_together(counts)
        )
        return columns * chunk.block + chunk.own_pairs


Selection = Blocks | Columns
Selector = Callable[[int, Chunk], Selection]
"""(layer, chunk) -> the keys before each query block that it looks at."""


def always(past: int, sink: int, local: int) -> list[int]:
    """Numbers of the key blocks, of ``past``, that every method keeps: the first, the last."""
    return sorted({*range(min(sink, past)), *range(max(0, past - local), past)})


def a_shape(options: SparsePrefill) -> Selector:
    """Sink and local window, the same for every head and layer (StreamingLLM's mask).

    TriangleMix (arXiv 2507.21526) keeps the lower layers dense and the last tokens of the prompt;
    tri-shape (SCBench, arXiv 2412.10319) keeps the last tokens only. Both are that selector: the
    rest is decided by who calls it.
    """

    def select(layer: int, chunk: Chunk) -> Selection:
        return Blocks([
            mx.broadcast_to(mx.array(kept, mx.int32)[None], (chunk.kv_heads, len(kept)))
            for past in chunk.past_blocks
            for kept in [always(past, options.sink_blocks, options.local_blocks)]
        ])  # fmt: skip

    return select
