"""How good a drafter is on prompts that were kept out of its training: live, and by position.

Live, every prompt is decoded with drafting, and the steps are counted. By position, the drafter
follows an answer that the target wrote: for a hidden state that predicted a_i it consumes the true
a_i, .., a_{i+k-1} and predicts a_{i+k}, for every i and k <= K. That tells how often its first
choice is right, and how far its own probability can be trusted: the calibration table.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model
from mlx_redrafter.drafters import rollout
from mlx_redrafter.drafters.levels import LevelDrafter
from mlx_redrafter.drafters.rollout import Followed
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import acceptance
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.batched import BatchedTarget, Request
from mlx_redrafter.models.weights import read_json
from mlx_redrafter.runtime import device
from mlx_redrafter.tree.shape import DEFAULT, TreeShape

FILE = "evaluation.json"
SHAPES = (TreeShape.chain(4), TreeShape(3, 4, 8), DEFAULT)
TEMPERATURES = (0.0, 0.8)
DEPTH = 5  # K, draft positions that are compared
RECORDED = 24  # prompts along whose answers drafts are recorded, for the policy
BINS = 10
_FLOATS = 2**26  # logits that exist at a time, in all K steps together


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


@dataclass(frozen=True)
class Evaluation:
    """All that was measured, and under which conditions."""

    live: tuple[acceptance.Row, ...]
    agreement: tuple[Agreement, ...]
    conditions: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON. ``calibration`` is what a drafting policy reads."""
        tables = [
            {
                "group": row.group,
                "temp": row.temp,
                "depths": [{"depth": d.depth, **d.calibration.as_dict()} for d in row.depths],
            }
            for row in self.agreement
        ]
        edges = [i / BINS for i in range(BINS + 1)]
        return {
            "conditions": self.conditions,
            "live": [row.as_dict() for row in self.live],
            "teacher_forced": [row.as_dict() for row in self.agreement],
            "calibration": {"edges": edges, "tables": tables},
        }


def evaluate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    shapes: Sequence[TreeShape] = SHAPES,
    temperatures: Sequence[float] = TEMPERATURES,
    max_tokens: int = 128,
    depth: int = DEPTH,
    batch: int = 16,
    seed: int = 0,
    on_answer: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure ``model.drafter`` live and by position.

    Args:
        prompts: none of them may have been trained on.
        depth: draft positions K that are compared with the answers.
        batch: answers written at once for the comparison.
        on_answer: called ``answers(...)`` times.

    Raises:
        OptionError: no drafter, or no prompts.
    """
    if not isinstance(model.drafter, Followed):
        raise OptionError(f"there is no drafter to evaluate for {model.name}: train one")
    if not prompts:
        raise OptionError("there are no prompts to evaluate with: give at least one")
    live = acceptance.measure(
        model, tokenizer, prompts, shapes=shapes, temperatures=temperatures,
        max_tokens=max_tokens, seed=seed, on_answer=on_answer,
    )  # fmt: skip
    found = compare(
        model.target, model.drafter, tokenizer, prompts, temperatures=temperatures,
        max_tokens=max_tokens, depth=depth, batch=batch, seed=seed, on_answer=on_answer,
    )  # fmt: skip
    groups = dict(Counter(p.group for p in prompts))
    facts = {**conditions(model), "prompts": groups, "max_tokens": max_tokens, "seed": seed}
    return Evaluation(tuple(live), tuple(found), facts)


def answers(
    prompts: int,
    shapes: Sequence[TreeShape] = SHAPES,
    temperatures: Sequence[float] = TEMPERATURES,
) -> int:
    """How many answers ``evaluate`` writes: for a progress bar."""
    return prompts * len(temperatures) * (len(shapes) + 1)


def compare(
    target: Decoder,
    drafter: Followed,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    max_tokens: int = 128,
    depth: int = DEPTH,
    batch: int = 16,
    seed: int = 0,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Agreement]:
    """Follow the target's own answers with the drafter, by group ("all" is the last) and
    temperature, as deep as its levels go. Nothing but counts outlives a batch."""
    if isinstance(drafter, LevelDrafter):
        depth = min(depth, drafter.levels or depth)
    groups = [*dict.fromkeys(p.group for p in prompts), "all"]
    tallies = {(group, temp): _Tally(depth) for temp in temperatures for group in groups}
    writer = BatchedTarget(target, rollout.feature_layers(target.config, drafter.features))
    ids = [list(p.encode(tokenizer)) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
    for temp in temperatures:
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            requests = [Request(ids[i], temp, seed + i) for i in part]
            room = min(max_tokens, target.config.max_positions - max(len(ids[i]) for i in part))
            written = writer.write(requests, room, tokenizer.eos_token_ids)
            for i, answer in zip(part, written, strict=True):
                for counts in _follow(drafter, target, answer.tokens, answer.features, temp, depth):
                    for group in (prompts[i].group, "all"):
                        tallies[group, temp].add(*counts)
                on_answer()
            mx.clear_cache()
    return [tally.result(group, temp) for (group, temp), tally in tallies.items()]


def windows(answer: Sequence[int], depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the drafter consumes and what comes after it, for every token of an answer but the last.

    Row i is the context that predicted a_i; in column k - 1 it consumes a_{i+k-1}, and a_{i+k} is
    right.

    Returns:
        consumed (n - 1, K) int32, right (n - 1, K) int32, and True (n - 1, K) within the answer.
    """
    n = len(answer)
    at = np.arange(n - 1)[:, None] + np.arange(depth)
    padded = np.pad(np.asarray(answer, np.int32), (0, depth))
    return padded[at], padded[at + 1], at + 1 < n


