"""Which answers lie in stacks: one for every power of two of slots, where several need so many."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from mlx_redrafter.cache.stack import Stack, Stacked, capacity
from mlx_redrafter.decoding.answering import Answering
from mlx_redrafter.decoding.rows import Together
from mlx_redrafter.decoding.step import settled
from mlx_redrafter.models import Target
from mlx_redrafter.models.stacked import Seating

Lying = dict[Stack, list[Answering]]


class Stacks:
    """The stacks of a batch, by their slots."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._stacks: dict[int, Stack] = {}

    def rank(self, answer: Answering) -> float:
        """Its stack's slots; of one that lies in none infinity."""
        found = self._of(answer)
        return float("inf") if found is None else found.capacity

    def those(self, answers: Sequence[Answering]) -> Lying:
        """Which of the answers lie where, in this order."""
        found: Lying = {}
        for answer in answers:
            stack = self._of(answer)
            if stack is not None:
                found.setdefault(stack, []).append(answer)
        return found

    def seat(self, answers: Sequence[Answering]) -> None:
        """Before a step of these answers: who is alone with the slots it needs has its slabs for
        itself, all others lie together."""
        wanted = defaultdict[int | None, list[Answering]](list)
        for answer in answers:
            wanted[self._capacity(answer)].append(answer)
        for room, those in wanted.items():
            together = room if len(those) > 1 else None
            for answer in those:
                stack = self._of(answer)
                if stack is not None and stack.capacity != together:
                    self.unseat(answer)
            if together is not None:
                self._join(together, those)

    def unseat(self, answer: Answering) -> None:
        """It has its slabs for itself again, if it had not."""
        stack = self._of(answer)
        if stack is not None:
            answer.state = answer.state._replace(caches=stack.leave(answer))
            if stack.empty:
                del self._stacks[stack.capacity]

    @contextlib.contextmanager
    def taken(self, lying: Lying) -> Iterator[tuple[Together, Callable[[list[Stacked]], None]]]:
        """What a step takes of stacks in which these answers lie, and who takes back what is left
        of them; should that not happen, they are as they were."""
        together: Together = []
        for stack, answers in lying.items():
            places = [stack.place(answer) for answer in answers]
            order = [-1] * len(stack)
            for i, place in enumerate(places):
                order[place] = i
            seating = Seating(mx.array(order, mx.int32), mx.array(places, mx.int32))
            together.append((stack.taken(), seating))

        def put_back(left: list[Stacked]) -> None:
            for (i, one), (_, seating) in zip(enumerate(left), together, strict=True):
                together[i] = Stacked(*one), seating

        try:
            yield together, put_back
        finally:
            for stack, (arrays, _) in zip(lying, together, strict=True):
                stack.arrays = arrays

    def _of(self, answer: Answering) -> Stack | None:
        return next((one for one in self._stacks.values() if answer in one), None)

    def _capacity(self, answer: Answering) -> int | None:
        kinds = self._target.caches
        if not self._target.stacks or len(answer.kinds) != len(kinds):
            return None  # drafters that keep rows have slots of their own
        return capacity(kinds, answer.needed, answer.widest)

    def _join(self, room: int, answers: Sequence[Answering]) -> None:
        target = self._target
        stack = self._stacks.setdefault(room, Stack(target.caches, room, target.dtype))
        for answer in answers:
            if answer not in stack:
                caches = settled(answer.kinds, answer.state)
                answer.state = answer.state._replace(caches=[], pending=())
                stack.join(answer, caches)
