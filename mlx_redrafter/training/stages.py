"""The four stages of training a drafter: prompts, answers, fit, evaluation.

All that a stage makes is in the folder, written whole file by whole file: each stage can run alone
and be stopped at any time, and goes on with what is missing. The result is the same either way.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import HubError, ModelError, OptionError
from mlx_redrafter.hub import kept, resolve
from mlx_redrafter.models import Loaded, Target, load_model
from mlx_redrafter.models.batched import over, takes
from mlx_redrafter.models.sequences import Request, Sequences, Told
from mlx_redrafter.runtime.device import device
from mlx_redrafter.terminal import console
from mlx_redrafter.text.tokenizer import load_tokenizer
from mlx_redrafter.training import (
    agreement,
    dates,
    folder,
    imports,
    kinds,
    lines,
    memory,
    thoughts,
)
from mlx_redrafter.training.answers import write_shard
from mlx_redrafter.training.config import Evaluating, TrainConfig
from mlx_redrafter.training.data import KEPT, Cache, compute_features
from mlx_redrafter.training.progress import Bar
from mlx_redrafter.training.shards import (
    Shard,
    answer_tokens,
    feature_bytes,
    reading,
    record_layers,
    recorded_layers,
    shards,
)
from mlx_redrafter.training.supply import Supply

EXPECTED = 0.75  # length of an answer, as a share of the longest, before any is known
FROM_MEASURED = 1.02  # prompts more than the answers so far say are needed


@dataclass
class Run:
    """A training run: its configuration and what is loaded for it.

    Raises OptionError, DrafterError: options that do not go with the model.
    """

    config: TrainConfig
    target: Target
    tokenizer: TokenizerWrapper
    evaluating: Evaluating = field(default_factory=Evaluating)
    place: Path = Path()  # of the model's files

    def __post_init__(self) -> None:
        config, context = self.config, self.target.config.max_positions
        self.lengths = thoughts.lengths(config, self.tokenizer)
        if memory.longest_prompt(replace(config, prompts=None)) + self.lengths.most > context:
            raise OptionError(
                f"prompts of {config.prompt_tokens} and answers of {self.lengths.most} tokens do "
                f"not fit in this model's context of {context}: lower max_tokens, prompt_tokens, "
                "or the thought_tokens of a model that thinks"
            )
        self.trainee = kinds.of(config)(self.target, config)
        if config.warm_start is not None and not folder.fitting(config.out):
            self.trainee.warm()
        self.chats: bool = self.tokenizer.has_chat_template
        self.writer = over(self.target, ())
        self._feature_writer: Sequences | None = None
        self._supply: Supply | None = None

    @property
    def supply(self) -> Supply:
        if self._supply is None:
            self._supply = Supply(self.config, self.writer, self.tokenizer)
        return self._supply

    @property
    def feature_writer(self) -> Sequences:
        """A writer that keeps the features of its answers."""
        if self._feature_writer is None:
            self._feature_writer = over(self.target, _settled_layers(self))
        return self._feature_writer

    def forget(self) -> None:
        """Give the memory of the model back; the run can do nothing more with it."""
        del self.target, self.writer, self.trainee
        self._supply = self._feature_writer = None
        gc.collect()  # compiled functions and what they are of refer to each other
        mx.clear_cache()

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers whose outputs the fit needs."""
        return self.trainee.layers_of(self.trainee.shape, self.target.config)


def open_run(
    config: TrainConfig, before: TrainConfig | None, evaluating: Evaluating | None = None
) -> Run:
    """Load the model, lower the batch to what fits in memory, and write the configuration down."""
    place = resolve(config.model)
    target, tokenizer = load_model(place), load_tokenizer(place)
    longest = thoughts.lengths(config, tokenizer).most
    config = replace(config, batch=_batch(config, longest, before, target))
    run = Run(config, target, tokenizer, evaluating or Evaluating(), place)
    if before != config:
        folder.write(config)
    dates.settle(tokenizer, folder.began(config.out))
    return run


def _batch(config: TrainConfig, longest: int, before: TrainConfig | None, target: Loaded) -> int:
    """The batch as given, or as low as the memory for answers of at most ``longest`` tokens needs;
    once there is text, as it was.

    Warns of a drafter that is too large.
    """
    if before is not None and before.batch == config.batch:
        return config.batch
    shape, on_gpu = kinds.of(config).shape_of(config, target.config), device() == "gpu"
    available, weights = memory.usable_bytes(), memory.weights_of(target)
    here: dict[str, Any] = {"weights": weights, "on_gpu": on_gpu, "together": takes(target)}
    with_thoughts = replace(config, max_tokens=longest)
    fitting = memory.fitting_batch(with_thoughts, target.config, shape, available, **here)
    parts = memory.memory(config, target.config, shape, **here)
    if memory.of_stage(parts, memory.FITTING) > available:
        console.warn(
            f"warning: the fit of this drafter needs about "
            f"{memory.of_stage(parts, memory.FITTING) / 2**30:.0f} GB, this machine has "
            f"{available / 2**30:.0f} GB to spare: lower draft_vocab_size or exit_dim"
        )
    if before is not None and "batch" in folder.decided(config.out):
        folder.refuse(before, replace(config, batch=fitting), ["batch"])
    elif fitting < config.batch:
        console.note(
            f"note: batch lowered from {config.batch} to {fitting}, which needs about "
            f"{available / 2**30:.0f} GB"
        )
    return fitting


