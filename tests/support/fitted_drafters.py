"""Medusa heads and speculators that are right on one text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiny_medusa
import tiny_speculators
from conftest import D, hidden_states
from tiny_heads import fitted
from tiny_medusa import K
from tiny_speculators import N, arctic, ibm

from mlx_redrafter.drafters.levels import LevelDrafter
from mlx_redrafter.models import Decoder


def heads(target: Decoder, folder: Path, text: list[int], shift: int = 0) -> LevelDrafter:
    """Blocks that do nothing, and the matrices that are right on a text.

    ``shift``: how many tokens farther than it should a head guesses.
    """
    h = tiny_medusa.heads()
    h["W"] = [[np.zeros((D, D), np.float32)]] * K
    h["b"] = [[np.zeros(D, np.float32)]] * K
    states = hidden_states(target, text).astype(np.float64)
    for k in range(K):
        following = text[2 + k + shift :]
        h["U"][k] = fitted(states[: len(following)], following)
    return tiny_medusa.loaded(folder, tiny_medusa.medusa_1(h), target)


def speculator(kind: str) -> Callable[..., LevelDrafter]:
    """The same for a random speculator, whose levels share a matrix."""

    def make(target: Decoder, folder: Path, text: list[int], shift: int = 0) -> LevelDrafter:
        config, weights = arctic("sum_lstm", 128) if kind == "lstm" else ibm(True, 128)
        hidden, rows, wanted = hidden_states(target, text), [], list[int]()
        for place in range(len(text) - N - 1 - shift):
            read = text[place + 1 : place + 1 + N]
            rows.append(tiny_speculators.states(config, weights, hidden[place], read))
            wanted.extend(text[place + 2 + shift : place + 2 + shift + N])
        weights["head.0.weight"] = fitted(np.concatenate(rows), wanted)
        return tiny_speculators.loaded(folder, config, weights, target)

    return make
