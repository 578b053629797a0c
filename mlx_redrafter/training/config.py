"""What a training run is made of: one frozen dataclass, from flags or a YAML file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.checks import at_least, checked_text
from mlx_redrafter.runtime.paths import BUILTIN, user_path


class Kind(NamedTuple):
    """What a kind of drafter makes of the options: other defaults, and those that it lacks."""

    defaults: dict[str, Any]
    lacks: tuple[str, ...]


KINDS = {
    "redrafter": Kind({}, ()),
    "medusa": Kind(
        {"num_draft_layers": 1, "rollout": 4},
        ("cell", "initial_state", "context_layers", "head", "exit_dim"),
    ),
    "eagle3": Kind({}, ("cell", "initial_state", "head", "exit_dim", "num_draft_layers")),
}
_UNKNOWN = Kind({}, ())


@dataclass(frozen=True)
class TrainConfig:
    """Options of ``mlx-redrafter train``. Tokens and positions are counts, times are seconds.

    Data:
        prompts: jsonl of prompts; None: the model writes its own.
        answers: jsonl(.gz) of token ids, made by this program, to train on besides.
        answer_tokens: answer tokens to have in all; those of ``answers`` count.
        max_tokens: at most this many tokens per answer, its thought not counted.
        thinking: share of the answers that think, where the chat template has a switch for it.
        thought_tokens: a thought is closed after so many tokens.
        batch: answers written at once.
    Drafter:
        kind: one of ``KINDS``.
        cell, initial_state, context_layers, head, exit_dim, num_draft_layers, draft_vocab_size: see
            ``ReDrafterConfig``; context_layers "auto" takes three, exit_dim None is the target's
            hidden size, draft_vocab_size 0 is the whole vocabulary.
        warm_start: a drafter folder of the same shape to start from.
    Fit:
        positions: positions processed, those seen twice count twice.
        batch_positions: positions per optimiser step, in runs of ``segment`` neighbours.
        rollout: draft steps that are trained per position (K); so many Medusa heads there are.
        candidates: draft tokens whose logits are computed per step; a quarter is drawn at random.
        learning_rate, warmup: peak, and share of the steps until it; then cosine to a tenth.
        head_rate: learning rate of an own output matrix, as a share of the others'.
        step_decay: weight of draft step k is step_decay**k.
        hard: share of cross-entropy on the tokens themselves; the rest on the distribution.
        acceptance: weight of the acceptance loss, after the share ``acceptance_after`` of steps.
        cache_gb: disk for hidden states; where it is too small, some are kept, and the others are
            computed again, group by group, for a few passes each.
    Result:
        bits: of the written drafter's weights: 4, 5, 6, 8 or 16.
    """

    model: str = BUILTIN
    out: Path = Path("drafter")
    prompts: Path | None = None
    answers: Path | None = None
    answer_tokens: int = 2_000_000
    max_tokens: int = 256
    thinking: float = 0.5
    thought_tokens: int = 512
    prompt_tokens: int = 96
    system_prompt: str | None = None
    batch: int = 64
    seed: int = 0

    kind: str = "redrafter"
    cell: str = "gru"
    initial_state: str = "context"
    context_layers: str = "auto"
    head: str = "own"
    exit_dim: int | None = None
    num_draft_layers: int = 2
    draft_vocab_size: int = 8192
    warm_start: Path | None = None

    positions: int = 12_000_000
    batch_positions: int = 1024
    segment: int = 32
    rollout: int = 3
    candidates: int = 2048
    learning_rate: float = 1e-3
    warmup: float = 0.02
    head_rate: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    step_decay: float = 0.8
    hard: float = 0.1
    acceptance: float = 1.0
    acceptance_after: float = 0.5
    cache_gb: float = 20.0
    bits: int = 8

    @property
    def steps(self) -> int:
        """Optimiser steps of the fit."""
        return max(1, -(-self.positions // self.batch_positions))

    def check(self) -> None:
        """Refuse impossible values before anything is loaded; raises OptionError."""
        if self.kind not in KINDS:
            raise OptionError(f"kind {self.kind!r} is not possible: use {', '.join(KINDS)}")
        blocks = 1 if self.kind == "medusa" else 0
        least = {
            "answer_tokens": 1, "max_tokens": 2, "thought_tokens": 1, "prompt_tokens": 4,
            "batch": 1, "positions": 1, "batch_positions": 1, "segment": 2, "rollout": 1,
            "candidates": 4, "num_draft_layers": blocks, "draft_vocab_size": 0, "seed": 0,
        }  # fmt: skip
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise OptionError(
                    f"{name} {getattr(self, name)} is not possible: use {minimum} or more"
                )
        if self.segment > self.batch_positions:
            raise OptionError(
                f"segment {self.segment} is not possible: use {self.batch_positions} or less, "
                "the batch_positions"
            )
        checked_text(self.system_prompt or "", "system prompt")
        for name in ("thinking", "warmup", "step_decay", "hard", "acceptance_after", "head_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name} {getattr(self, name)} is not possible: use 0 to 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} {getattr(self, name)} is not possible: use more than 0")
        if self.bits not in (4, 5, 6, 8, 16):
            raise OptionError(f"bits {self.bits} is not possible: use 4, 5, 6, 8 or 16")


@dataclass(frozen=True)
class Evaluating:
    """How much the evaluation measures: prompts, and tokens of an answer; None: as much as takes a
    part of the time of the fit."""

    prompts: int | None = None
    max_tokens: int | None = None

    @classmethod
    def of(cls, given: dict[str, int | None]) -> Evaluating:
        """With what was given; None is not. Raises OptionError."""
        at_least(1, eval_prompts=given.get("prompts"), eval_tokens=given.get("max_tokens"))
        return cls(**given)


def defaults(kind: str) -> TrainConfig:
    """Of a kind of drafter; of an unknown one those of all."""
    return TrainConfig(kind=kind, **KINDS.get(kind, _UNKNOWN).defaults)


def options(kind: str) -> list[str]:
    """The names of those that a kind of drafter has."""
    lacks = KINDS.get(kind, _UNKNOWN).lacks
    return [f.name for f in fields(TrainConfig) if f.name not in lacks]


def refuse_lacking(kind: str, given: Iterable[str]) -> None:
    """Raise OptionError for an option that this kind of drafter does not have."""
    for name in given:
        if name in KINDS.get(kind, _UNKNOWN).lacks:
            others = [other for other, row in KINDS.items() if name not in row.lacks]
            raise OptionError(
                f"{name} was given, but a drafter of kind {kind} has none: leave it out, or "
                f"train a {' or '.join(others)}"
            )


def from_mapping(values: dict[str, Any], source: str) -> TrainConfig:
    """A configuration from a file's values. Raises OptionError on an unknown key or wrong type."""
    known = {f.name: f for f in fields(TrainConfig)}
    if unknown := sorted(set(values) - set(known)):
        raise OptionError(
            f"{source} has an unknown option {unknown[0]!r}: options are {', '.join(known)}"
        )
    config = TrainConfig()
    for name, value in values.items():
        default, kind = getattr(config, name), known[name].type
        if value is None and default is None:
            continue
        if value is not None and "Path" in str(kind):
            value = user_path(str(value))
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif type(value) is not _type(name, default):
            raise OptionError(f"{name} in {source} is {value!r}; needed: a {kind}")
        config = replace(config, **{name: value})
    return config


def _type(name: str, default: object) -> type:
    """Of an option's value; those without a default have it by their name."""
    return {"exit_dim": int, "system_prompt": str}.get(name, type(default))