def prompts(run: Run) -> None:
    """Take in earlier answers, and have enough prompts for the others."""
    config = run.config
    _take_in(run)
    missing = config.answer_tokens - imports.tokens(config.out)[0]
    if missing <= 0:
        return
    _extend(run, math.ceil(missing / (EXPECTED * run.lengths.mean)))


def _take_in(run: Run) -> None:
    """Take in the answers of an earlier run, if there are any."""
    if run.config.answers is not None:
        imports.take(run.config.answers, run.config.out, run.target.config, run.tokenizer)


def _extend(run: Run, count: int) -> None:
    """Have at least so many prompts, in whole batches of answers."""
    count, have = _whole(run, count), len(run.supply.rows)
    if have < count and run.config.prompts is not None:
        run.supply.extend(count)
    elif have < count:
        with Bar("prompts", count, "prompts", have) as bar:
            run.supply.extend(count, lambda n, tokens: bar.to(n, _of_next(tokens)))


def _whole(run: Run, count: int) -> int:
    return math.ceil(count / run.config.batch) * run.config.batch


def answers(run: Run) -> None:
    """Answer prompts until there are enough tokens; more prompts are written if they run out."""
    config = run.config
    prompts(run)
    imported, written = imports.tokens(config.out)
    if imported >= config.answer_tokens:
        return
    tokens, done, room = imported, 0, _room(run, imported, written)
    with Bar("answers", config.answer_tokens, "tokens", imported + written) as bar:
        while True:
            for start, stop in run.supply.batches(config.batch):
                if stop <= done:
                    continue
                tokens = _answer_pool(run, room, (start, stop), tokens, bar)
                done = stop
                if tokens >= config.answer_tokens:
                    return
            # The answers are shorter than was expected.
            each = max(1.0, (tokens - imported) / max(done, 1))
            count = math.ceil((config.answer_tokens - imported) / each * FROM_MEASURED)
            run.supply.extend(_whole(run, max(count, done + 1)), partial(_wrote, bar))


def _wrote(bar: Bar, prompts: int, tokens: int) -> None:
    bar.to(bar.done, f"{prompts} prompts, {_of_next(tokens)}")


def _of_next(tokens: int) -> str:
    return f"{tokens:,} tokens of the next"


