"""`mlx-redrafter doctor --report`: everything that a Mac can tell, in two files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_redrafter.api import Model
from mlx_redrafter.bench.machine.measure import Effort, parts
from mlx_redrafter.bench.machine.page import markdown
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation.model_checks import Check
from mlx_redrafter.runtime.device import dtype_name, machine
from mlx_redrafter.runtime.paths import write_whole

SCHEMA = 1
Say = Callable[[str], None]


def files(given: Path) -> list[Path]:
    """FILE.json and FILE.md; or the one of them that was given.

    Raises:
        OptionError: a folder that does not exist.
    """
    if not given.parent.is_dir():
        raise OptionError(f"the folder {given.parent} does not exist: give --report another file")
    if given.suffix in (".json", ".md"):
        return [given]
    return [given.with_name(given.name + suffix) for suffix in (".json", ".md")]


def measured(
    model: Model,
    tokenizer: Any,
    check: Callable[[], Sequence[Check]],
    effort: Effort,
    say: Say,
) -> dict[str, Any]:
    """The report. A part that breaks is a line in it: the others still have something to say.
    check: makes doctor's checks, when what a new process has to compile was timed."""
    found: dict[str, Any] = {}
    checks: Sequence[Check] = ()
    for name, what, measure in parts(model, tokenizer, effort):
        if name == "kernels":
            checks = check()
        say(f"measuring {what} ...")
        try:
            found[name] = measure()
        except Exception as error:
            text = " ".join(str(error).split())
            found[name] = {"error": f"{type(error).__name__}: {text}"}
    folder = model.drafter_folder
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "model": {
            "name": Path(model.name).name if Path(model.name).is_absolute() else model.name,
            "dtype": dtype_name(model.target.dtype),
            "drafter": folder.name if folder is not None else None,
        },
        "checks": [asdict(check) for check in checks],
        "parts": found,
    }


def write(report: dict[str, Any], to: Sequence[Path]) -> None:
    """Raises OptionError for what cannot be written."""
    for file in to:
        text = json.dumps(report, indent=1) + "\n" if file.suffix == ".json" else markdown(report)
        try:
            write_whole(file, text)
        except OSError as error:
            raise OptionError(
                f"{file} cannot be written ({error.strerror}): give --report another file"
            ) from None
