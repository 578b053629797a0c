"""A measurement as a person reads it: tables on stdout, conditions on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from mlx_redrafter.bench.speed.document import DIVERGENCE, SWEEP, Document
from mlx_redrafter.bench.speed.summary import ALL
from mlx_redrafter.bench.speed.sweep import best, cells
from mlx_redrafter.bench.speed.ways import AUTOMATIC, PERFECT_NAME, PLAIN
from mlx_redrafter.evaluation import figures
from mlx_redrafter.terminal import console
from mlx_redrafter.terminal.tables import show, table

Row = Mapping[str, Any]
# Of the conditions, what stands below a table; the rest is in the file.
_SHOWN = (
    "model", "dtype", "bits", "drafter", "prompts", "prompt_file", "max_tokens", "rounds", "seed",
    "chip", "cores", "device", "mlx", "mlx_lm", "blas",
)  # fmt: skip
_BEST = 12  # shapes of a sweep that are listed


def tables(document: Document) -> None:
    """All tables of a document, and what is odd about it."""
    if not document.complete:
        console.warn("incomplete: the run was stopped, or is still going on")
    if document.kind == DIVERGENCE:
        _divergences(document)
    elif document.kind == SWEEP:
        _sweep(document.summary)
    else:
        for temp in dict.fromkeys(row["temp"] for row in document.summary):
            _speed(temp, [row for row in document.summary if row["temp"] == temp])
    _cost(document.cost_curve)
    known = document.conditions
    console.note(console.facts(known, *_SHOWN))
    if sparse := known.get("sparse_prefill"):
        held = console.facts(sparse)
        console.note(f"prompts read sparsely by our ways, densely by mlx_lm: {held}")


def _speed(temp: float, rows: Sequence[Row]) -> None:
    filled = table(
        "", "tokens/s", "x mlx_lm", "x plain", "low-high", "worst", "per step", "loop", "same"
    )
    filled.collapse_padding = True  # nine columns in 80 characters
    groups = [ALL, *dict.fromkeys(r["group"] for r in rows if r["group"] != ALL)]
    if len(groups) == 2:
        groups = [ALL]
    for group in groups:
        count = next(r["prompts"] for r in rows if r["group"] == group)
        filled.add_row(f"[dim]{group}: {count} prompt{'s' * (count > 1)}[/dim]")
        for row in rows:
            if row["group"] == group and (group == ALL or PERFECT_NAME not in row["way"]):
                filled.add_row(row["way"], *_cells(row))
    show(f"Speed, {figures.answers(temp)}", filled)


def _cells(row: Row) -> list[str]:
    speeds = [f"{row['tokens_per_second']:.1f}", _number(row["times_mlx_lm"])]
    if row["way"] == PLAIN:  # what the others are compared with
        return speeds
    return [
        *speeds,
        _number(row["times_plain"]),
        f"{row['lowest']:.2f}-{row['highest']:.2f}",
        _number(row["worst_decile"]),
        _number(row["tokens_per_step"]),
        _number(row["efficiency"]),
        "-" if row["same"] is None else f"{row['same']:.0%}",
    ]


def _sweep(rows: Sequence[Row]) -> None:
    overall = [r for r in rows if r["group"] == ALL]
    usual = [r for r in overall if r["way"] == AUTOMATIC]
    drafted = [r for r in overall if r["shape"] and r["shape"]["nodes"] > 1 and r not in usual]
    drafted.sort(key=lambda r: -r["times_plain"])
    filled = table("", "x plain", "low-high", "per step", "loop")
    for row in [*usual, *drafted[:_BEST]]:
        spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
        values = [row["times_plain"], row["tokens_per_step"], row["efficiency"]]
        plain, steps, efficiency = map(_number, values)
        filled.add_row(row["way"], plain, spread, steps, efficiency)
    show(f"The {min(_BEST, len(drafted))} best of {len(drafted)} shapes", filled)
    winner = best(cells(rows))
    if winner is not None and usual:
        share = usual[0]["times_plain"] / winner["times_plain"]
        Console(highlight=False).print(
            f"Best shape: {winner['way']}; the automatic choice is {share:.2f} times as fast."
        )


def _divergences(document: Document) -> None:
    filled = table("", "answers", "tokens", "diverged", "per hundred", "largest margin", "deficit")
    for row in document.summary:
        margins = (row["largest_margin"], row["largest_deficit"])
        counts = (str(row["answers"]), str(row["tokens"]), str(row["diverged"]))
        filled.add_row(row["way"], *counts, f"{row['per_hundred']:.1f}", *map(_number, margins))
    show("Greedy, drafted against plain: first differences", filled)
    if not document.cases:
        return
    places = table("", "prompt", "group", "position", "margin", "deficit", "explained")
    for case in document.cases:
        limit = f"up to {case['limit']:.3g}" + (" [bold red]BUG[/bold red]" * case["bug"])
        places.add_row(
            case["way"], str(case["prompt"]), case["group"], str(case["position"]),
            f"{case['margin']:.3g}", f"{case['deficit']:.3g}", limit,
        )  # fmt: skip
    Console(highlight=False).print(places)


def _cost(curve: Mapping[str, float]) -> None:
    if not curve:
        return
    first = next(iter(curve.values()))
    filled = table("a pass over", *curve)
    filled.add_row("milliseconds", *(f"{1000 * seconds:.1f}" for seconds in curve.values()))
    filled.add_row("times one token", *(f"{seconds / first:.2f}" for seconds in curve.values()))
    Console(highlight=False).print(filled)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
