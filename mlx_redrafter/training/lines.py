"""Command lines that are printed or written into a card: each works when it is copied."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_redrafter.training.config import TrainConfig, defaults, options


def line(*words: str, **options: Any) -> str:
    """`mlx-redrafter` with words and options, quoted for a shell; None is not given."""
    given = [
        part
        for name, value in options.items()
        if value is not None and value is not False
        for part in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))
    ]
    return shlex.join(["mlx-redrafter", *words, *given])


def train(config: TrainConfig, stage: str | None = None, **options: Any) -> str:
    """A stage of this run. The model is named too: a folder in which nothing was begun forgets."""
    words = ["train", stage] if stage else ["train"]
    return line(*words, model=config.model, out=config.out, **options)


def use(model: str, chats: bool, drafter: Path | str | None = None) -> str:
    """How to use a model with a drafter; a base model has no chat template to chat in."""
    if chats:
        return line("chat", model=model, drafter=drafter)
    return line("generate", "Once upon a time", raw=True, model=model, drafter=drafter)


class Shown:
    """Paths of a run as its card shows them: the same from wherever the folder is looked at.

    A card may be published, and where on a disk something lies is its owner's own business. So they
    are relative: to the folder that the run's folder is in, or, if that was given by a relative
    path, to the folder in which it was given.
    """

    def __init__(self, config: TrainConfig) -> None:
        out = Path(config.out)
        self.base = out.parent if out.is_absolute() else Path()
        self.config = config

    def path(self, path: Path) -> str:
        """Relative to the base."""
        found = os.path.relpath(path, self.base)
        if found.startswith(os.pardir):  # from within a symbolic link that leads elsewhere
            return os.path.relpath(os.path.realpath(path), os.path.realpath(self.base))
        return found

    @property
    def model(self) -> str:
        """Of the target: its name, or the path of its folder."""
        given = self.config.model
        place = Path(os.path.expanduser(given))
        return self.path(place) if place.is_dir() else given

    def values(self) -> dict[str, Any]:
        """All options, with paths as they are shown."""
        found = {name: getattr(self.config, name) for name in options(self.config.kind)}
        found |= {k: self.path(v) for k, v in found.items() if isinstance(v, Path)}
        return {**found, "model": self.model}

    def made_by(self) -> str:
        """The command that makes the run."""
        usual = replace(defaults(self.config.kind), kind=TrainConfig.kind)
        changed = {
            name
            for name, value in vars(self.config).items()
            if name in ("model", "out") or value != getattr(usual, name)
        }
        return line("train", **{k: v for k, v in self.values().items() if k in changed})

    def measured_by(self, prompts: int | None, tokens: int) -> str:
        """The command that evaluates it."""
        out = self.path(self.config.out)
        return line("train", "evaluate", out=out, eval_prompts=prompts, eval_tokens=tokens)
