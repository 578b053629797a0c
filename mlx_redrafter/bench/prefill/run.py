"""One measurement: its options checked before anything is loaded, then measured and shown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, load
from mlx_redrafter.bench.prefill import layer, material, quality, report, whole
from mlx_redrafter.bench.prefill.plots import draw
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import figures
from mlx_redrafter.evaluation.prompts import MANUAL
from mlx_redrafter.prefill.config import Mode, SparsePrefill
from mlx_redrafter.prefill.sparse import check_able
from mlx_redrafter.runtime.checks import at_least
from mlx_redrafter.runtime.device import machine
from mlx_redrafter.runtime.paths import BUILTIN
from mlx_redrafter.terminal import console, tables

BLOCK = SparsePrefill().block
SHORTEST = 4 * BLOCK
MODES = tuple(mode for mode in get_args(Mode) if mode != "off")


@dataclass(frozen=True)
class Settings:
    """What to measure; the command line says what each is.

    Raises:
        OptionError: what can be refused before a model is loaded.
    """

    model: str = BUILTIN
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    modes: tuple[Mode, ...] = ("trianglemix", "xattention", "minference")
    text: Path | None = None
    rounds: int | None = None
    min_context: int | None = None
    quality: bool = False
    layer: bool = False
    prefix: int = 32768
    json: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise OptionError(f"--modes {mode} is not possible: use {', '.join(MODES)}")
        if not self.lengths or not self.modes:
            raise OptionError("there is nothing to measure: give --lengths and --modes")
        for length in self.lengths:
            if length < SHORTEST or length % BLOCK:
                raise OptionError(
                    f"--lengths {length} is not possible: use multiples of {BLOCK} from {SHORTEST}"
                )
        if self.prefix < SHORTEST or self.prefix % BLOCK:
            raise OptionError(
                f"--prefix {self.prefix} is not possible: use a multiple of {BLOCK} from {SHORTEST}"
            )
        least = 0 if self.quality and not self.layer else 1
        if self.rounds is not None and self.rounds < least:
            raise OptionError(
                f"--rounds {self.rounds} is not possible: use 1 or more, or 0 with --quality"
            )
        at_least(1, **{"--min-context": self.min_context})
        if self.plot is not None:
            figures.check(self.plot)
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise OptionError(
                f"{self.json} cannot be written: give --json a file in an existing folder"
            )

    def start(self, length: int) -> int:
        """Where sparse reading begins: what was asked for, or behind the first quarter."""
        return self.min_context or max(BLOCK, length // 4 // BLOCK * BLOCK)


def measure(settings: Settings) -> dict[str, Any]:
    """Measure, show and write; the whole document.

    Raises:
        OptionError: a text too short, a length beyond the model's context.
    """
    model, tokenizer = load(settings.model, None)
    check_able(model.target.config)
    context = model.target.config.max_positions
    beyond = [n for n in settings.lengths if n > context]
    if beyond and not settings.layer:
        raise OptionError(
            f"--lengths {beyond[0]} is beyond the model's context of {context} tokens: give "
            "shorter ones, or a model with a longer context"
        )
    document: dict[str, Any] = {
        "kind": "layer" if settings.layer else "prefill",
        "complete": False,
        "conditions": conditions(model, settings),
    }
    with _reported(document, settings):
        work = _layer if settings.layer else _lengths
        work(document, model, tokenizer, settings)
        document["complete"] = True
    return document


def conditions(model: Model, settings: Settings) -> dict[str, Any]:
    """What has to be known to read the figures, or to measure them again."""
    ways = {mode: vars(SparsePrefill(mode)) | {"patterns": None} for mode in settings.modes}
    return {
        "model_name": model.name,
        **model.budget.conditions(),
        **machine("chip", "system", "python", "mlx_lm", "mlx_redrafter"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "text": settings.text.name if settings.text else MANUAL,
        "tokens_per_pass": whole.STEP,
        "sampled_rows": quality.ROWS,
        "sparse_prefill": ways,
    }


def _lengths(
    document: dict[str, Any], model: Model, tokenizer: TokenizerWrapper, settings: Settings
) -> None:
    """Whole prefills, shortest first."""
    lengths = sorted(set(settings.lengths))
    prompt = material.tokens(tokenizer, settings.text, lengths[-1] + 1)
    rounds = 1 if settings.rounds is None else settings.rounds
    document["conditions"]["rounds"] = rounds
    document["lengths"] = []
    for mode in (None, *settings.modes):  # compiles what is used for the first time
        options = SparsePrefill(mode, min_context=BLOCK, max_density=1) if mode else None
        whole.timed(model.target, prompt[: SHORTEST + 1], mode or whole.DENSE, options)
    turns = len(lengths) * (1 + rounds * (1 + len(settings.modes)))
    with tables.progress(turns) as step:
        for length in lengths:
            for row in _length(model, prompt[: length + 1], rounds, settings, step):
                document["lengths"] = [*document["lengths"][: lengths.index(length)], row]
                _write(document, settings.json)


def _length(
    model: Model, prompt: Sequence[int], rounds: int, settings: Settings, step: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """One length: once to see where time and attention go, then in turns; all known after each."""
    length, target = len(prompt) - 1, model.target
    config, start = target.config, settings.start(length)
    own, others = quality.defaults(settings.modes, settings.quality), []
    if settings.quality:
        others = quality.sweep(settings.modes, config.num_heads, config.num_layers)
    probe = quality.Probe(config, [*own, *others], start)
    reading = whole.probed(target, prompt, probe)
    share = probe.seconds / (reading.seconds - probe.looking)
    row = {"length": length, "min_context": start, "attention_share": round(share, 4), "ways": []}
    if settings.quality:
        row["quality"] = quality.rows(probe.looks, own)
        row["sweep"] = quality.rows(probe.looks, others)
    step()
    yield row
    ways: dict[str, SparsePrefill | None] = {whole.DENSE: None}
    ways |= {mode: SparsePrefill(mode, min_context=start) for mode in settings.modes}
    done: list[list[whole.Reading]] = []
    for turn in range(rounds):
        done.append(whole.in_turn(target, prompt, ways, turn, step))
        row["ways"] = [way | _kept(probe, way["way"]) for way in whole.rows(done, share)]
        yield row


def _kept(probe: quality.Probe, way: str) -> dict[str, float]:
    """Recall and error of the layer passes that a mode reads sparsely."""
    found = quality.figures(
        one for one in probe.looks
        if one.method == way and one.control == quality.ITSELF and one.pays
    )  # fmt: skip
    return {name: found[name] for name in ("recall", "recall_p5", "error") if found}


def _layer(
    document: dict[str, Any], model: Model, tokenizer: TokenizerWrapper, settings: Settings
) -> None:
    """One layer at a long prefix: the first that TriangleMix reads sparsely."""
    config = model.target.config
    count = layer.captured_tokens(config.max_positions)
    prompt = material.tokens(tokenizer, settings.text, count + 1)
    number = config.num_layers // 2
    chunk = layer.real_chunk(model.target, prompt, number, settings.prefix)
    rounds = settings.rounds or 7
    ways = layer.ways(settings.modes)
    with tables.progress(rounds + 1) as step:
        found = layer.measure(chunk, ways, number, rounds, step)
    document["layer"] = {
        "layer": number,
        "prefix": chunk.length,
        "queries": chunk.q.shape[1],
        "heads": chunk.heads,
        "kv_heads": chunk.kv_heads,
        "real_tokens": count,
        "ways": layer.rows(found),
    }


@contextmanager
def _reported(document: dict[str, Any], settings: Settings) -> Iterator[None]:
    """Show what was measured at the end, and also when the user stops the run before it."""
    try:
        yield
    finally:
        if document.get("lengths") or document.get("layer"):
            document["conditions"]["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
            report.show(document)
            _write(document, settings.json)
            if settings.plot and any(row["ways"] for row in document.get("lengths", [])):
                draw(document, settings.plot)
            written = [f for f in (settings.json, settings.plot) if f is not None and f.is_file()]
            if written:
                console.note(f"written: {', '.join(str(file) for file in written)}")


def _write(document: Mapping[str, Any], file: Path | None) -> None:
    """Whole or not at all, as a run may be stopped at any moment."""
    if file is None:
        return
    part = file.with_suffix(file.suffix + ".part")
    try:
        part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise OptionError(
            f"{file} cannot be written ({error.strerror}): give --json another"
        ) from None


def numbers(text: str) -> tuple[int, ...]:
    """ "2048,4096" -> its numbers.

    Raises:
        OptionError: something that is no number.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise OptionError(f"--lengths {wrong[0]} is not possible: use numbers such as 2048,4096")
    return tuple(int(part) for part in parts)


def names(text: str) -> tuple[Mode, ...]:
    """ "trianglemix,xattention" -> modes; `Settings` checks them."""
    return cast(
        "tuple[Mode, ...]", tuple(dict.fromkeys(p.strip() for p in text.split(",") if p.strip()))
    )
