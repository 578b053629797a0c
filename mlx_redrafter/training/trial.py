"""A trial of training, in a folder of its own: its own functions on a few prompts and answers,
with what they took, and how long what they wrote was."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.models import Target
from mlx_redrafter.models.batched import SHRINK, over
from mlx_redrafter.models.sequences import Answer, Request, Sequences, Told
from mlx_redrafter.training import agreement, memory
from mlx_redrafter.training.answers import write_shard
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.data import compute_features
from mlx_redrafter.training.fit import Fit
from mlx_redrafter.training.folder import checkpoint_file
from mlx_redrafter.training.prompts import OwnTurns
from mlx_redrafter.training.shards import (
    Shard,
    features_folder,
    record_layers,
)
from mlx_redrafter.training.supply import Supply

SECONDS = 6.0  # of a measurement, about
_WRITING = 20.0  # of the prompts, and of the answers
_SOME = 48  # prompts that are tried at once
_USABLE = 64  # of them, or there are more waves while there is time; so many are answered
SHORT = 16  # tokens before a step
_UNTIMED, _TIMED = 2, 5  # steps that compile, and the fewest that count


class _EnoughError(Exception):
    """Ends what is only measured."""


class Stopwatch(Told):
    """Hears of every step of writing, and ends it after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.times: list[float] = []
        self.seconds = seconds

    def tokens(self, count: int) -> None:
        self.times.append(time.perf_counter())
        timed = self.times[_UNTIMED:]
        if len(timed) > _TIMED and timed[-1] - timed[0] > self.seconds:
            raise _EnoughError

    @property
    def step(self) -> float:
        """Seconds of a step, the median."""
        spent = [b - a for a, b in itertools.pairwise(self.times)]
        return float(np.median(spent[_UNTIMED:] or spent))


