"""One step of several answers: their trees are checked in one pass, everything else is each one's
own. The same functions make the step of one answer (`step.make_step`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from mlx_redrafter.decoding.sampling import Arrays
from mlx_redrafter.decoding.step import (
    Begun,
    State,
    StepSpec,
    begin,
    finish,
    read_layers,
    verify,
)
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.models import Target
from mlx_redrafter.models.features import Features

Member = tuple[Sequence[Drafter], StepSpec]
"""An answer: the drafters that take part in it, and its bucket."""
RowsStep = Callable[[list[State], list[Arrays]], tuple[list[mx.array], list[State]]]


def make_rows_step(
    target: Target, members: Sequence[Member], on_trace: Callable[[], None]
) -> RowsStep:
    """The uncompiled step of several answers, in this order; see `step.make_step`."""
    layers = read_layers([drafter for drafters, _ in members for drafter in drafters])

    def step(states: list[State], arrays: list[Arrays]) -> tuple[list[mx.array], list[State]]:
        on_trace()
        begun = [
            begin(target, *member, state, own)
            for member, state, own in zip(members, states, arrays, strict=True)
        ]
        read = check(target, begun, layers)
        done = [
            finish(target, *member, one, *found, own)
            for member, one, found, own in zip(members, begun, read, arrays, strict=True)
        ]
        return [text for text, _ in done], [state for _, state in done]

    return step


def check(
    target: Target, begun: Sequence[Begun], layers: tuple[int, ...]
) -> list[tuple[Features, mx.array]]:
    """Features and logits of every answer's nodes; the output's weights are read once for all."""
    reads = verify(target, [(one.tree, one.run) for one in begun], layers)
    logits = target.logits(mx.concatenate([read.hidden for read in reads], axis=0))
    ends = np.cumsum([read.hidden.shape[0] for read in reads])
    return list(zip(reads, mx.split(logits, ends[:-1].tolist(), axis=0), strict=True))
