"""Ways to choose a shape for every step, walked through recorded answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mlx_redrafter.decoding.costs import Costs
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.decoding.prospects import KINDS, LOOKUP
from mlx_redrafter.decoding.tree import TreeShape
from mlx_redrafter.replay.record import Answer, best

PLAIN = TreeShape.plain()

Walk = Callable[[Answer], float]
"""Seconds that an answer takes."""


def policy_walk(make: Callable[[bool], Policy], costs: Costs) -> Walk:
    """A policy of the engine: it chooses before drafting, with one step in flight unrecorded."""

    def walk(answer: Answer) -> float:
        policy = make(answer.sampled)
        at, seconds, unread = 0, 0.0, None
        while at < len(answer.tokens):
            shape = policy.choose(256)
            if unread is not None:
                policy.record(unread[0], unread[1], None)
            unread = shape, answer.yields(at, shape)
            at += unread[1]
            seconds += costs.table(shape)
        return seconds

    return walk


def oracle_walk(shapes: Sequence[TreeShape], costs: Costs, rate: float) -> Walk:
    """Knows beforehand what every shape will yield; ``rate``: tokens per second that it reaches."""

    def walk(answer: Answer) -> float:
        at, seconds = 0, 0.0
        while at < len(answer.tokens):
            here = at

            def worth(shape: TreeShape, here: int = here) -> float:
                return answer.yields(here, shape) - rate * costs.table(shape)

            shape = max(shapes, key=worth)
            at += answer.yields(at, shape)
            seconds += costs.table(shape)
        return seconds

    return walk


def after_draft_walk(
    shape: TreeShape, costs: Costs, rate: float, right: Calibration, lost: float
) -> Walk:
    """Drafts always, then chooses the nodes by their calibrated chances (Dinkelbach: as long as
    they gain more tokens than their seconds are worth); ``lost`` seconds a step for not being
    launched ahead."""
    sizes = [n for n in sorted(costs.verify) if n <= 1 + shape.width * shape.depth + LOOKUP]
    draft = costs.table(shape) - costs.checking(shape.nodes)

    def walk(answer: Answer) -> float:
        at, seconds = 0, 0.0
        while at < len(answer.tokens):
            found = answer.candidates(at, shape)
            chances = sorted((right(c, answer.sampled) for c in found.values()), reverse=True)
            gains = np.concatenate([[0.0], np.cumsum(chances)])

            def worth(size: int, gains: np.ndarray = gains) -> float:
                return float(gains[min(size, len(gains)) - 1]) - rate * costs.checking(size)

            size = max(sizes, key=worth)
            at += answer.accepted(at, best(found, size)) + 1
            seconds += costs.checking(size) + draft + lost
        return seconds

    return walk


class Calibration:
    """From a path's cost to the chance that the answer goes through it: 40 quantile bins."""

    def __init__(self, answers: Sequence[Answer], shape: TreeShape) -> None:
        self._bins = {}
        for sampled in (False, True):
            scores, right = [], []
            for answer in (a for a in answers if a.sampled == sampled):
                for at in range(len(answer.tokens)):
                    for path, cost in answer.candidates(at, shape).items():
                        scores.append(-cost)
                        right.append(path == tuple(answer.tokens[at : at + len(path)]))
            self._bins[sampled] = _monotone_bins(np.array(scores), np.array(right, float))

    def __call__(self, cost: float, sampled: bool) -> float:
        edges, chance = self._bins[sampled]
        at = int(np.searchsorted(edges, -cost)) - 1
        return float(chance[min(max(at, 0), len(chance) - 1)])


def _monotone_bins(scores: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if not len(scores):
        return np.zeros(1), np.zeros(1)
    edges = np.quantile(scores, np.linspace(0, 1, 41))
    at = np.clip(np.searchsorted(edges, scores) - 1, 0, 39)
    share = [right[at == i].mean() if (at == i).any() else 0.0 for i in range(40)]
    return edges, np.maximum.accumulate(np.array(share))


def grouped(answers: Sequence[Answer]) -> Iterator[tuple[str, list[Answer]]]:
    """The answers of every kind and group that there is, and of every kind over all groups."""
    for kind, sampled in KINDS.items():
        some = [a for a in answers if a.sampled == sampled and a.tokens]
        for group in dict.fromkeys(a.group for a in some):
            yield f"{kind} {group}", [a for a in some if a.group == group]
        if some:
            yield f"{kind} all", some


def speedups(answers: Sequence[Answer], walk: Walk, costs: Costs) -> dict[str, float]:
    """Over plain decoding: by group, over all, and the lowest of a prompt; greedy and sampled."""
    plain = costs.table(PLAIN)
    seconds = {id(a): walk(a) for a in answers if a.tokens}
    found: dict[str, float] = {}
    for name, part in grouped(answers):
        tokens = sum(len(a.tokens) for a in part)
        found[name] = tokens * plain / sum(seconds[id(a)] for a in part)
        if name.endswith(" all"):
            lowest = min(len(a.tokens) * plain / seconds[id(a)] for a in part)
            found[name.replace(" all", " lowest")] = lowest
    return found
