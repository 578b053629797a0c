"""How often a drafter's first choice is right, and how far its probability can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_redrafter.evaluation.yields_record import Answer

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Predictions by the drafter's probability of its first choice, in equal bins of [0, 1].

    Of every bin: predictions ``counts``, their ``mass`` (sum of probabilities), and ``hits``,
    the predictions that were right.
    """

    counts: tuple[int, ...]
    mass: tuple[float, ...]
    hits: tuple[int, ...]

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def agreement(self) -> float:
        """Share of the predictions that were right; NaN without predictions."""
        return _ratio(sum(self.hits), self.count)

    @property
    def error(self) -> float:
        """Expected calibration error: |mean probability - share right|, weighted by count."""
        gaps = (abs(p - h) for p, h in zip(self.mass, self.hits, strict=True))
        return _ratio(sum(gaps), self.count)

    def as_dict(self) -> dict[str, Any]:
        """Per bin; a bin without predictions has null for its shares."""
        columns = (self.mass, self.hits)
        mean, share = (map(_ratio, column, self.counts) for column in columns)
        return {
            "ece": _plain(self.error),
            "count": list(self.counts),
            "probability": [_plain(p) for p in mean],
            "agreed": [_plain(h) for h in share],
        }


@dataclass(frozen=True)
class Depth:
    """Draft position k: predictions where every earlier token was true.

    ``reached`` of them had agreed at all earlier positions too, and ``kept`` of these agree here.
    """

    depth: int
    reached: int
    kept: int
    calibration: Calibration

    @property
    def conditional(self) -> float:
        """Share right, given that the earlier drafts of the same context were."""
        return _ratio(self.kept, self.reached)


@dataclass(frozen=True)
class Agreement:
    """The drafter along the answers of one prompt group and temperature, by draft position."""

    group: str
    temp: float
    depths: tuple[Depth, ...]

    @property
    def error(self) -> float:
        """Expected calibration error of all positions, none making up for another."""
        found = [d.calibration for d in self.depths if d.calibration.count]
        return _ratio(sum(c.error * c.count for c in found), sum(c.count for c in found))

    def as_dict(self) -> dict[str, Any]:
        tables = [d.calibration for d in self.depths]
        return {
            "group": self.group,
            "temp": self.temp,
            "positions": [c.count for c in tables],
            "agreement": [_plain(c.agreement) for c in tables],
            "conditional": [_plain(d.conditional) for d in self.depths],
            "ece": _plain(self.error),
            "ece_by_depth": [_plain(c.error) for c in tables],
        }


def of_answers(answers: Sequence[Answer]) -> list[Agreement]:
    """What was said along recorded answers, by temperature and group ("all" is the last)."""
    groups = [*dict.fromkeys(answer.group for answer in answers), "all"]
    found = []
    for temp in dict.fromkeys(answer.temp for answer in answers):
        for group in groups:
            some = [a for a in answers if a.temp == temp and group in (a.group, "all")]
            tally = Tally(max(a.said.picks.shape[1] for a in some))
            for answer in some:
                tally.add(*answer.said.against(answer.tokens))
            found.append(tally.result(group, temp))
    return found


class Tally:
    """Counts of one group and temperature, by depth and bin (K, BINS), and along drafts (K,)."""

    def __init__(self, depth: int) -> None:
        self.counts, self.hits = np.zeros((2, depth, BINS), np.int64)
        self.mass = np.zeros((depth, BINS))
        self.reached, self.kept = np.zeros((2, depth), np.int64)

    def add(self, probability: np.ndarray, agreed: np.ndarray, within: np.ndarray) -> None:
        """(R, K) each."""
        bins = np.minimum((probability * BINS).astype(int), BINS - 1)
        going = np.ones(len(agreed), bool)
        for k in range(agreed.shape[1]):
            use = within[:, k]
            at, hit = bins[use, k], agreed[use, k]
            self.counts[k] += np.bincount(at, minlength=BINS)
            self.hits[k] += np.bincount(at[hit], minlength=BINS)
            self.mass[k] += np.bincount(at, probability[use, k], minlength=BINS)
            going &= use
            self.reached[k] += going.sum()
            going &= agreed[:, k]
            self.kept[k] += going.sum()

    def result(self, group: str, temp: float) -> Agreement:
        depths = [
            Depth(
                k + 1, int(self.reached[k]), int(self.kept[k]),
                Calibration(
                    tuple(self.counts[k].tolist()), tuple(self.mass[k].tolist()),
                    tuple(self.hits[k].tolist()),
                ),
            )
            for k in range(len(self.counts))
        ]  # fmt: skip
        return Agreement(group, temp, tuple(depths))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _plain(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else round(value, 4)
