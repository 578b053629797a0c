"""How long training will take here, and what it will need: by arithmetic, from a trial."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from mlx_redrafter.api import load
from mlx_redrafter.hub import resolve
from mlx_redrafter.models import load_model
from mlx_redrafter.models.batched import takes
from mlx_redrafter.runtime.device import device
from mlx_redrafter.terminal import console
from mlx_redrafter.text.tokenizer import load_tokenizer
from mlx_redrafter.training import dates, folder, imports, kinds, memory, pace, thoughts
from mlx_redrafter.training.config import Evaluating, TrainConfig
from mlx_redrafter.training.data import HELD_OUT, Cache
from mlx_redrafter.training.fit import HELD_OUT_BATCHES, HELD_OUT_CHECKS, LOG_EVERY
from mlx_redrafter.training.pace import Pace
from mlx_redrafter.training.progress import duration
from mlx_redrafter.training.shards import (
    answer_tokens,
    feature_bytes,
    read_conversations,
    read_lines,
    shards,
)
from mlx_redrafter.training.stages import EXPECTED, FROM_MEASURED, fitted_steps
from mlx_redrafter.training.trial import SHORT, Fitted, Trial, Written

# Tokens of a live step of the evaluation by the positions trained on, built-in model: 1.26 after
# 30,000, 2.05 after 12 million (docs/decisions.md).
_YIELD, _PER_DECADE, _AT = 1.26, 0.31, 30_000


class Measured(NamedTuple):
    """What the trial says: of prompts (with the share that can be used) and answers, of prompts in
    their template (tokens), of the fit; seconds to load a model, and of the evaluation.
    ``expected``: tokens of an answer before any is known; ``read``: seconds of a token.
    """

    expected: float
    read: float
    prompts: Written
    usable: float
    answers: Written
    before: float
    fitted: Fitted
    loading: float
    pace: Pace


class Text(NamedTuple):
    """What writing takes: prompts and their seconds, batches of answers and theirs, and the seconds
    of prompts that turn out to be missing meanwhile."""

    prompts: int
    asking: float
    batches: int
    answering: float
    more: float


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


def measure(config: TrainConfig, evaluating: Evaluating | None = None) -> Estimate:
    """Load the model and try everything; nothing is written to the folder of the run."""
    asked = config.batch
    with tempfile.TemporaryDirectory(prefix="redrafter-estimate-") as name:
        config, parts, layers, found = _tried(config, Path(name))
        gc.collect()  # the model is loaded anew with its drafter, as the evaluation does it
        mx.clear_cache()
        with Console(stderr=True).status("measuring: evaluation"):
            started = time.perf_counter()
            model, tokenizer = load(config.model, f"{name}/drafter")
            loading = time.perf_counter() - started
            dates.settle(tokenizer, folder.began(config.out))
            measured = found(loading, pace.measure(model, tokenizer))
    each = feature_bytes(1, layers, model.target.config.hidden_size)
    stages = _stages(config, evaluating or Evaluating(), parts, each, measured)
    return Estimate(stages, parts, config.batch, asked)


Tried = tuple[TrainConfig, dict[str, int], int, Callable[[float, Pace], Measured]]
"""The configuration with the batch that fits, memory by part, layers kept, and what was found."""


def _tried(config: TrainConfig, place: Path) -> Tried:
    """All but the evaluation."""
    folder_of = resolve(config.model)
    target, tokenizer = load_model(folder_of), load_tokenizer(folder_of)
    dates.settle(tokenizer, folder.began(config.out))
    kind = kinds.of(config)
    shape = kind.shape_of(config, target.config)
    here: dict[str, Any] = {
        "weights": memory.weights_of(target), "on_gpu": device() == "gpu",
        "together": takes(target),
    }  # fmt: skip
    lengths = thoughts.lengths(config, tokenizer)
    sized = replace(config, max_tokens=lengths.most)
    batch = memory.fitting_batch(sized, target.config, shape, memory.usable_bytes(), **here)
    config = replace(config, batch=batch)
    parts = memory.memory(replace(sized, batch=batch), target.config, shape, **here)
    layers = kind.layers_of(shape, target.config)
    trial = Trial(target, tokenizer, config, place, layers, kind.whole)
    with Console(stderr=True).status("measuring: writing"):
        steps = trial.steps(read := trial.reading())
        supply, prompts, usable = trial.prompts(steps)
        answers, before = trial.answers(supply, steps)
    _, files = imports.split(config.out)
    if files:  # these are what is to be known
        found = [c for file in files for c in read_conversations(file)]
        answers = replace(answers, lengths=[len(c.answer) for c in found])
        before = float(np.mean([len(c.prompt) for c in found]))
    if (waves := _prompts(config)) and config.prompts is None:
        usable = sum(waves) / (len(waves) * memory.wave(config))
    with Console(stderr=True).status("measuring: fitting"):
        fitted = trial.fit(supply)
    expected = EXPECTED * lengths.mean
    tried = partial(Measured, expected, read, prompts, usable, answers, before, fitted)
    return config, parts, len(layers), tried


def _prompts(config: TrainConfig) -> list[int]:
    """Prompts in the folder, by file."""
    return [len(read_lines(file)) for file in sorted((config.out / "prompts").glob("*.jsonl"))]


def _stages(
    config: TrainConfig, asked: Evaluating, parts: dict[str, int], each: int, found: Measured
) -> tuple[Stage, ...]:
    """What is still to be done; `each`: bytes of a token's features."""
    taken, written = _answer_tokens(config)
    text = _text(config, found, taken, written)
    mean = found.answers.mean
    tokens = round(taken + written + text.batches * config.batch * mean)
    again, kept = _features(config, found, text.batches, each)
    fit = _fit(config, found, tokens, again)
    done = folder.checkpoint(config.out)
    room = pace.room(fit + (float(done[1]["seconds"]) if done else 0.0))
    evaluation = found.pace
    decades = math.log10(max(config.positions, _AT) / _AT)
    evaluation = replace(evaluation, per_step=_YIELD + _PER_DECADE * decades)
    questions, longest = evaluation.chosen(asked, room)
    length = float(np.mean(np.minimum(found.answers.lengths, longest)))
    tried = 0.0 if asked.prompts and asked.max_tokens else found.pace.trial
    write, train, measure_ = (memory.of_stage(parts, names) for names in memory.STAGES)
    lines = round(text.prompts * 250), round(tokens * 7 + text.batches * config.batch * 360)
    speed = config.batch * mean / found.answers.seconds(config.batch, found.before)
    whole = kinds.of(config).whole
    return (
        Stage("prompts", text.asking, write, lines[0],
              f"about {text.prompts:,}, {found.usable:.0%} of those written can be used"),
        Stage("answers", text.answering + text.more, write, lines[1] + (0 if whole else kept),
              f"{speed:,.0f} tokens/s, batch {config.batch}, {mean:.0f} tokens each"),
        Stage("fit", fit, train, 2 * found.fitted.checkpoint + (kept if whole else 0),
              f"{config.batch_positions / found.fitted.step:,.0f} positions/s"
              + (f", reading {again:,.0f} tokens again at {1 / found.read:,.0f}/s"
                 if again else "")),
        Stage("evaluate", tried + found.loading + evaluation.seconds(questions, length), measure_,
              2_000_000, f"{questions} prompts of {longest} tokens, "
              f"{1000 * evaluation.step:.0f} ms per step"),
    )  # fmt: skip


