"""One step of several answers: their trees are checked in one pass, everything else is each one's
own. The same functions make the step of one answer (`step.make_step`)."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.cache.stack import Stacked
from mlx_redrafter.decoding.sampling import Arrays
from mlx_redrafter.decoding.step import (
    Begun,
    Opened,
    State,
    StepSpec,
    drafted,
    finish,
    opening,
    read_layers,
    verify,
)
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.drafters.beam import BeamDrafter
from mlx_redrafter.models import Target
from mlx_redrafter.models.features import Features
from mlx_redrafter.models.stacked import Seating, StackPass

Member = tuple[Sequence[Drafter], StepSpec]
"""An answer: the drafters that take part in it, and its bucket."""
Together = list[tuple[Stacked, Seating]]
"""Stacks of the first answers, and where each lies; all others have caches of their own."""
RowsStep = Callable[
    [list[State], list[Arrays], Together], tuple[list[mx.array], list[State], list[Stacked]]
]


def make_rows_step(
    target: Target,
    members: Sequence[Member],
    stacked: Sequence[int],
    on_trace: Callable[[], None],
) -> RowsStep:
    """The uncompiled step of several answers, in this order; see `step.make_step`. stacked: of
    every stack how many lie in it, the first answers in the first."""
    layers = read_layers([drafter for drafters, _ in members for drafter in drafters])
    ends = np.cumsum([0, *stacked]).tolist()
    lying = [slice(*pair) for pair in itertools.pairwise(ends)]
    # The nodes of a chain stand where they belong, if it is accepted.
    moves = [any(not spec.shape.one_path for _, spec in members[those]) for those in lying]

    def step(
        states: list[State], arrays: list[Arrays], together: Together
    ) -> tuple[list[mx.array], list[State], list[Stacked]]:
        on_trace()
        opened = [
            opening(target, *member, state, own)
            for member, state, own in zip(members, states, arrays, strict=True)
        ]
        proposed = jointly(members, opened)
        begun = [
            drafted(drafters, own, known)
            for (drafters, _), own, known in zip(members, opened, proposed, strict=True)
        ]
        stacks = [
            StackPass(*one, [b.tree for b in begun[those]], [b.position for b in begun[those]])
            for one, those in zip(together, lying, strict=True)
        ]
        read = check(target, begun, layers, stacks)
        done = [
            finish(target, *member, one, *found, own)
            for member, one, found, own in zip(members, begun, read, arrays, strict=True)
        ]
        texts, after, slots = (list(every) for every in zip(*done, strict=True))
        left = [
            stack.settled(slots[those] if moved else None)
            for stack, those, moved in zip(stacks, lying, moves, strict=True)
        ]
        return texts, after, left

    return step


def jointly(members: Sequence[Member], opened: Sequence[Opened]) -> list[dict[int, Any]]:
    """By answer and drafter, what those propose that can be asked for several answers at once: its
    weights are read once for all. Which drafts a tree has never changes a text."""
    groups = defaultdict[Any, list[tuple[int, int]]](list)
    for i, ((drafters, spec), own) in enumerate(zip(members, opened, strict=True)):
        shape = spec.shape
        for number, one in enumerate(drafters):
            if one.part in shape.parts and isinstance(one, BeamDrafter) and one.joins:
                asked = (shape.width, shape.depth, shape.mode, shape.longest, shape.one_path)
                groups[id(one), asked, own.ask.draw is None].append((i, number))
    found: list[dict[int, Any]] = [{} for _ in members]
    for those in groups.values():
        drafter: Any = members[those[0][0]][0][those[0][1]]
        states = [opened[i].states[number] for i, number in those]
        every = drafter.propose_all(states, [opened[i].ask for i, _ in those])
        for (i, number), candidates in zip(those, every, strict=True):
            found[i][number] = candidates
    return found


def check(
    target: Target, begun: Sequence[Begun], layers: tuple[int, ...], stacks: Sequence[StackPass]
) -> list[tuple[Features, mx.array]]:
    """Features and logits of every answer's nodes; the output's weights are read once for all."""
    reads = verify(target, [(one.tree, one.run) for one in begun], layers, stacks=stacks)
    logits = target.logits(mx.concatenate([read.hidden for read in reads], axis=0))
    ends = np.cumsum([read.hidden.shape[0] for read in reads])
    return list(zip(reads, mx.split(logits, ends[:-1].tolist(), axis=0), strict=True))
