"""How long training will take here, from half a minute of measuring, and what it will need."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_redrafter import console, hub
from mlx_redrafter.drafters.recurrent import ReDrafterConfig
from mlx_redrafter.drafters.rollout import feature_layers
from mlx_redrafter.info import device
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.batched import BatchedTarget, Request
from mlx_redrafter.prompts import read_prompts

from . import evaluate, initialise, memory
from .config import TrainConfig
from .fit import Fit
from .progress import duration
from .shards import feature_bytes, record_layers, save_features, write_lines

_SECONDS = 6.0  # of each measurement, about
_PROMPT_SHARE = 0.5  # length of a prompt of the model's, as a share of the longest
_ANSWER_SHARE = 0.75
_USABLE_PROMPTS = 0.85  # the others are cut off or were there before
_TAIL = 1.15  # batches get smaller while their last answers are written
_TOKENS_PER_STEP = 1.6
_NODES = 8


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


def measure(config: TrainConfig) -> Estimate:
    """Load the model and measure; nothing is written to the folder of the run."""
    target = load_model(hub.resolve(config.model))
    shape = initialise.drafter_config(config, target)
    weights, on_gpu = memory.weights_of(target), device() == "gpu"
    batch = memory.fitting_batch(
        config, target.config, shape, memory.usable_bytes(), weights=weights, on_gpu=on_gpu
    )
    asked, config = config.batch, replace(config, batch=batch)
    parts = memory.memory(config, target.config, shape, weights=weights, on_gpu=on_gpu)
    layers = feature_layers(target, shape)
    with Console(stderr=True).status("measuring: evaluation"):
        decoding = _decoding(target, config)
    with Console(stderr=True).status("measuring: writing"):
        writing = _writing(BatchedTarget(target, layers), config)
    with Console(stderr=True).status("measuring: reading"):
        reading = _reading(BatchedTarget(target, layers), config)
    with Console(stderr=True).status("measuring: fitting"):
        step, checkpoint = _fitting(target, config, shape)
    stages = _stages(config, target, parts, layers, writing, reading, step, checkpoint, decoding)
    return Estimate(stages, parts, batch, asked)


def _stages(
    config: TrainConfig,
    target: Decoder,
    parts: dict[str, int],
    layers: tuple[int, ...],
    writing: float,
    reading: float,
    step: float,
    checkpoint: int,
    decoding: float,
) -> tuple[Stage, ...]:
    """From speeds to stages. writing and reading are tokens/s, step and decoding seconds."""
    count = config.answer_tokens / (_ANSWER_SHARE * config.max_tokens)
    prompt_tokens = count / _USABLE_PROMPTS * _PROMPT_SHARE * config.prompt_tokens
    own = config.prompts is None
    features = feature_bytes(config.answer_tokens, len(layers), target.config.hidden_size)
    cached = features <= config.cache_gb * 1e9
    steps = max(1, config.positions // config.batch_positions)
    again = 0.0 if cached else config.positions / reading
    questions = len(read_prompts())
    live = questions * len(evaluate.SHAPES) * len(evaluate.TEMPERATURES) * 128 / _TOKENS_PER_STEP
    # An answer along which drafts are recorded takes about as long as its tokens one by one.
    recorded = min(evaluate.RECORDED, questions) * len(evaluate.TEMPERATURES) * 128
    write, fit = (memory.of_stage(parts, names) for names in (memory.WRITING, memory.FITTING))
    text = round(config.answer_tokens * 7 + count * 60 * 6)  # JSON takes about so much of a token
    return (
        Stage("prompts", _TAIL * prompt_tokens / writing if own else 0.0, write, round(count * 250),
              f"about {count:,.0f} prompts"),
        Stage("answers", _TAIL * config.answer_tokens / writing, write,
              text + (features if cached else 0), f"{writing:,.0f} tokens/s, batch {config.batch}"),
        Stage("fit", steps * step + again, fit,
              2 * checkpoint + (0 if cached else round(config.cache_gb * 1e9)),
              f"{config.batch_positions / step:,.0f} positions/s"
              + ("" if cached else f", reading again at {reading:,.0f} tokens/s")),
        Stage("evaluate", (live + recorded) * decoding, parts["target"] + parts["drafter"],
              2_000_000, f"{questions} prompts, {1000 * decoding:.0f} ms per step"),
    )  # fmt: skip


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


def _requests(config: TrainConfig, target: Decoder, rows: int, length: int) -> list[Request]:
    random = np.random.default_rng(0)
    tokens = random.integers(target.config.vocab_size, size=(rows, length))
    return [Request(row.tolist(), 0.8, i) for i, row in enumerate(tokens)]


def _writing(target: BatchedTarget, config: TrainConfig) -> float:
    """Tokens per second with a full batch; the time to read its prompts is taken off."""
    requests = _requests(config, target.target, config.batch, 16)

    def steps(n: int) -> int:
        target.write(requests, min(n + 1, config.max_tokens), ())
        return min(n + 1, config.max_tokens)

    steps(1)
    started = time.perf_counter()
    steps(0)
    once = time.perf_counter() - started
    n = int(min(config.max_tokens - 1, max(4, _SECONDS / max(once, 1e-6))))
    started = time.perf_counter()
    steps(n)
    return n * config.batch / max(time.perf_counter() - started - once, 1e-6)


def _reading(target: BatchedTarget, config: TrainConfig) -> float:
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


def _fitting(target: Decoder, config: TrainConfig, shape: ReDrafterConfig) -> tuple[float, int]:
    """Seconds of an optimiser step on random data, and bytes of a checkpoint."""
    with tempfile.TemporaryDirectory(prefix="redrafter-estimate-") as name:
        place = Path(name)
        _random_answers(place, target, config, feature_layers(target, shape))
        times: list[float] = []

        def on_step(row: dict[str, object]) -> None:
            times.append(time.perf_counter())
            enough = len(times) > 2 and times[-1] - times[1] > _SECONDS
            if enough:
                raise _EnoughError

        many = replace(config, positions=64 * config.batch_positions)
        with contextlib.suppress(_EnoughError):
            Fit(target, many, place).run(on_step)
        size = (place / "fit" / "checkpoint.safetensors").stat().st_size
    spent = [b - a for a, b in itertools.pairwise(times[1:])]
    return float(np.median(spent)), size


class _EnoughError(Exception):
    """Ends a fit that is only measured."""


def _random_answers(
    place: Path, target: Decoder, config: TrainConfig, layers: tuple[int, ...]
) -> None:
    random = np.random.default_rng(0)
    length = max(config.segment + config.rollout + 1, min(config.max_tokens, 128))
    rows = max(8, -(-2 * config.batch_positions // length))
    tokens = random.integers(target.config.vocab_size, size=(rows, length)).tolist()
    write_lines(
        place / "answers" / "00000.jsonl",
        ({"prompt": row[:4], "answer": row, "temp": 0.0} for row in tokens),
    )
    record_layers(place, layers)
    shape = (rows * length, len(layers), target.config.hidden_size)
    save_features(place / "features" / "00000.npy", [random.standard_normal(shape, np.float32)
                                                     .astype(np.float16)])  # fmt: skip


def _decoding(target: Decoder, config: TrainConfig) -> float:
    """Seconds of a decoding step that checks a small tree: as many tokens in one pass."""
    plain = BatchedTarget(target, ())
    requests = _requests(config, target, _NODES, 64)

    def steps(n: int) -> int:
        plain.write(requests, min(n + 1, config.max_tokens), ())
        return n

    return 1 / _timed(steps, 8)


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
