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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import mlx.core as mx

from mlx_redrafter.budget import chunks, company, yields
from mlx_redrafter.budget.automatic import FIRST, Automatic, contenders
from mlx_redrafter.budget.chunks import Chunks
from mlx_redrafter.budget.company import Company, Ratios, new_ratios
from mlx_redrafter.budget.costs import NEAR, Costs, measure
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.errors import HubError
from mlx_redrafter.models import Target, small_rows
from mlx_redrafter.prefill.reading import USUAL
from mlx_redrafter.runtime import blas
from mlx_redrafter.runtime.paths import ASSETS, cache_dir
from mlx_redrafter.text.tokenizer import load_tokenizer
from mlx_redrafter.tree.shape import BEAMS, TreeShape

Say = Callable[[str], None]
T = TypeVar("T")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Budget:
    """What was measured for one model on this machine, and what follows from it.

    Args:
        engine: whose steps are chosen.
        target: the engine's.
        folder: of the model; its configuration is part of what the figures depend on.
        drafter_folder: of the trained drafter, if there is one.
    """

    engine: Engine
    target: Target
    folder: Path
    drafter_folder: Path | None = None
    _costs: Costs | None = None
    _chunks: Chunks | None = None
    _ratios: Ratios = field(default_factory=new_ratios)

    @property
    def shapes(self) -> list[TreeShape]:
        """All that may be chosen for this model, plain decoding first."""
        drafter = any(drafter.part == BEAMS for drafter in self.engine.drafters)
        return (yields.chains if small_rows.exactly(self.target) else yields.shapes)(drafter)

    def policy(self, sampled: bool) -> Automatic:
        """The choice of shapes for one answer; measures the machine if nobody has yet.

        Args:
            sampled: whether the answer is drawn at a temperature.

        Raises:
            DrafterError: the drafter's table of yields cannot be read.
        """
        known, table = self.costs(), _yields(self.drafter_folder)

        def tokens(shape: TreeShape) -> float:
            return table.tokens(shape, sampled)

        def seconds(shape: TreeShape, position: int) -> float:
            return known.seconds(shape, position, sampled)

        def learn(shape: TreeShape, position: int, passed: float, experts: int) -> None:
            known.learn(shape, position, sampled, passed, experts)

        shapes = contenders(self.shapes, tokens, known.table)
        if not known.distinct:
            return Automatic(shapes, tokens, seconds, learn)
        # Others may pay by what was learned; those of the table remain, as a text may change.
        better = contenders(self.shapes, tokens, lambda shape: seconds(shape, NEAR))
        owed = 0 if known.experts(sampled).compared else FIRST
        return Automatic(list(dict.fromkeys([*shapes, *better])), tokens, seconds, learn, owed)

    def costs(self, say: Say | None = None, again: bool = False) -> Costs:
        """Those of this process, else of an earlier one, else measured now, which ``say``, or the
        engine's, is told in a line, as it takes a few seconds.

        Where running steps contradict the table, what is kept of it is thrown away: this process
        goes by the steps, the next one measures again.
        """
        if self._costs is not None and not again:
            if self._costs.drifted:
                with contextlib.suppress(OSError):
                    _file(self.conditions()).unlink(missing_ok=True)
            return self._costs
        facts = self.conditions()
        found = None if again else _read(_file(facts), Costs.from_dict)
        if found is None:
            (say or self.engine.say)(
                "Measuring what drafting costs on this machine (once, a few seconds) ..."
            )
            found = self.measured("costs")
            _write(_file(facts), {**facts, **found.as_dict()})
        self._costs = found
        return found

    def company(self) -> Company:
        """What chooses for answers that run together. What passes over many rows cost is measured
        at first, and kept as :meth:`costs` are, beside them."""
        costs = self.costs()
        facts = {name: fact for name, fact in self.conditions().items() if name != "drafter"}
        file = _file({**facts, "of": "rows", "rounds": company.ROUNDS})
        found = _read(file, lambda stored: {int(n): float(t) for n, t in stored["rows"].items()})
        if found is None:
            found = self.measured("rows")
            _write(file, {**facts, "rows": {str(n): t for n, t in found.items()}})
        return Company(costs, found, self._ratios, self.shapes)

    def measured(self, what: Literal["costs", "rows"], text: Sequence[int] = ()) -> Any:
        """Measured now: `Costs`, or seconds by rows for :meth:`company`. text: that a model with
        experts is timed on, if it is not the usual one."""
        engine, target = self.engine, self.target
        if what == "rows":
            return company.measure(target, mx.compile if engine.compiled else lambda f: f)
        return measure(
            target, engine.drafters, engine.step_function, engine.compiled,
            lambda: text or self._text(),
        )  # fmt: skip

    def step_size(self, prompt: int, cached: int = 0) -> int:
        """How many tokens of a prompt to read in one pass, where nobody says it.

        Measures at the first prompt that is long enough to gain by it. Drafted or plain it is the
        same size: it depends on the prompt, what of it is cached, and the machine.
        """
        most = chunks.most(self.target.config, prompt, chunks.packed(self.target))
        if prompt - cached <= chunks.LONG:
            return min(USUAL, most)
        return self.chunks().size(cached, prompt, most)

    def chunks(self, say: Say | None = None, again: bool = False) -> Chunks:
        """What sizes of a prompt's chunks cost; kept as :meth:`costs` are, beside them."""
        if self._chunks is not None and not again:
            return self._chunks
        facts = {name: fact for name, fact in self.conditions().items() if name != "drafter"}
        file = _file({**facts, "of": "chunks"})
        found = None if again else _read(file, Chunks.from_dict)
        if found is None:
            (say or self.engine.say)(
                "Measuring in what chunks long prompts are read fastest (once, a few seconds) ..."
            )
            found = chunks.measure(self.target, self._text() if self.target.routes else ())
            _write(file, {**facts, **found.as_dict()})
        self._chunks = found
        return found

    def _text(self) -> list[int]:
        """A question and its answer in the model's tokens; none where it has no tokenizer."""
        stored = json.loads((ASSETS / "selfcheck.json").read_text())
        try:
            tokenizer = load_tokenizer(self.folder, complete=False)
        except HubError:
            return []
        text = tokenizer.encode(f"{stored['question']}\n\n{stored['answer']}")
        return [token for token in text if token < self.target.config.vocab_size]

    def conditions(self) -> dict[str, Any]:
        """Everything that the figures depend on."""
        info = mx.device_info()
        drafter = self.drafter_folder
        return {
            "machine": f"{info.get('device_name', platform.machine())}, {os.cpu_count()} cores",
            "device": str(mx.default_device()),
            "macos": platform.mac_ver()[0],  # an update may bring other products
            "threads": [os.environ.get(name, "") for name in _THREADS],
            "mlx": version("mlx"),
            "blas": blas.used(),
            "compiled": self.engine.compiled,
            "dtype": str(self.target.dtype),
            "model": _digest(self.folder / "config.json"),
            "caches": hashlib.sha256(repr(list(self.target.caches)).encode()).hexdigest()[:16],
            "drafter": _digest(drafter / "config.json") if drafter else None,
            "kernels": small_rows.described(self.target) or None,
        }


def _file(facts: dict[str, Any]) -> Path:
    from mlx_redrafter import __version__

    text = json.dumps({**facts, "program": __version__}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cache_dir() / "costs" / f"{key}.json"


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""


@functools.cache
def _yields(folder: Path | None) -> yields.Yields:
    return yields.load(folder)


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
