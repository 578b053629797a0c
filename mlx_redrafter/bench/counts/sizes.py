"""Bytes of weights and of the KV cache that a step reads, from shapes; nothing is allocated."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_redrafter.cache.layer import LayerCache
from mlx_redrafter.drafters.eagle import Eagle
from mlx_redrafter.drafters.medusa import Medusa
from mlx_redrafter.drafters.model import DraftModel
from mlx_redrafter.drafters.recurrent import ReDrafter
from mlx_redrafter.drafters.speculator import GATES, Speculator
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.weights import parameters
from mlx_redrafter.tree.shape import TreeShape


@dataclass(frozen=True)
class Read:
    """Bytes that a step reads: weights of the target and the drafter, keys and values of both."""

    target: int
    drafter: int
    kv: int


class Levels(NamedTuple):
    """Bytes of a drafter's weights: read once a step, at the first level, at each one after it; of
    the root, and of every other token that it consumes. ``most``: levels that it has."""

    once: int
    first: int
    later: int
    root: int = 0
    token: int = 0
    most: int | None = None

    def of(self, shape: TreeShape) -> int:
        """In a step of this shape."""
        depth = shape.depth if self.most is None else min(shape.depth, self.most)
        beams = shape.width * (depth - 1)
        levels = self.first + self.later * (depth - 1)
        return self.once + levels + self.root + beams * self.token if depth else 0


def read(
    target: Decoder, drafter: Any, shape: TreeShape, context: int, alike: bool = False
) -> Read:
    """What a step reads with so many tokens in the cache. drafter: of any kind, bound or not; None.

    A pass reads its weights once, whatever its number of rows (kernels for few rows may read them
    again for every five); of an embedding only the rows of the tokens count. alike: all nodes
    choose the same experts; else all choose others. The state of a recurrence is written too.
    """
    kv = sum(_kept(kind, context, target.dtype) for kind in target.caches)
    drafted = 0
    if drafter is not None and shape.depth:
        drafted = levels(drafter, target).of(shape)
        kept = [kind.empty(context, target.dtype) for kind in drafter.caches]
        kv += shape.depth * sum(array.nbytes for array in kept)
    return Read(_of_target(target, shape.nodes, alike), drafted, kv)


def _kept(kind: LayerCache, context: int, dtype: mx.Dtype) -> int:
    """What a pass moves of a cache that holds so many tokens."""
    kept = kind.empty(context, dtype)
    arrays = cast("list[tuple[str, mx.array]]", tree_flatten([kept]))
    size = sum(array.nbytes for _, array in arrays)
    return size if kind.capacity(kept) is not None else 2 * size


def levels(drafter: Any, target: Decoder) -> Levels:
    """What a drafter reads of its weights and of the target's. Of an unknown kind: all at every
    level, but for the rows of its embeddings."""
    known = (of for kind, of in _KINDS if isinstance(drafter, kind))
    return next(known, _of_any)(drafter, target)


def _sum(drafter: nn.Module, pattern: str) -> int:
    """Bytes of the parameters whose names match from their beginning on."""
    return sum(v.nbytes for name, v in parameters(drafter).items() if re.match(pattern, name))


def _of_target(target: Decoder, nodes: int, alike: bool = False) -> int:
    """Of experts as many as rows choose, all the same or all others; of tables only rows, but a
    tied one is read as the output head too."""
    total, experts = 0, target.config.experts
    for name, value in parameters(target).items():
        if ".switch_mlp." in name and experts is not None:
            read = min((1 if alike else nodes) * experts.chosen, experts.count)
            total += value.nbytes * read // experts.count
        elif name.startswith("model.layer_inputs.embedding."):
            total += nodes * value.nbytes // target.config.layer_input_vocab
        elif target.config.tied or not name.startswith("model.embed_tokens."):
            total += value.nbytes
    return total + nodes * _row(target)


def _table(target: Decoder) -> int:
    return sum(value.nbytes for value in parameters(target.model.embed_tokens).values())


def _row(target: Decoder) -> int:
    """Of the input embedding."""
    return _table(target) // target.config.vocab_size


def _head(target: Decoder, drafted: int | None) -> int:
    """The target's output rows as drafters read them: some are unpacked, all are as stored."""
    if drafted:
        return drafted * target.config.hidden_size * target.dtype.size
    if target.config.tied:
        return _table(target)
    return sum(value.nbytes for value in parameters(target.lm_head).values())