def _follow(
    drafter: Followed,
    target: Decoder,
    answer: Sequence[int],
    features: np.ndarray,
    temp: float,
    depth: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Probability, right or wrong, and counted or not, (R, K) each, for chunks of an answer."""
    consumed, right, within = windows(answer, depth)
    rows = max(1, _FLOATS // (depth * drafter.vocabulary.shape[0]))
    for start in range(0, len(consumed), rows):
        chunk = slice(start, min(start + rows, len(consumed)))
        picks, probability = _first_choices(drafter, target, features[chunk], consumed[chunk], temp)
        yield probability, picks == right[chunk], within[chunk]


def _first_choices(
    drafter: Followed, target: Decoder, features: np.ndarray, tokens: np.ndarray, temp: float
) -> tuple[np.ndarray, np.ndarray]:
    """features (R, L, D), tokens (R, K) -> token ids and probabilities (R, K) of the best drafts.

    The probability is the one of greedy beam search, or at the answer's temperature without the
    noise that sampled drafts share with the target; always within the draft vocabulary. A token
    outside of it is never drafted, so it counts as wrong.
    """
    context = rollout.contexts(drafter, target, mx.array(features))
    picks, probabilities = [], []
    for logits in rollout.logits(drafter, context, mx.array(tokens)):
        logits = logits.astype(mx.float32) / (temp or 1.0)  # (R, Vd)
        picks.append(drafter.token_ids(mx.argmax(logits, axis=-1)))
        probabilities.append(mx.exp(mx.max(logits, axis=-1) - mx.logsumexp(logits, axis=-1)))
    return np.array(mx.stack(picks, axis=1)), np.array(mx.stack(probabilities, axis=1))


class _Tally:
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


def conditions(model: Model) -> dict[str, Any]:
    """What a result holds for: the model and its precision, the machine, the versions."""
    quantization = read_json(model.folder / "config.json").get("quantization") or {}
    return device.conditions(
        short_name(model.name),
        model.target.dtype,
        *("chip", "device", "blas", "mlx", "mlx_redrafter"),
        model_bits=quantization.get("bits"),
        drafter=model.drafter_folder.name if model.drafter_folder else None,
    )


def short_name(model: str) -> str:
    """A hub id or the built-in name as it is; of a path, which is the user's own, the last part."""
    is_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).is_dir()
    return Path(model).name if is_path else model


def write(folder: Path, evaluation: Evaluation) -> Path:
    """Write ``evaluation.json`` into the drafter's folder, whole or not at all."""
    file = folder / FILE
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(evaluation.as_dict(), indent=1, allow_nan=False) + "\n")
    partial.replace(file)
    return file


def read(folder: Path) -> dict[str, Any]:
    """``Evaluation.as_dict`` of a drafter's folder. Raises OptionError."""
    file = folder / FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.keys() >= {"conditions", "live", "teacher_forced", "calibration"}:
            return dict(values)
        problem = "it holds no evaluation"
    except (OSError, ValueError, AttributeError) as error:
        problem = str(error)
    raise OptionError(f"{file} cannot be read ({problem}): evaluate the drafter first")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _plain(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else round(value, 4)
