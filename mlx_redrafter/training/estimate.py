"""How long training will take here, from half a minute of measuring, and what it will need."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_redrafter.evaluation.positions import RECORDED, SHAPES, TEMPERATURES
from mlx_redrafter.evaluation.prompts import read_prompts
from mlx_redrafter.hub import resolve
from mlx_redrafter.models import Target, load_model
from mlx_redrafter.models.batched import over, takes
from mlx_redrafter.models.sequences import Request, Sequences
from mlx_redrafter.runtime.device import device
from mlx_redrafter.terminal import console
from mlx_redrafter.training import imports, kinds, memory
from mlx_redrafter.training.config import Evaluating, TrainConfig
from mlx_redrafter.training.fit import Fit
from mlx_redrafter.training.folder import checkpoint_file
from mlx_redrafter.training.progress import duration
from mlx_redrafter.training.shards import (
    answer_tokens,
    feature_bytes,
    features_folder,
    record_layers,
    save_features,
    shards,
    write_lines,
)
from mlx_redrafter.training.stages import fitted_steps

_SECONDS = 6.0  # of each measurement, about
_PROMPT_SHARE = 0.5  # length of a prompt of the model's, as a share of the longest
_ANSWER_SHARE = 0.75
_USABLE_PROMPTS = 0.85  # the others are cut off or were there before
_TAIL = 1.15  # batches get smaller while their last answers are written
_TOKENS_PER_STEP = 1.6
_NODES = 8
_REPEATS = 3  # timings
_ABOVE = 3  # times that of reading the prompts must steps take together


@dataclass(frozen=True)
class Stage:
    """What a stage takes: seconds, bytes of memory and of disk; and the speed that says so."""

    name: str
    seconds: float
    memory: int
    disk: int
    detail: str


@dataclass(frozen=True)
class Estimate:
    """All stages, the memory by part, and the batch that fits."""

    stages: tuple[Stage, ...]
    memory: dict[str, int]
    batch: int
    asked: int


@dataclass(frozen=True)
class Speeds:
    """What was measured: tokens/s of writing and of reading answers again, seconds of a step of the
    fit and of decoding, and bytes of a checkpoint."""

    writing: float
    reading: float
    fitting: float
    decoding: float
    checkpoint: int


def measure(config: TrainConfig, evaluating: Evaluating | None = None) -> Estimate:
    """Load the model and measure; nothing is written to the folder of the run."""
    target = load_model(resolve(config.model))
    kind = kinds.of(config)
    shape = kind.shape_of(config, target.config)
    weights, on_gpu = memory.weights_of(target), device() == "gpu"
    here: dict[str, Any] = {"weights": weights, "on_gpu": on_gpu, "together": takes(target)}
    batch = memory.fitting_batch(config, target.config, shape, memory.usable_bytes(), **here)
    asked, config = config.batch, replace(config, batch=batch)
    parts = memory.memory(config, target.config, shape, **here)
    layers = kind.layers_of(shape, target.config)
    with Console(stderr=True).status("measuring: evaluation"):
        decoding = _decoding(target, config)
    with Console(stderr=True).status("measuring: writing"):
        writing = _writing(over(target, () if kind.whole else layers), config)
    with Console(stderr=True).status("measuring: reading"):
        reading = _reading(over(target, layers), config)
    with Console(stderr=True).status("measuring: fitting"):
        step, checkpoint = _fitting(target, config, layers)
    speeds = Speeds(writing, reading, step, decoding, checkpoint)
    token_bytes = round(_rows(config) * feature_bytes(1, len(layers), target.config.hidden_size))
    stages = _stages(config, evaluating or Evaluating(), parts, token_bytes, speeds)
    return Estimate(stages, parts, batch, asked)


def _stages(
    config: TrainConfig,
    evaluating: Evaluating,
    parts: dict[str, int],
    token_bytes: int,
    speeds: Speeds,
) -> tuple[Stage, ...]:
    """What is still to be done, from speeds; `token_bytes`: features per answer token."""
    taken, written = _answer_tokens(config)
    wanted = max(0, config.answer_tokens - taken - written)
    count = wanted / (_ANSWER_SHARE * config.max_tokens)
    prompt_tokens = count / _USABLE_PROMPTS * _PROMPT_SHARE * config.prompt_tokens
    own = config.prompts is None
    tokens = taken + written + wanted
    cached = tokens * token_bytes <= config.cache_gb * 1e9
    steps = config.steps - fitted_steps(config.out)
    whole = kinds.of(config).whole
    read = features_folder(config.out, whole).glob("*.npy" if whole else f"{imports.PREFIX}*")
    unread = 0 if any(read) else tokens if whole else taken
    kept = tokens * token_bytes if cached else 0
    again = unread if cached else max(0, steps) * config.batch_positions
    questions = len(read_prompts(count=evaluating.prompts))
    live = questions * len(SHAPES) / _TOKENS_PER_STEP
    # An answer along which drafts are recorded is written, and then decoded again token by token.
    recorded = (1 + 1 / _TOKENS_PER_STEP) * min(RECORDED, questions)
    decoded = (live + recorded) * len(TEMPERATURES) * evaluating.max_tokens
    write, fit = (memory.of_stage(parts, names) for names in (memory.WRITING, memory.FITTING))
    text = round(tokens * 7 + count * 60 * 6)  # JSON takes about so much of a token
    return (
        Stage("prompts", _TAIL * prompt_tokens / speeds.writing if own else 0.0, write,
              round(count * 250), f"about {count:,.0f} prompts"),
        Stage("answers", _TAIL * wanted / speeds.writing, write,
              text + (0 if whole else kept),
              f"{speeds.writing:,.0f} tokens/s, batch {config.batch}"),
        Stage("fit", max(0, steps) * speeds.fitting + again / speeds.reading, fit,
              2 * speeds.checkpoint + (kept * whole if cached else round(config.cache_gb * 1e9)),
              f"{config.batch_positions / speeds.fitting:,.0f} positions/s"
              + (f", reading again at {speeds.reading:,.0f} tokens/s" if again else "")),
        Stage("evaluate", decoded * speeds.decoding, parts["target"] + parts["drafter"], 2_000_000,
              f"{questions} prompts of {evaluating.max_tokens} tokens, "
              f"{1000 * speeds.decoding:.0f} ms per step"),
    )  # fmt: skip


def _rows(config: TrainConfig) -> float:
    """Tokens whose features are kept, per answer token."""
    prompt = _PROMPT_SHARE * config.prompt_tokens / (_ANSWER_SHARE * config.max_tokens)
    return 1 + (prompt if kinds.of(config).whole else 0)


def _answer_tokens(config: TrainConfig) -> tuple[int, int]:
    """Answer tokens that are there already: from elsewhere, and written in the folder."""
    taken, written = imports.tokens(config.out)
    if not taken and config.answers is not None:
        taken = answer_tokens(config.answers)
    return taken, written


def _timed(work: Callable[[int], int], first: int) -> float:
    """Units per second of ``work(n)``, which does n units and returns how many it did."""
    work(1)  # compiles
    started = time.perf_counter()
    done = work(first)
    passed = time.perf_counter() - started
    more = int(done * _SECONDS / max(passed, 1e-6)) - done
    if more > done:
        more = min(more, 64 * done)
        started = time.perf_counter()
        done = work(more)
        passed = time.perf_counter() - started
    return done / passed


def _requests(config: TrainConfig, target: Target, rows: int, length: int) -> list[Request]:
    random = np.random.default_rng(0)
    tokens = random.integers(target.config.vocab_size, size=(rows, length))
    return [Request(row.tolist(), 0.8, i) for i, row in enumerate(tokens)]


def _writing(target: Sequences, config: TrainConfig) -> float:
    """Tokens per second with a full batch, prompts not counted."""
    rows = config.batch if target.together else 1
    requests = _requests(config, target.target, rows, 4)
    return rows / _step_seconds(target, requests, config.max_tokens)


def _step_seconds(target: Sequences, requests: list[Request], most: int) -> float:
    """Seconds of a step of writing answers of at most so many tokens.

    Reading the prompts can take much longer than a few steps, and never takes the same time: so
    there are steps until they take longer than that, and of several timings the shortest count.
    """

    def timed(tokens: int, times: int) -> float:
        found = []
        for _ in range(times):
            started = time.perf_counter()
            target.write(requests, tokens, ())
            found.append(time.perf_counter() - started)
        return min(found)

    timed(2, 1)  # compiles
    once, tokens = timed(1, _REPEATS), min(4, most)
    while True:
        steps = timed(tokens, 1) - once
        if tokens == most or steps > max(_ABOVE * once, _SECONDS / 4):
            break
        tokens = min(4 * tokens, most)
    if steps < max(_ABOVE * once, 4 * _SECONDS):  # else it is slow, and long enough to trust
        steps = timed(tokens, _REPEATS) - once
    return max(steps, 1e-9) / (tokens - 1)


def _reading(target: Sequences, config: TrainConfig) -> float:
    """Answer tokens per second whose features are computed again."""
    length = min(config.max_tokens, 256)
    rows = max(1, 1024 // length)
    random = np.random.default_rng(0)
    tokens = random.integers(target.target.config.vocab_size, size=(rows, length + 32)).tolist()

    def passes(n: int) -> int:
        for _ in range(n):
            target.read([(row[:32], row[32:]) for row in tokens])
        return n

    return _timed(passes, 1) * rows * length


def _fitting(target: Target, config: TrainConfig, layers: tuple[int, ...]) -> tuple[float, int]:
    """Seconds of an optimiser step on random data, and bytes of a checkpoint."""
    with tempfile.TemporaryDirectory(prefix="redrafter-estimate-") as name:
        place = Path(name)
        _random_answers(place, target, config, layers)
        times: list[float] = []

        def on_step(row: dict[str, object]) -> None:
            times.append(time.perf_counter())
            enough = len(times) > 2 and times[-1] - times[1] > _SECONDS
            if enough:
                raise _EnoughError

        many = replace(config, positions=64 * config.batch_positions)
        with contextlib.suppress(_EnoughError):
            Fit(target, many, place).run(on_step)
        size = checkpoint_file(place).stat().st_size
    spent = [b - a for a, b in itertools.pairwise(times[1:])]
    return float(np.median(spent)), size


class _EnoughError(Exception):
    """Ends a fit that is only measured."""


def _random_answers(
    place: Path, target: Target, config: TrainConfig, layers: tuple[int, ...]
) -> None:
    random = np.random.default_rng(0)
    length = max(config.segment + config.rollout + 1, min(config.max_tokens, 128))
    rows = max(8, -(-2 * config.batch_positions // length))
    before = max(1, round(_PROMPT_SHARE * config.prompt_tokens))
    tokens = random.integers(target.config.vocab_size, size=(rows, before + length)).tolist()
    write_lines(
        place / "answers" / "00000.jsonl",
        ({"prompt": row[:before], "answer": row[before:], "temp": 0.0} for row in tokens),
    )
    whole = kinds.of(config).whole
    record_layers(place, layers, whole)
    [shard] = shards(place, whole)
    shape = (shard.count(), len(layers), target.config.hidden_size)
    features = random.standard_normal(shape, np.float32).astype(np.float16)
    save_features(shard.features_file, [features])


def _decoding(target: Target, config: TrainConfig) -> float:
    """Seconds of a decoding step that checks a small tree: as many tokens in one pass, or one
    where sequences do not share any."""
    sequences = over(target, ())
    requests = _requests(config, target, _NODES if sequences.together else 1, 64)
    return _step_seconds(sequences, requests, config.max_tokens)


def show(estimate: Estimate) -> None:
    """Two tables on stdout."""
    out = Console(highlight=False)
    table = Table("stage", box=None, pad_edge=False, header_style="dim")
    for title in ("time", "memory", "disk"):
        table.add_column(title, justify="right")
    table.add_column("")
    for stage in estimate.stages:
        table.add_row(
            stage.name, duration(stage.seconds), _size(stage.memory), _size(stage.disk),
            stage.detail,
        )  # fmt: skip
    total = sum(stage.seconds for stage in estimate.stages)
    disk = sum(stage.disk for stage in estimate.stages)
    most = max(stage.memory for stage in estimate.stages)
    table.add_row("all", duration(total), _size(most), _size(disk), "", style="bold")
    out.print(table)
    parts = Table("memory by part", box=None, pad_edge=False, header_style="dim")
    parts.add_column("", justify="right")
    for name, size in estimate.memory.items():
        parts.add_row(name, _size(size))
    out.print()
    out.print(parts)
    if estimate.batch < estimate.asked:
        console.note(
            f"note: batch lowered from {estimate.asked} to {estimate.batch} to fit in memory"
        )


def _size(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