def _of_redrafter(drafter: ReDrafter, target: Decoder) -> Levels:
    """Context once, cell and head at every level, and what is read of every beam's token."""
    # The context's half of the projection, with the bias, is computed once per step.
    projection = _sum(drafter, r"input_proj\.")
    once = _sum(drafter, "context_") + projection - projection // 2
    level = _sum(drafter, "(?!draft_vocab|context_)") - (projection - projection // 2)
    token = _row(target)
    if drafter.has_gates:  # of all tokens but the root the cell's input is kept
        gates = _sum(drafter, r"rnn_w\.")
        once, level = once + gates, level - gates
        token = drafter.rnn_w.weight.shape[0] * target.dtype.size
    if drafter.config.head == "target":
        level += _head(target, drafter.config.output_size)
    return Levels(once, level, level, _row(target), token)


def _of_medusa(drafter: Medusa, target: Decoder) -> Levels:
    """A head at every level, and once the output rows that they share. No token is read."""
    config = drafter.config
    head = _sum(drafter, r"heads\.0\.")
    once = _head(target, config.draft_vocab_size) if config.head == "target" else 0
    return Levels(once + _sum(drafter, r"shared\."), head, head, most=config.heads)


def _of_speculator(drafter: Speculator, target: Decoder) -> Levels:
    """Its norms, its head and one of its projections at every level."""
    config = drafter.config
    table = _sum(drafter, rf"(?:(?:{'|'.join(GATES)})_)?emb\.0\.") // config.vocab_size
    level = _sum(drafter, r"(?:\w+_)?ln\.0\.|head\.0\.")
    # Joined or not: the gates' projections at the first level, and at the second.
    first, later = (
        _sum(drafter, rf"(?:\w+_)?proj\.{i}\.|gates\.{i}\.")
        for i in (0, min(1, config.trained - 1))
    )
    most = None if config.tied else config.trained
    return Levels(0, level + first, level + later, table, table, most)


def _of_eagle(drafter: Eagle, target: Decoder) -> Levels:
    """Its block and head at every level; once what the pairs of an accepted path are made with.
    The root's pair is one of those: the first level makes no keys and values."""
    config = drafter.config
    fc = _sum(drafter, "fc|input_norm")
    pairs = _sum(drafter, r"midlayer\.self_attn\.(?:k|v|kv)_(?:proj|norm)\.")
    level = _sum(drafter, r"midlayer\.|norm\.|lm_head\.")
    level += 0 if config.rows else _head(target, config.draft_vocab_size)
    level += 0 if config.features else fc  # EAGLE-1 makes pairs with it
    row = _row(target)
    if config.own_embedding:
        row = _sum(drafter, r"embed_tokens\.") // config.vocab_size
    return Levels(fc + pairs, level - pairs, level, row, row)


def _of_model(drafter: DraftModel, target: Decoder) -> Levels:
    """All of the small model at every level; what it catches up with is read by the first pass."""
    small = drafter.model
    level = _of_target(small, 0)
    return Levels(0, level, level, _row(small), _row(small))


def _of_any(drafter: nn.Module, target: Decoder) -> Levels:
    level = _sum(drafter, r"(?!draft_vocab|(?:.*\.)?\w*emb\w*\.)")
    return Levels(0, level, level, _row(target), _row(target))


_KINDS: tuple[tuple[type, Callable[[Any, Decoder], Levels]], ...] = (
    (ReDrafter, _of_redrafter),
    (Medusa, _of_medusa),
    (Speculator, _of_speculator),
    (Eagle, _of_eagle),
    (DraftModel, _of_model),
)
