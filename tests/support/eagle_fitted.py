"""An EAGLE head that is right on one text, so that what it drafts is really accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import D, V
from eagle_calls import read
from tiny_eagle import CLASS, DH, SIZES, Head, Reference, loaded, tensors
from tiny_heads import noise

from mlx_redrafter.drafters.eagle import Eagle
from mlx_redrafter.models import Decoder

WIDTH, DEPTH = 128, 3
RANKS = (0, 0, 1, 0, 0, 0, 1, 0, 0)
"""The right token is the first or the second choice: long runs and side branches."""


def plain_head(width: int = D, seed: int = 0) -> Head:
    """SpecForge's, for the tests' target of three layers."""
    named = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 0, 2]}}
    weights = tensors(width=width, rows=V, seed=seed)
    head = Head({**SIZES, **CLASS, "head_dim": DH, **named}, weights, (1, 0, 2))
    if width == D:
        return head
    own = {"embed_tokens.weight": noise(np.random.default_rng(seed), V, width)}
    config = head.config | {"hidden_size": width, "target_hidden_size": D}
    return replace(head, config=config, weights=weights | own, own_embedding=True)


def fitted(
    folder: Path, target: Decoder, text: Sequence[int], start: int, shift: int = 0, rows: int = 0
) -> Eagle:
    """A head for a text whose answer begins at token ``start``: DEPTH levels of it are right behind
    every token. What its output matrix reads is asked of the reference, token by token.

    Args:
        shift: how many tokens farther than it should a level guesses.
        rows: of places to learn; 0: as many as the head is wide.
    """
    head = plain_head(WIDTH)
    states = replace(head, weights=head.weights | {"lm_head.weight": np.eye(WIDTH)})
    meant = Reference(states, np.zeros((V, D)), np.zeros((V, D)))
    g = np.array(read(target, text, head.layers).of(head.layers))
    found, wanted = [], []
    places = range(start - 1, len(text) - DEPTH - shift)
    assert DEPTH * len(places) <= WIDTH, "more than can be learnt"
    for place in places:
        drafted = list(text[place + 1 : place + 1 + DEPTH])
        found.append(meant.said(text[: place + 1], g[:place], drafted))
        for right in text[place + 1 + shift : place + 1 + shift + DEPTH]:
            row = np.zeros(V)
            row[right] = 100.0
            if RANKS[right % len(RANKS)]:
                row[(right + 1) % V] = 102.0
            wanted.append(row)
    matrix = np.linalg.lstsq(np.concatenate(found), np.stack(wanted), rcond=None)[0].T
    weights = head.weights | {"lm_head.weight": matrix.astype(np.float32)}
    return loaded(folder, replace(head, weights=weights), target)