class _Written(Told):
    """Moves a bar by tokens."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar

    def tokens(self, count: int) -> None:
        self.bar.add(count)


def _answer_pool(run: Run, room: float, pool: tuple[int, int], tokens: int, bar: Bar) -> int:
    """Answer what is not answered in a pool of prompts, and keep its features until there are so
    many tokens; answer tokens so far, ``tokens`` before."""
    config, size = run.config, run.config.batch
    files = [_shard(config.out, i) for i in range(pool[0] // size, pool[1] // size)]
    batches: list[list[Request]] = []
    for number, shard in enumerate(files):
        if tokens >= config.answer_tokens:
            break
        if shard.file.is_file():
            tokens += answer_tokens(shard.file)
            continue
        batches = batches or run.supply.requests(*pool, size)
        keep = tokens + sum(r.longest(config.max_tokens) for r in batches[number]) <= room
        tokens += write_shard(
            run.feature_writer if keep else run.writer,
            batches[number], shard, max_tokens=config.max_tokens,
            end_tokens=run.tokenizer.eos_token_ids, told=_Written(bar),
        )  # fmt: skip
        bar.to(tokens)
    return tokens


def _settled_layers(run: Run) -> tuple[int, ...]:
    """Layers of the features in the folder; if others are needed now, what is there is removed."""
    whole = run.trainee.whole
    found = recorded_layers(run.config.out, whole)
    if found is not None and set(run.layers) <= set(found):
        return found
    for shard in shards(run.config.out, whole):
        shard.features_file.unlink(missing_ok=True)
    record_layers(run.config.out, run.layers, whole)
    return run.layers


def _room(run: Run, imported: int, written: int) -> float:
    """Up to how many answer tokens their features are kept while they are written."""
    if run.trainee.whole:
        return 0.0
    each = feature_bytes(1, len(run.layers), run.target.config.hidden_size)
    room = run.config.cache_gb * 1e9 / each
    if max(run.config.answer_tokens, imported + written) <= room:
        return math.inf
    return imported + KEPT * room


def fit(run: Run) -> None:
    """Train the drafter on the answers in the folder, and write it to ``drafter``."""
    config = run.config
    _take_in(run)
    if not shards(config.out):
        raise OptionError(
            f"{config.out} has no answers to train on: run `{lines.train(config, 'answers')}` "
            "first, or give some with --answers FILE"
        )
    from mlx_redrafter.training.fit import fit as fit_drafter

    agreement.warn(run.supply)
    _read_features(run)
    _note_new_answers(config.out, sum(imports.tokens(config.out)))
    with Bar("fit", config.steps, "steps", fitted_steps(config.out)) as bar:
        fit_drafter(run.target, config, config.out, lambda row: bar.to(row["step"], _state(row)))


def _read_features(run: Run) -> None:
    """Compute the features that will be kept and are missing, where the progress can be seen."""
    config, layers = run.config, _settled_layers(run)
    every = [(s, s.count()) for s in shards(config.out, run.trainee.whole)]
    each = feature_bytes(1, len(layers), run.target.config.hidden_size)
    kept = Cache.of([each * n for _, n in every], config.cache_gb * 1e9, 1).kept
    missing = [(s, tokens) for s, tokens in every[:kept] if not s.features_file.is_file()]
    if not missing:
        return
    reader = over(run.target, layers)
    with Bar("reading answers", sum(tokens for _, tokens in missing), "tokens") as bar:
        for shard, tokens in missing:
            compute_features(reader, layers, shard)
            mx.clear_cache()
            bar.add(tokens)


def _note_new_answers(out: Path, tokens: int) -> None:
    """Remember what the fit began with; say so if it goes on with more."""
    file, now = out / "fit" / "answers.json", {"answer_tokens": tokens}
    if not folder.fitting(out) or not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(now) + "\n")
        return
    with reading(file, f"delete {file.parent} to fit anew"):
        began = int(json.loads(file.read_text())["answer_tokens"])
    if began != now["answer_tokens"]:
        console.warn(
            f"warning: the fit in {out / 'fit'} began with {began:,} answer tokens and goes on "
            f"with {now['answer_tokens']:,}: delete it to fit anew"
        )


def fitted_steps(out: Path) -> int:
    """Optimiser steps that the fit in the folder has behind it."""
    saved = folder.checkpoint(out)
    return 0 if saved is None else int(saved[1]["step"])


def _state(row: dict[str, Any]) -> str:
    if "loss" not in row:
        return ""
    return f"loss {row['loss']:.2f}, first draft right {row['agreement'][0]:.0%}"


def evaluate(run: Run) -> None:
    """Measure the drafter live on prompts kept out of training; write plots, its model card, and
    the table of what every shape of a step yields."""
    from mlx_redrafter.api import load
    from mlx_redrafter.evaluation import positions
    from mlx_redrafter.evaluation.prompts import read_prompts
    from mlx_redrafter.training import card, pace, plots

    config, place = run.config, run.config.out / "drafter"
    if not (place / "config.json").is_file():
        needed = "fit" if shards(config.out) else None
        raise OptionError(
            f"{config.out} has no drafter yet: run `{lines.train(config, needed)}` first"
        )
    # Decoder anew with its drafter; the run's own copy would double the memory.
    run.forget()
    model, tokenizer = load(config.model, str(place))
    dates.settle(tokenizer, folder.began(config.out))
    count, tokens = pace.extent(config.out, run.evaluating, model, tokenizer)
    chosen = read_prompts(count=count)
    with Bar("evaluation", positions.answers(len(chosen)), "answers") as bar:
        result = positions.evaluate(model, tokenizer, chosen, max_tokens=tokens, on_answer=bar.add)
    positions.write(place, result)
    plots.write_all(place, config.out / "fit" / "log.jsonl")
    conversations = [c for s in shards(config.out) for c in s.conversations()]
    seen = fitted_steps(config.out) * config.batch_positions
    shown = lines.Shown(config)
    text = card.render(
        place, config, card.Recipe.of(conversations, seen),
        made_by=shown.made_by(), measured_by=shown.measured_by(len(chosen), tokens),
        chats=run.chats,
    )  # fmt: skip
    (place / card.FILE).write_text(text, encoding="utf-8")
    for row in result.live:
        if row.group == "all":
            console.note(
                f"{row.shape}, temperature {row.temp:g}: {row.stats.tokens_per_step:.2f} tokens "
                "per step"
            )


def keep(run: Run) -> Path | None:
    """Keep the drafter where it is found for this model, and say so if that is not possible."""
    from mlx_redrafter.evaluation.positions import short_name

    out, name = run.config.out, short_name(run.config.model)
    try:
        weights = kept.fingerprint(run.place)
        return kept.keep(out / "drafter", name, weights, out, folder.began(out))
    except (HubError, ModelError, OSError) as error:
        console.warn(f"warning: the drafter is not kept for this model: {error}")
        return None


STAGES: dict[str, Callable[[Run], None]] = {
    "prompts": prompts, "answers": answers, "fit": fit, "evaluate": evaluate,
}  # fmt: skip


def _shard(out: Path, number: int) -> Shard:
    return Shard(out / "answers" / f"{number:05d}.jsonl", out / "features" / f"{number:05d}.npy")
