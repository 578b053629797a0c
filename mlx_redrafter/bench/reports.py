"""Tables and JSON of what is measured, with the conditions beside them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mlx_redrafter.api import Model, load
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation.acceptance import SHAPES, TEMPERATURES, measure
from mlx_redrafter.evaluation.prompts import DEV, Prompt, read_prompts
from mlx_redrafter.runtime import device
from mlx_redrafter.terminal import console
from mlx_redrafter.text.answer import GenerationResponse


def acceptance(
    model: str,
    drafter: str,
    prompts: Path | None,
    count: int | None,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Tokens per step by tree, temperature and prompt group."""
    loaded, tokenizer = load(model, drafter)
    if loaded.drafter is None:
        raise OptionError(f"there is no drafter for {model}: give one with --drafter")
    chosen = read_prompts(prompts or DEV, count)
    total = len(chosen) * len(SHAPES) * len(TEMPERATURES)
    with progress(total) as step:
        rows = measure(loaded, tokenizer, chosen, max_tokens=max_tokens, on_answer=step)
    facts = {**conditions(loaded, chosen), "max_tokens": max_tokens}
    if as_json:
        print(json.dumps({"rows": [row.as_dict() for row in rows], **facts}))
        return
    groups = list(dict.fromkeys(row.group for row in rows))
    rates = table("tree", "temperature", *groups, "accepted of checked")
    for i in range(0, len(rows), len(groups)):
        part = rows[i : i + len(groups)]
        cells = [f"{row.stats.tokens_per_step:.2f}" for row in part]
        share = f"{part[-1].stats.acceptance_rate:.0%}"
        rates.add_row(str(part[0].shape), f"{part[0].temp:g}", *cells, share)
    show("Tokens per step", rates, facts)


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; the context is the function that advances it."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda: bar.advance(task)


def conditions(model: Model, prompts: list[Prompt] | None = None) -> dict[str, Any]:
    """Model and machine; with prompts also their number, and the drafter."""
    drafter = model.drafter_folder.name if model.drafter_folder else None
    own = {} if prompts is None else {"drafter": drafter, "prompts": len(prompts)}
    return device.conditions(model.name, model.target.dtype, **own)


def answer(
    model: Model, seed: int, text: str, tokens: list[int], last: GenerationResponse
) -> dict[str, Any]:
    """What `generate --json` says of an answer."""
    return {
        "text": text,
        "tokens": tokens,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": round(last.prompt_tps, 2),
        "generation_tps": round(last.generation_tps, 2),
        "peak_memory_gb": round(last.peak_memory, 3),
        "stats": last.stats.as_dict(),
        "model": model.name,
        "drafter": str(model.drafter_folder) if model.drafter_folder else None,
        "device": device.device(),
        "seed": seed,
    }


def table(first: str, *others: str) -> Table:
    """An empty table; the columns after the first hold numbers."""
    empty = Table(box=None, pad_edge=False, header_style="dim")
    empty.add_column(first, no_wrap=True)
    for title in others:
        empty.add_column(title, justify="right")
    return empty


def show(title: str, filled: Table, facts: dict[str, Any] | None = None) -> None:
    """A title and a table on stdout, the conditions in one line on stderr."""
    out = Console(highlight=False)
    out.print(title, style="bold")
    out.print(filled)
    if facts is not None:
        console.note(console.facts(facts))