def _text(config: TrainConfig, found: Measured, taken: int, written: int) -> Text:
    """As `stages.prompts` and `stages.answers` go about it."""
    wanted = max(0, config.answer_tokens - taken - written)
    size, mean = config.batch, found.answers.mean
    batches = math.ceil(wanted / (mean * size))
    # The mean is not known so well as to tell whether the last of them is still needed.
    likely = max(1.0, wanted / (mean * size) + 0.5) if wanted else 0.0
    rows = memory.wave(config)
    have = sum(_prompts(config))
    answered = len(imports.split(config.out)[1]) * size
    first = math.ceil((config.answer_tokens - taken) / found.expected / size) * size
    needed = answered + batches * size
    a_wave = found.prompts.seconds(rows, SHORT)
    an_answer = found.answers.seconds(size, found.before)
    counts = [0, 0]
    if config.prompts is None and wanted:
        each = max(found.usable, 1 / rows) * rows
        counts[0] = math.ceil(max(0, first - have) / each)
        missing = needed - have - counts[0] * each
        if missing > 0:
            counts[1] = math.ceil((missing + (FROM_MEASURED - 1) * needed) / each)
    return Text(
        max(0, max(first, needed) - have) if wanted else 0,
        counts[0] * a_wave, batches, likely * an_answer, counts[1] * a_wave,
    )  # fmt: skip


def _features(config: TrainConfig, found: Measured, batches: int, each: int) -> tuple[float, int]:
    """Tokens to be read again for features that are not kept, and bytes on disk."""
    whole = kinds.of(config).whole
    prompt = found.before if whole else 0.0
    every = [(s.count(), s.features_file.is_file()) for s in shards(config.out, whole)]
    ours = len(imports.split(config.out)[1])
    new = round(config.batch * (found.answers.mean + prompt))
    every[ours:ours] = [(new, not whole)] * batches
    if config.answers is not None and len(every) == ours + batches:
        every += [(answer_tokens(config.answers), False)]
    trained = sum(n for n, _ in every) * (1 - 1 / HELD_OUT) or 1
    answers = trained * found.answers.mean / (found.answers.mean + prompt)
    passes = config.positions / answers
    cache = Cache.of([each * n for n, _ in every], config.cache_gb * 1e9, passes)
    kept, rest = every[: cache.kept], every[cache.kept :]
    left = 1 - fitted_steps(config.out) / config.steps
    turns = left * passes / cache.visits if rest else 0.0
    again = sum(n for n, there in kept if not there) + turns * sum(n for n, _ in rest)
    if not whole:
        again *= 1 + found.before / found.answers.mean
    stays = each * sum(n for n, _ in kept)
    return again, stays if not rest else round(config.cache_gb * 1e9)


def _fit(config: TrainConfig, found: Measured, tokens: int, again: float) -> float:
    """Seconds of what is left of the fit."""
    left = max(0, config.steps - fitted_steps(config.out))
    every = max(LOG_EVERY, config.steps // HELD_OUT_CHECKS // LOG_EVERY * LOG_EVERY)
    batches = min(HELD_OUT_BATCHES, 1 + tokens / HELD_OUT / config.batch_positions)
    scoring = (left / every + 1) * batches * found.fitted.scored
    fitting = left * found.fitted.step + (scoring if left else 0.0)
    return found.fitted.once + fitting + again * found.read


def _answer_tokens(config: TrainConfig) -> tuple[int, int]:
    """Answer tokens that are there already: from elsewhere, and written in the folder."""
    taken, written = imports.tokens(config.out)
    if not taken and config.answers is not None:
        taken = answer_tokens(config.answers)
    return taken, written


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
