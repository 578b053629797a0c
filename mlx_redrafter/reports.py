"""Tables and JSON of what `acceptance` and `bench` measure, with the conditions beside them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mlx_redrafter import acceptance as counting
from mlx_redrafter import bench, console
from mlx_redrafter.api import Model, load
from mlx_redrafter.errors import OptionError
from mlx_redrafter.info import device, machine
from mlx_redrafter.prompts import DEV, Prompt, read_prompts


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
    total = len(chosen) * len(counting.SHAPES) * len(counting.TEMPERATURES)
    with _progress(total) as step:
        rows = counting.measure(loaded, tokenizer, chosen, max_tokens=max_tokens, on_answer=step)
    facts = {**_conditions(loaded, chosen), "max_tokens": max_tokens}
    if as_json:
        print(json.dumps({"rows": [row.as_dict() for row in rows], **facts}))
        return
    groups = list(dict.fromkeys(row.group for row in rows))
    table = _table("tree", "temperature", *groups, "accepted of checked")
    for i in range(0, len(rows), len(groups)):
        part = rows[i : i + len(groups)]
        cells = [f"{row.stats.tokens_per_step:.2f}" for row in part]
        share = f"{part[-1].stats.acceptance_rate:.0%}"
        table.add_row(str(part[0].shape), f"{part[0].temp:g}", *cells, share)
    _show("Tokens per step", table, facts)


def speed(
    model: str,
    drafter: str,
    prompts: Path | None,
    count: int,
    max_tokens: int,
    rounds: int,
    as_json: bool,
) -> None:
    """Tokens per second of every way to decode, and the ratio to mlx_lm."""
    if max_tokens < 2 or rounds < 1:
        raise OptionError("bench needs --max-tokens 2 or more and --rounds 1 or more")
    loaded, tokenizer = load(model, drafter)
    chosen = read_prompts(prompts or DEV, count)
    shapes = counting.SHAPES if loaded.drafter is not None else ()
    with _progress((2 + len(shapes)) * len(chosen) * rounds) as step:
        results = bench.compare(
            loaded, tokenizer, chosen, shapes=shapes, max_tokens=max_tokens, rounds=rounds,
            on_answer=step,
        )  # fmt: skip
    facts = {**_conditions(loaded, chosen), "max_tokens": max_tokens, "rounds": rounds}
    if as_json:
        print(json.dumps({"results": [r.as_dict() for r in results], **facts}))
        return
    table = _table("", "tokens/s", "times mlx_lm", "lowest-highest")
    for r in results:
        low, high = min(r.ratios), max(r.ratios)
        table.add_row(r.name, f"{r.median:.1f}", f"{r.median_ratio:.2f}", f"{low:.2f}-{high:.2f}")
    _show("Speed, medians of interleaved runs", table, facts)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; the context is the function that advances it."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda: bar.advance(task)


def _conditions(model: Model, prompts: list[Prompt]) -> dict[str, Any]:
    facts = machine()
    return {
        "model": model.name,
        "dtype": str(model.target.dtype).removeprefix("mlx.core."),
        "drafter": model.drafter_folder.name if model.drafter_folder else None,
        "prompts": len(prompts),
        "chip": facts["chip"],
        "device": device(),
        "mlx": facts["mlx"],
        "blas": facts["blas"],
    }


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _show(title: str, table: Table, facts: dict[str, Any]) -> None:
    out = Console(highlight=False)
    out.print(title, style="bold")
    out.print(table)
    console.note(", ".join(f"{name} {value}" for name, value in facts.items()))
