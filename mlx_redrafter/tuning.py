"""What steps and prompt chunks cost on this machine: measured at first use, kept on disk; the
choices made of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from mlx_redrafter import blas, hub
from mlx_redrafter.decoding import prospects
from mlx_redrafter.decoding.costs import Costs, measure
from mlx_redrafter.decoding.policy import Automatic, contenders
from mlx_redrafter.decoding.tree import TreeShape
from mlx_redrafter.prefill import chunks

if TYPE_CHECKING:
    from mlx_redrafter.api import Model

Say = Callable[[str], None]
T = TypeVar("T")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def policy(model: Model, sampled: bool) -> Automatic:
    """The choice of shapes for one answer; measures the machine if nobody has yet.

    Args:
        sampled: whether the answer is drawn at a temperature.

    Raises:
        DrafterError: the drafter's table of prospects cannot be read.
    """
    known, table = costs(model), _prospects(model.drafter_folder)

    def tokens(shape: TreeShape) -> float:
        return table.tokens(shape, sampled)

    def seconds(shape: TreeShape, position: int) -> float:
        return known.seconds(shape, position, sampled)

    def learn(shape: TreeShape, position: int, passed: float) -> None:
        known.learn(shape, position, sampled, passed)

    shapes = contenders(prospects.shapes(model.drafter is not None), tokens, known.table)
    return Automatic(shapes, tokens, seconds, learn)


def costs(model: Model, say: Say | None = None, again: bool = False) -> Costs:
    """Those of this process, else of an earlier one, else measured now, which ``say``, or the
    engine's, is told in a line, as it takes a few seconds.

    Where running steps contradict the table, what is kept of it is thrown away: this process goes
    by the steps, the next one measures again.
    """
    engine = model.engine
    if engine.costs is not None and not again:
        if engine.costs.drifted:
            with contextlib.suppress(OSError):
                _file(conditions(model)).unlink(missing_ok=True)
        return engine.costs
    file = _file(conditions(model))
    found = None if again else _read(file, Costs.from_dict)
    if found is None:
        (say or engine.say)(
            "Measuring what drafting costs on this machine (once, a few seconds) ..."
        )
        found = measure(model.target, model.drafter, engine.step_function, engine.compiled)
        _write(file, {**conditions(model), **found.as_dict()})
    engine.costs = found
    return found


def step_size(model: Model, prompt: int, cached: int = 0) -> int:
    """How many tokens of a prompt to read in one pass, where nobody says it.

    Measures at the first prompt that is long enough to gain by it. Drafted or plain it is the same
    size: it depends on the prompt, what of it is cached, and the machine.
    """
    most = chunks.most(model.target.config, prompt)
    if prompt - cached <= chunks.LONG:
        return min(chunks.USUAL, most)
    return prompt_chunks(model).size(cached, prompt, most)


def prompt_chunks(model: Model, say: Say | None = None, again: bool = False) -> chunks.Chunks:
    """What sizes of a prompt's chunks cost; kept as :func:`costs` are, beside them."""
    engine = model.engine
    if engine.chunks is not None and not again:
        return engine.chunks
    facts = {name: fact for name, fact in conditions(model).items() if name != "drafter"}
    file = _file({**facts, "of": "chunks"})
    found = None if again else _read(file, chunks.Chunks.from_dict)
    if found is None:
        (say or engine.say)(
            "Measuring in what chunks long prompts are read fastest (once, a few seconds) ..."
        )
        found = chunks.measure(model.target)
        _write(file, {**facts, **found.as_dict()})
    engine.chunks = found
    return found


def conditions(model: Model) -> dict[str, Any]:
    """Everything that the figures depend on."""
    info = mx.device_info()
    return {
        "machine": f"{info.get('device_name', platform.machine())}, {os.cpu_count()} cores",
        "device": str(mx.default_device()),
        "macos": platform.mac_ver()[0],  # an update may bring other products
        "threads": [os.environ.get(name, "") for name in _THREADS],
        "mlx": version("mlx"),
        "blas": blas.used(),
        "compiled": model.engine.compiled,
        "dtype": str(model.target.dtype),
        "model": _digest(model.folder / "config.json"),
        "drafter": _digest(model.drafter_folder / "config.json") if model.drafter_folder else None,
    }


def _file(facts: dict[str, Any]) -> Path:
    from mlx_redrafter import __version__

    text = json.dumps({**facts, "program": __version__}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return hub.cache_dir() / "costs" / f"{key}.json"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""


@functools.cache
def _prospects(folder: Path | None) -> prospects.Prospects:
    return prospects.load(folder)


def _read(file: Path, parse: Callable[[Any], T]) -> T | None:
    """None where there is nothing that can be used: then it is measured."""
    try:
        return parse(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all; without a place to keep it, it is measured the next time too."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as part:
            part.write(json.dumps(content, indent=1) + "\n")
        os.replace(part.name, file)
    except OSError:
        return