class Watched:
    """A target whose answers are noted, ``waves``: the lengths, which have ended, and seconds."""

    def __init__(self, target: Sequences) -> None:
        self._target = target
        self.waves: list[tuple[list[int], list[bool], float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def write(
        self, requests: Sequence[Request], most: int, ends: Collection[int], told: Told
    ) -> list[Answer]:
        started = time.perf_counter()
        answers = self._target.write(requests, most, ends, told)
        spent = time.perf_counter() - started
        ended = [a.tokens[-1] in ends for a in answers]
        self.waves.append(([len(a.tokens) for a in answers], ended, spent))
        return answers


@dataclass(frozen=True)
class Steps:
    """Seconds of a step of writing: once, for each of the sequences, and for each token that one of
    them has before it; and of a token of a prompt. A target that runs one sequence at a time has
    steps of one only."""

    once: float
    each: float
    back: float
    read: float = 0.0
    together: bool = True

    @classmethod
    def of(
        cls, points: Sequence[tuple[int, int, float]], read: float = 0.0, together: bool = True
    ) -> Steps:
        """From (sequences, tokens before, seconds), all errors relative. Never less than nothing:
        what would be is taken to be 0."""
        rows, before, seconds = np.array(points, float).T
        parts = np.stack([np.ones(len(points)), rows, rows * before], axis=1) / seconds[:, None]
        for some in ([0, 1, 2], [0, 1], [1, 2], [1]):
            found = np.linalg.lstsq(parts[:, some], np.ones(len(points)), rcond=None)[0]
            if (found >= 0).all():
                break
        every = dict(zip(some, found.tolist(), strict=True))
        once, each, back = (every.get(i, 0.0) for i in range(3))
        return cls(once, each, back, read, together)

    def seconds(self, rows: float, before: float) -> float:
        return self.once + self.each * rows + self.back * rows * before

    def wave(self, lengths: Sequence[int], rows: int, before: float) -> float:
        """Seconds of ``rows`` answers whose lengths are spread as those given, after prompts of so
        many tokens; those that ended are dropped as `batched` does it."""
        ends = np.sort(np.quantile(lengths, (np.arange(rows) + 0.5) / rows))
        total, held = rows * before * self.read, rows
        if not self.together:
            return total + float(sum(n * self.seconds(1, before + n / 2) for n in ends))
        for step in range(int(np.ceil(ends[-1]))):
            going = rows - int(np.searchsorted(ends, step, side="right"))
            held = going if going <= SHRINK * held else held
            total += self.seconds(held, before + step)
        return total


@dataclass(frozen=True)
class Written:
    """What a model wrote: its lengths, its steps, and the seconds of a wave as a multiple of what
    these say."""

    lengths: list[int]
    steps: Steps
    slower: float = 1.0

    def seconds(self, rows: int, before: float) -> float:
        """Of a wave of so many, after prompts of so many tokens."""
        return self.slower * self.steps.wave(self.lengths, rows, before)

    @property
    def mean(self) -> float:
        return float(np.mean(self.lengths))


def seconds_of(work: Callable[[], object], most: float = SECONDS) -> float:
    """The median of at least three runs behind one that compiles."""
    times: list[float] = []
    while len(times) < 4 or (sum(times[1:]) < most and len(times) < 50):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


@dataclass(frozen=True)
class Fitted:
    """Seconds of an optimiser step, of what is done once, and of a batch that is not trained on;
    bytes of a checkpoint."""

    step: float
    once: float
    scored: float
    checkpoint: int


def completed(lengths: Sequence[int], ended: Sequence[bool], room: int) -> list[int]:
    """Lengths of answers of which some were cut off with room for so many tokens: these go on, and
    end as often as the others did until then."""
    rate = max(0.5, sum(ended)) / sum(lengths)
    cut = [n for n, whole in zip(lengths, ended, strict=True) if not whole]
    places = (np.arange(len(cut)) + 0.5) / max(1, len(cut))
    more = np.minimum(room, np.log(1 - places) / np.log(1 - rate)).round().astype(int)
    whole = [n for n, whole in zip(lengths, ended, strict=True) if whole]
    return whole + [n + int(m) for n, m in zip(cut, more, strict=True)]


def _step(writer: Sequences, requests: Sequence[Request]) -> tuple[int, int, float]:
    """Sequences, tokens before a step, and its seconds."""
    watch = Stopwatch(SECONDS / 2)
    with contextlib.suppress(_EnoughError):
        writer.write(requests, 64, (), watch)
    before = max(len(r.prompt) for r in requests) + len(watch.times) // 2
    return len(requests), before, watch.step


class Trial:
    """All but the evaluation.

    Args:
        place: an empty folder.
        layers: whose outputs the fit reads.
    """

    def __init__(
        self,
        target: Target,
        tokenizer: TokenizerWrapper,
        config: TrainConfig,
        place: Path,
        layers: Sequence[int],
        whole: bool,
    ) -> None:
        self.target, self.tokenizer, self.config, self.place = target, tokenizer, config, place
        self.layers, self.whole = tuple(layers), whole
        self.writer = over(target, () if whole else layers)
        file = features_folder(place, whole) / "00000.npy"
        self.shard = Shard(place / "answers" / "00000.jsonl", file, whole)
        record_layers(place, self.layers, whole)

    def steps(self, read: float) -> Steps:
        """Of batches of several sizes, and of one that has long texts before it."""
        config, size, random = self.config, self.config.batch, np.random.default_rng(0)
        points = [(rows, SHORT) for rows in sorted({1, max(1, size // 4), size})]
        points.append((max(1, size // 8), config.max_tokens))
        if not self.writer.together:
            points = [(1, SHORT), (1, config.max_tokens)]
        found = []
        for shape in points:
            tokens = random.integers(self.target.config.vocab_size, size=shape).tolist()
            found.append(_step(self.writer, [Request(t, 0.8, i) for i, t in enumerate(tokens)]))
        return Steps.of(found, read, self.writer.together)

    def _asking(self, steps: Steps) -> Steps:
        """Of prompts: they are more at once, and their tokens are drawn in another way."""
        writer, own = over(self.target, ()), OwnTurns(self.tokenizer)
        wave = memory.wave(self.config) if steps.together else 1
        sizes = sorted({max(1, wave // 4), wave})
        found = [_step(writer, [own.request(i) for i in range(rows)]) for rows in sizes]
        found = [(n, 0, max(s - steps.back * n * before, s / 2)) for n, before, s in found]
        return replace(Steps.of(found, steps.read, steps.together), back=steps.back)

    def prompts(self, steps: Steps) -> tuple[Supply, Written, float]:
        """Prompts of the model, or of the file; what was written, and the share of it that can be
        used."""
        config, longest = self.config, self.config.prompt_tokens
        steps = steps if config.prompts is not None else self._asking(steps)
        counts = [_SOME, _SOME // 2, _SOME // 4, 6]
        fitting = [n for n in counts if steps.wave([longest], n, SHORT) <= _WRITING]
        small = replace(config, out=self.place, batch=max(1, (fitting or counts)[0] // 3))
        watched: Any = Watched(over(self.target, ()))
        supply = Supply(small, watched, self.tokenizer)
        while len(supply.rows) < _USABLE and sum(s for *_, s in watched.waves) < 2 * _WRITING:
            supply.extend(len(supply.rows) + 1)
        if not watched.waves:
            return supply, Written([longest], steps), 1.0
        lengths = [n for wave, *_ in watched.waves for n in wave]
        told = sum(steps.wave(wave, len(wave), SHORT) for wave, *_ in watched.waves)
        slower = sum(s for *_, s in watched.waves) / told
        return supply, Written(lengths, steps, slower), len(supply.rows) / len(lengths)

    def answers(self, supply: Supply, steps: Steps) -> tuple[Written, float]:
        """Answers to those prompts, cut off where they would take too long; and the mean length of
        the prompts in their template."""
        config = self.config
        count = min(len(supply.rows), _USABLE if self.writer.together else 6)
        [requests, *_] = supply.requests(0, count, count)
        before = float(np.mean([len(r.prompt) for r in requests]))
        at_once = count if steps.together else 1
        each = count / at_once * steps.seconds(at_once, before + config.max_tokens / 2)
        cut = int(np.clip(_WRITING / each, min(SHORT, config.max_tokens), config.max_tokens))
        watched: Any = Watched(self.writer)
        write_shard(
            watched, requests, self.shard, max_tokens=cut, end_tokens=self.tokenizer.eos_token_ids
        )
        [(lengths, ended, seconds)] = watched.waves
        slower = seconds / steps.wave(lengths, count, before)
        lengths = completed(lengths, ended, config.max_tokens - cut)
        return Written(lengths, steps, slower), before

    def reading(self) -> float:
        """Seconds of a token whose features are computed: the median of several times."""
        reader, random = over(self.target, self.layers), np.random.default_rng(0)
        length = min(self.config.max_tokens, 256)
        shape = (max(1, 1024 // length) if reader.together else 1, length + 32)
        tokens = random.integers(self.target.config.vocab_size, size=shape).tolist()
        return seconds_of(lambda: reader.read([(t[:32], t[32:]) for t in tokens])) / np.prod(shape)

    def fit(self, supply: Supply) -> Fitted:
        """A few steps on those answers, and what is done once before and after."""
        if self.whole:
            compute_features(over(self.target, self.layers), self.layers, self.shard)
        times = [time.perf_counter()]

        def on_step(row: dict[str, Any]) -> None:
            times.append(time.perf_counter())
            if len(times) > 4 and times[-1] - times[2] > SECONDS:
                raise _EnoughError

        agreement.findings(supply)
        many = replace(self.config, positions=64 * self.config.batch_positions, cache_gb=1e9)
        run = Fit(self.target, many, self.place)
        with contextlib.suppress(_EnoughError):
            run.run(on_step)
        spent = [b - a for a, b in itertools.pairwise(times)]
        step = float(np.median(spent[2:] or spent))
        held_out = run.data.held_out(run.runs, 2)
        scored = seconds_of(lambda: run.score(held_out[:1]), SECONDS / 4)
        before = time.perf_counter()
        run.export(self.place / "drafter")
        once = spent[0] - step + spent[1] - step + time.perf_counter() - before
        size = checkpoint_file(self.place).stat().st_size
        return Fitted(step, max(0.0, once), scored, size)
