"""What an EAGLE head says behind a text, asked as the decode step asks; and its cache's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
from conftest import engine_of, run
from tiny_heads import followed

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.drafters import Ask
from mlx_redrafter.drafters.eagle import Branches, Eagle
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.tree.nodes import Candidates
from mlx_redrafter.tree.shape import TreeShape


def read(target: Decoder, tokens: Sequence[int], layers: tuple[int, ...]) -> Features:
    """What one causal pass over tokens leaves."""
    n, capacity = len(tokens), capacity_for(len(tokens))
    slots = mx.arange(capacity, dtype=mx.int32)
    zero = mx.array([0], mx.int32)
    caches = Pass(new_caches(target.caches, capacity, target.dtype), zero)
    ids, mask = mx.array(list(tokens), mx.int32), slots[None] <= slots[:n, None]
    hidden, outputs = target(ids, slots[:n], mask, slots, caches, layers)
    return Features(hidden, layers, outputs)


class Place(NamedTuple):
    """The end of a text, before a step: what the head keeps and reads there, and what it has read
    (P, *) of all tokens but the root."""

    read: np.ndarray
    state: mx.array
    own: Pass
    root: int
    position: mx.array


def at_the_end(drafter: Eagle, target: Decoder, text: Sequence[int]) -> Place:
    n = len(text) - 1
    features = read(target, text[:-1], drafter.features)
    caches = new_caches(drafter.caches, capacity_for(n + 16), target.dtype)
    own = Pass(caches, mx.array([0], mx.int32))
    ids = mx.array(list(text), mx.int32)
    positions = mx.arange(n, dtype=mx.int32)
    drafter.absorb(Chunk(ids[:-1], ids[1:], positions, features), own)
    last = Features(features.hidden[-1:], features.layers, tuple(x[-1:] for x in features.outputs))
    position = mx.array([n], mx.int32)
    rows = np.array(features.of(drafter.features).astype(mx.float32))
    return Place(rows, drafter.begin(last), Pass(own.caches, position), text[-1], position)


def proposed(drafter: Eagle, place: Place, shape: TreeShape) -> list[Candidates]:
    ask = Ask(mx.array([place.root], mx.int32), place.position, None, shape, None, place.own)
    return list(drafter.propose(place.state, ask))


def said(drafter: Eagle, place: Place, drafted: Sequence[int]) -> np.ndarray:
    """Logits after the root and after every drafted token but the last: (levels, Vd)."""
    (kind,) = drafter.caches
    cell = Branches(drafter, place.own.settled(0, kind), place.position)
    return followed(cell, place.state[0], [place.root, *drafted[:-1]])


def rows_in(session: Session, drafter: Eagle) -> np.ndarray:
    """The rows of the pairs that are known: all tokens but the last have one that follows."""
    return np.array(session.caches[-1])[:, :, : max(0, session.covered - 1)]


def rows_of(drafter: Eagle, target: Decoder, text: Sequence[int], step: int = 512) -> np.ndarray:
    """The rows after reading a text as a prompt, in chunks."""
    session = Session()
    engine = engine_of(target, drafter, compiled=False)
    shape = TreeShape.chain(1)  # or nobody would make rows
    run(engine, [*text, 0], None, shape, 1, session, step_size=step)
    return rows_in(session, drafter)[:, :, : len(text) - 1]
