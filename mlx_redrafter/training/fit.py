"""Fitting a drafter to its target: batches, loss, optimiser, checkpoints, result.

What a kind of drafter brings to it is a ``kinds.Trainee``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_redrafter.drafters.rollout import final_hidden
from mlx_redrafter.models import Target
from mlx_redrafter.models.batched import over
from mlx_redrafter.training import kinds
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.conversations import Conversations
from mlx_redrafter.training.data import Batch, Positions
from mlx_redrafter.training.folder import checkpoint, checkpoint_file
from mlx_redrafter.training.kinds.trainee import frequent
from mlx_redrafter.training.losses import distillation, softmax
from mlx_redrafter.training.shards import read_lines, reading

SUPPORT = 8192  # tokens that soft targets are computed on where the draft vocabulary is larger
LOG_EVERY = 25
HELD_OUT_CHECKS, HELD_OUT_BATCHES = 20, 8
CHECKPOINT_SECONDS = 120.0

Triple = tuple[mx.array, mx.array, mx.array]
OnStep = Callable[[dict[str, Any]], None]


class Fit:
    """One training run; everything that changes is in ``trainee``, ``optimizer`` and ``step``.

    Args:
        target: frozen.
        config: how to train.
        folder: with the answers; checkpoint and log go to ``folder/fit``.
    """

    def __init__(self, target: Target, config: TrainConfig, folder: Path) -> None:
        self.target, self.config, self.folder = target, config, folder
        self.steps = config.steps
        self.trainee = kinds.of(config)(target, config)
        layers = self.trainee.layers_of(self.trainee.shape, target.config)
        self.runs = max(1, config.batch_positions // config.segment)
        self.data = (Conversations if self.trainee.whole else Positions)(
            folder, over(target, layers), config.segment, config.rollout,
            config.cache_gb * 1e9, config.positions,
        )  # fmt: skip
        self.step, self.seconds = 0, 0.0
        saved = checkpoint(folder)
        if saved is None:
            self._begin()
        else:
            with reading(self._checkpoint, f"delete {self._checkpoint.parent} to fit anew"):
                self._go_on(*saved)
        self._prepare_candidates()
        state = [self.drafter.state, self.optimizer.state]
        self._update = mx.compile(self._train_step, inputs=state, outputs=state)
        self._score = mx.compile(self._measure, inputs=[self.drafter.state])

    @property
    def drafter(self) -> nn.Module:
        """What is trained."""
        return self.trainee.module

    def _begin(self) -> None:
        """A new drafter, or the one of a warm start."""
        self.log_file.unlink(missing_ok=True)
        size, drafted = self.target.config.vocab_size, self.trainee.shape.draft_vocab_size
        self.support = frequent(self.data.frequencies(size), min(drafted or SUPPORT, size))
        vocabulary = self.support if drafted else None
        self.trainee.begin(vocabulary, mx.array(self.data.sample(2048)))
        if drafted:
            self.support = np.array(self.drafter.draft_vocab)
        self.optimizer = self._optimizer()
        self.optimizer.init(self.drafter.trainable_parameters())

    def _go_on(self, arrays: dict[str, mx.array], facts: dict[str, str]) -> None:
        """All as it was: also the draft vocabulary and the scales, were there more answers now."""
        self.step, self.seconds = int(facts["step"]), float(facts["seconds"])
        parts: dict[str, list[tuple[str, mx.array]]] = {"drafter": [], "optimizer": []}
        for name, value in arrays.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part].append((rest, value))
        self.support = np.array(arrays["support"])
        self.trainee.go_on(tree_unflatten(parts["drafter"]), facts)
        self.optimizer = self._optimizer()
        self.optimizer.init(self.drafter.trainable_parameters())
        self.optimizer.state = tree_unflatten(parts["optimizer"])
        mx.eval(self.drafter.state, self.optimizer.state)
        if self.log_file.is_file():
            rows = read_lines(self.log_file)
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= self.step]
            self.log_file.write_text("".join(kept))

    # Candidates

    def _prepare_candidates(self) -> None:
        """Which output rows and token ids the candidates have: the support first, then the rest."""
        drafted = self.trainee.shape.draft_vocab_size
        rows = drafted or self.target.config.vocab_size
        if drafted:
            order, ids = np.arange(rows), self.support
        else:
            others = np.setdiff1d(np.arange(rows), self.support)
            order = ids = np.concatenate([self.support, others])
        self._row_of, self._id_of = mx.array(order, mx.int32), mx.array(ids, mx.int32)
        self._target_rows = self.target.head_rows(mx.array(self.support))
        count = min(self.config.candidates, rows)
        self.drawn = 0 if count == rows else count // 4
        self.likely = min(count - self.drawn, len(self.support))
        self.rest = rows - self.likely
        self.drawn = min(self.drawn, self.rest)
        mx.eval(self._row_of, self._id_of, self._target_rows)

    def _candidates(
        self, p: mx.array, weights: mx.array, drawn: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The batch's likeliest tokens, and a random part of the others with their correction.

        p (M, support), weights (M,), drawn (R,) -> indices (S,), log of what each stands for (S,).
        """
        mass = mx.sum(p * weights[:, None], axis=0)
        order = mx.argsort(-mass).astype(mx.int32)
        beyond = mx.arange(len(self.support), self._row_of.shape[0], dtype=mx.int32)
        others = mx.concatenate([order[self.likely :], beyond])
        chosen = mx.concatenate([order[: self.likely], others[drawn]])
        factor = float(np.log(self.rest / self.drawn)) if self.drawn else 0.0
        correction = mx.concatenate([mx.zeros((self.likely,)), mx.full((self.drawn,), factor)])
        return mx.stop_gradient(chosen), correction

    def _draw(self, step: int) -> mx.array:
        random = np.random.default_rng((self.config.seed, 7, step))
        return mx.array(random.choice(self.rest, self.drawn, replace=False), mx.int32)

    # Loss

    def _loss(self, batch: dict[str, mx.array], acceptance: mx.array) -> Triple:
        """Loss per position, acceptance and agreement of every draft step (K,)."""
        config, steps = self.config, self.config.rollout
        tokens, features, valid = batch["tokens"], batch["features"], batch["valid"]
        runs, length = tokens.shape[0], tokens.shape[1] - steps

        hidden = final_hidden(self.target, features[:, 1:]).reshape(-1, features.shape[-1])
        p = softmax(self.target.scaled(hidden @ self._target_rows.T).astype(mx.float32))
        counted = mx.pad(valid[0], [(0, 0), (0, steps - 1)]).reshape(-1)
        chosen, correction = self._candidates(p, counted, batch["drawn"])
        p = mx.take(mx.pad(p, [(0, 0), (0, self._row_of.shape[0] - p.shape[1])]), chosen, axis=1)
        p = p * mx.exp(correction)
        p = mx.stop_gradient(p / mx.maximum(mx.sum(p, axis=1, keepdims=True), 1e-9))
        p = p.reshape(runs, length + steps - 1, -1)
        ids = mx.take(self._id_of, chosen)

        inputs = self.trainee.inputs(batch)
        rows = mx.take(self.trainee.output_rows(), mx.take(self._row_of, chosen), axis=0)

        loss, total = mx.array(0.0), mx.array(0.0)
        accepted, agreed = [], []
        for k, x in enumerate(inputs):
            soft = p[:, k : k + length].reshape(runs * length, -1)
            truth = tokens[:, k + 1 : k + 1 + length].reshape(-1, 1) == ids
            goal = (1 - config.hard) * soft + config.hard * truth.astype(mx.float32)
            weights = valid[k].reshape(-1)
            logits = x @ rows.T + correction
            part, q, overlap = cast(Triple, distillation(logits, goal, weights, acceptance))
            loss = loss + part * config.step_decay**k
            total = total + mx.sum(weights) * config.step_decay**k
            same = mx.argmax(mx.stop_gradient(q), axis=1) == mx.argmax(soft, axis=1)
            count = mx.maximum(mx.sum(weights), 1)
            accepted.append(mx.sum(mx.stop_gradient(overlap) * weights) / count)
            agreed.append(mx.sum(same * weights) / count)
        return loss / mx.maximum(total, 1), mx.stack(accepted), mx.stack(agreed)

    def _train_step(self, batch: dict[str, mx.array], acceptance: mx.array) -> Triple:
        def loss(*_: Any) -> Triple:
            return self._loss(batch, acceptance)

        (value, accepted, agreed), gradients = nn.value_and_grad(self.drafter, loss)(self.drafter)
        gradients, _ = optim.clip_grad_norm(gradients, self.config.clip)
        self.optimizer.update(self.drafter, gradients)
        return value, accepted, agreed

    def _measure(self, batch: dict[str, mx.array]) -> Triple:
        return self._loss(batch, mx.array(0.0))

    # Optimiser

    def _optimizer(self) -> optim.Optimizer:
        config = self.config
        warm = max(1, int(config.warmup * self.steps))

        def schedule(peak: float) -> Callable[[mx.array], mx.array]:
            rise = optim.linear_schedule(peak / warm, peak, warm)
            fall = optim.cosine_decay(peak, max(1, self.steps - warm), peak / 10)
            return optim.join_schedules([rise, fall], [warm])

        def adam(peak: float) -> optim.Optimizer:
            # Bias correction would be a power per weight and step on a CPU; the warm-up does it.
            return optim.AdamW(
                schedule(peak), betas=[0.9, 0.98], weight_decay=config.weight_decay,
            )  # fmt: skip

        output = self.trainee.output
        if output is None:
            return adam(config.learning_rate)
        return optim.MultiOptimizer(
            [adam(config.learning_rate * config.head_rate), adam(config.learning_rate)],
            [lambda path, _: path.startswith(output)],
        )

    # Running

    def run(self, on_step: OnStep) -> None:
        """Train to the end. Whatever interrupts it, a checkpoint of the last step is left."""
        batches = self.data.batches(self.runs, self.config.seed, self.step)
        held_out = self.data.held_out(self.runs, HELD_OUT_BATCHES)
        window: list[Triple] = []
        started = saved = time.perf_counter()
        before = self.seconds
        check_every = max(LOG_EVERY, self.steps // HELD_OUT_CHECKS // LOG_EVERY * LOG_EVERY)
        try:
            while self.step < self.steps:
                batch = self._arrays(next(batches), self.step)
                late = self.step >= self.config.acceptance_after * self.steps
                weight = mx.array(self.config.acceptance if late else 0.0)
                outcome = self._update(batch, weight)
                mx.eval(self.drafter.state, self.optimizer.state, outcome)
                self.step += 1
                window.append(outcome)
                now = time.perf_counter()
                self.seconds = before + now - started
                if self.step % LOG_EVERY == 0 or self.step == self.steps:
                    row = self._row(window)
                    if self.step % check_every == 0 or self.step == self.steps:
                        row["held_out"] = self.score(held_out)
                    self._log(row)
                    on_step(row)
                    window = []
                else:
                    on_step({"step": self.step, "steps": self.steps})
                if now - saved > CHECKPOINT_SECONDS:
                    self.save()
                    saved = now
        finally:
            self.save()

    def score(self, batches: list[Batch]) -> dict[str, Any]:
        """Mean loss, acceptance and agreement of batches that are not trained on."""
        if not batches:
            return {}
        results = [self._score(self._arrays(b, -1 - i)) for i, b in enumerate(batches)]
        return _means(results)

    def _arrays(self, batch: Batch, step: int) -> dict[str, mx.array]:
        arrays = {
            "tokens": mx.array(batch.tokens),
            "features": mx.array(batch.features),
            "valid": mx.array(batch.valid),
            "drawn": self._draw(step % (1 << 31)),
        }
        if batch.before is not None:
            arrays |= {f"before_{k}": mx.array(v) for k, v in vars(batch.before).items()}
        return arrays

    def _row(self, window: list[Triple]) -> dict[str, Any]:
        return {
            "step": self.step,
            "steps": self.steps,
            "positions": self.step * self.runs * self.config.segment,
            **_means(window),
            "seconds": round(self.seconds, 2),
        }

    # Checkpoints

    @property
    def _checkpoint(self) -> Path:
        return checkpoint_file(self.folder)

    @property
    def log_file(self) -> Path:
        return self.folder / "fit" / "log.jsonl"

    def _log(self, row: dict[str, Any]) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write weights, optimiser and step; the old file stays until the new one is whole."""
        arrays = {f"drafter.{k}": v for k, v in _flat(self.drafter.parameters())}
        arrays |= {f"optimizer.{k}": v for k, v in _flat(self.optimizer.state)}
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self._checkpoint.with_name("partial.safetensors")
        arrays["support"] = mx.array(self.support, mx.int32)
        facts = {"step": str(self.step), "seconds": str(self.seconds), **self.trainee.facts}
        mx.save_safetensors(str(partial), arrays, metadata=facts)
        partial.replace(self._checkpoint)

    def export(self, folder: Path) -> Path:
        """Write the drafter as the decode loop reads it."""
        drafter = self.trainee.finished()
        drafter.set_dtype(mx.float16)
        extra: dict[str, Any] = {"target_model": self.config.model}
        if self.config.bits < 16:
            group = next((g for g in (64, 32) if _divisible(drafter, g)), None)
            if group is not None:
                nn.quantize(drafter, group, self.config.bits)
                extra["quantization"] = {"group_size": group, "bits": self.config.bits}
        self.trainee.save(folder, drafter, extra)
        return folder


def fit(target: Target, config: TrainConfig, folder: Path, on_step: OnStep) -> Path:
    """Train, or go on training, on the answers in ``folder``; returns the drafter's folder.

    The result does not depend on interruptions, to the bit where the arithmetic does not.
    """
    run = Fit(target, config, folder)
    run.run(on_step)
    return run.export(folder / "drafter")


def _means(results: list[Triple]) -> dict[str, Any]:
    loss, accepted, agreed = (np.mean([np.array(r[i]) for r in results], axis=0) for i in range(3))
    return {
        "loss": round(float(loss), 5),
        "acceptance": [round(float(x), 5) for x in accepted],
        "agreement": [round(float(x), 5) for x in agreed],
    }


def _divisible(drafter: nn.Module, group: int) -> bool:
    linear = [m for m in drafter.modules() if isinstance(m, nn.Linear)]
    return all(m.weight.shape[1] % group == 0 for m in linear)


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))
