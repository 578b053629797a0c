"""What a block drafter says behind a text, asked as the decode step asks; and its caches' rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import engine_of, run
from tiny_heads import followed

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.drafters import Ask, Draw
from mlx_redrafter.drafters.block import Block, Places
from mlx_redrafter.drafters.levels import Levels
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.tree.nodes import Candidates
from mlx_redrafter.tree.shape import TreeShape


class Place(NamedTuple):
    """The end of a text, before a step: what the drafter has read (P, *) of all tokens but the
    root, and what it keeps of them."""

    read: np.ndarray
    caches: list[mx.array]
    root: int
    position: mx.array


def read(drafter: Block, target: Decoder, tokens: Sequence[int]) -> tuple[Features, np.ndarray]:
    """What one causal pass over tokens leaves, and what the drafter reads of it (P, *)."""
    n, capacity = len(tokens), capacity_for(len(tokens))
    slots, zero = mx.arange(capacity, dtype=mx.int32), mx.array([0], mx.int32)
    caches = Pass(new_caches(target.caches, capacity, target.dtype), zero)
    ids, mask = mx.array(list(tokens), mx.int32), slots[None] <= slots[:n, None]
    hidden, outputs = target(ids, slots[:n], mask, slots, caches, drafter.features)
    found = Features(hidden, drafter.features, outputs)
    return found, np.array(found.of(drafter.features).astype(mx.float32))


def at_the_end(drafter: Block, target: Decoder, text: Sequence[int]) -> Place:
    n = len(text) - 1
    features, rows = read(drafter, target, text[:-1])
    caches = new_caches(drafter.caches, capacity_for(n + 16), target.dtype)
    own, ids = Pass(caches, mx.array([0], mx.int32)), mx.array(list(text), mx.int32)
    drafter.absorb(Chunk(ids[:-1], ids[1:], mx.arange(n, dtype=mx.int32), features), own)
    return Place(rows, own.caches, text[-1], mx.array([n], mx.int32))


def proposed(
    drafter: Block, place: Place, shape: TreeShape, draw: Draw | None = None
) -> list[Candidates]:
    own = Pass(list(place.caches), place.position)
    ask = Ask(mx.array([place.root], mx.int32), place.position, None, shape, draw, own)
    return drafter.propose((), ask)


def said(drafter: Block, place: Place, drafted: Sequence[int]) -> np.ndarray:
    """Logits after the root and after every drafted token but the last: (levels, Vd)."""
    root, first = mx.array([place.root], mx.int32), 0 if drafter.config.after else 1
    hidden = drafter.hidden(root, place.position, place.caches)[first:]
    cell = Levels(Places(drafter, hidden), len(drafted))
    return followed(cell, hidden[0], [place.root, *drafted[:-1]])


def rows_in(session: Session, drafter: Block) -> np.ndarray:
    """The rows of all layers and tokens of a session: (layers, 2*Hkv, P, Dh)."""
    kept = session.caches[-len(drafter.caches) :]
    return np.concatenate([np.array(slab) for slab in kept])[:, :, : len(session.tokens)]


def rows_of(drafter: Block, target: Decoder, text: Sequence[int], step: int = 512) -> np.ndarray:
    """The rows after reading a text as a prompt, in chunks."""
    session = Session()
    engine = engine_of(target, drafter, compiled=False)
    run(engine, [*text, 0], None, TreeShape.chain(1), 1, session, step_size=step)
    session.trim(len(text))
    return rows_in(session, drafter)


def knowing(patch: pytest.MonkeyPatch, text: Sequence[int]) -> None:
    """From now on block drafters know how a text goes on, but at every fifth position."""
    known = mx.array([*text, *[0] * 64], mx.int32)
    propose, level, at = Block.propose, Places.level, dict[str, mx.array]()

    def noting(self: Block, state: tuple[()], ask: Ask) -> list[Candidates]:
        at["root"] = ask.position
        return propose(self, state, ask)

    def boosted(
        self: Places, index: int, tokens: mx.array, state: mx.array
    ) -> tuple[mx.array, mx.array]:
        logits, state = level(self, index, tokens, state)
        place = at["root"] + (1 + index)
        right = (self.vocabulary == mx.take(known, place)) & (place % 5 != 0)
        return logits + mx.where(right, 60.0, 0.0)[None], state

    patch.setattr(Block, "propose", noting)
    patch.setattr(Places, "level", boosted)
