"""Sparse attention during one prefill: a layer attends to what a selector chose, or densely."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from mlx_redrafter.cache.packed import Seen, plain
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import DecoderConfig
from mlx_redrafter.models.attention import Attend, attend
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.consumer import block_sparse_attention, column_sparse_attention
from mlx_redrafter.prefill.minference import minference
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Selection, Selector, a_shape
from mlx_redrafter.prefill.xattention import xattention
from mlx_redrafter.stats import PrefillStats

SELECTORS: dict[str, Callable[[SparsePrefill], Selector]] = {
    "a_shape": a_shape,
    "tri_shape": a_shape,
    "trianglemix": a_shape,
    "xattention": xattention,
    "minference": minference,
}


class SparseAttention:
    """What a prefill hands to the target instead of dense attention; it keeps the statistics.

    Args:
        options: their mode is not ``off``.
        config: of the target.
        stats: where layers, pairs and reasons are counted.
        selector: another than the mode's own (measurements).

    Raises:
        OptionError: patterns of another model.
    """

    def __init__(
        self,
        options: SparsePrefill,
        config: DecoderConfig,
        stats: PrefillStats | None = None,
        selector: Selector | None = None,
    ) -> None:
        options.check_model(config.num_layers, config.num_heads)
        self.options, self.config = options, config
        self.stats = stats if stats is not None else PrefillStats(options.mode)
        self.select = selector or SELECTORS[options.mode](options)
        self._before = self.stats.sparse_layers
        self.unable = config.own_attention

    def at(self, offset: int) -> Callable[[int], Attend]:
        """The attention of a chunk's layers; its first token is at position ``offset``."""
        return lambda layer: self._layer(layer, offset)

    def _layer(self, layer: int, offset: int) -> Attend:
        def attend_sparsely(
            q: mx.array, slab: Seen, mask: mx.array, scale: float, softcap: float
        ) -> mx.array:
            chunk = Chunk(q, plain(slab), offset, self.options.block, scale, softcap)
            return self.attend(layer, chunk, mask)

        return attend_sparsely

    def attend(self, layer: int, chunk: Chunk, mask: mx.array) -> mx.array:
        """A layer's attention to a chunk: (n, H*Dh)."""
        chosen = self.choose(layer, chunk)
        if isinstance(chosen, str):
            self.stats.dense(chosen, chunk.causal_pairs)
            return attend_densely(chunk, mask)
        self.stats.sparse(chosen.pairs(chunk), chunk.causal_pairs)
        return attend_to(chosen, chunk)

    def count(self, start: int, stop: int, dense: str) -> None:
        """A chunk is read; ``dense`` says why no layer was asked."""
        self.stats.chunks += 1
        if dense:
            n, config = stop - start, self.config
            pairs = config.num_heads * (n * start + n * (n + 1) // 2)
            self.stats.dense(dense, pairs, config.num_layers)
        elif self.stats.sparse_layers > self._before:
            self.stats.sparse_chunks += 1
        self._before = self.stats.sparse_layers

    def choose(self, layer: int, chunk: Chunk) -> Selection | str:
        """The keys that a layer looks at, or the reason for which it reads densely."""
        if self.config.layer_windows[layer]:
            return "sliding window"
        if layer < self.options.first_layer(self.config.num_layers):
            return "lower layer"
        if any(n % chunk.block for n in (chunk.offset, chunk.q.shape[1], chunk.slab.shape[2])):
            return "not whole blocks"
        chosen = self.select(layer, chunk)
        if chosen.pairs(chunk) > self.options.max_density * chunk.causal_pairs:
            return "too many keys"
        return chosen


def check_able(config: DecoderConfig) -> None:
    """Refuse to measure what a model does not do; raises OptionError."""
    if reason := config.not_attention:
        raise OptionError(
            f"model_type '{config.model_type}' has {reason}: reading its prompts sparsely is not "
            "measured; measure a model without"
        )


def attend_densely(chunk: Chunk, mask: mx.array) -> mx.array:
    """A chunk's attention to all that its mask shows: (n, H*Dh)."""
    return attend(chunk.q, chunk.slab, mask, chunk.scale, chunk.softcap)


def attend_to(chosen: Selection, chunk: Chunk) -> mx.array:
    """A chunk's attention to what was chosen: (n, H*Dh)."""
    if isinstance(chosen, Blocks):
        return block_sparse_attention(
            chunk.q, chunk.slab, chosen.ids, chunk.offset, block=chunk.block,
            scale=chunk.scale, softcap=chunk.softcap,
        )  # fmt: skip
    return column_sparse_attention(
        chunk.q, chunk.slab, chosen.seen, chosen.counts, chunk.offset, block=chunk.block,
        scale=chunk.scale, softcap=chunk.softcap,
    )  # fmt: skip
