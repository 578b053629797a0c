"""`mlx-redrafter bench hosts`: the speed over several machines, predicted or timed there."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_redrafter.cli.machines import MachineOptions
from mlx_redrafter.cli.options import Json, ModelOptions
from mlx_redrafter.errors import OptionError
from mlx_redrafter.terminal import console, tables

if TYPE_CHECKING:
    from mlx_redrafter.distributed.predict import Row

QUESTIONS = ("Why is the sky blue?", "Write a Python function that adds two numbers.")
PREDICTED = "Predicted, not measured"


def command(
    *,
    source: ModelOptions,
    machines: MachineOptions,
    chip: Annotated[
        str, typer.Option(help="Chip of the machines, such as 'M4 Pro', or its bandwidth in GB/s.")
    ] = "M4 Max",
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="N,...", help="Numbers of machines to predict for.")
    ] = "2,4",
    max_tokens: Annotated[int, typer.Option(help="With --hosts: tokens of every answer.")] = 32,
    as_json: Json = False,
) -> None:
    """Predict tokens per second over several machines, plain and drafted.

    A column is a drafted step: rows that are checked, and tokens that come of it;
    xN is its speed over plain. With --hosts the model runs there, and is timed.
    """
    bandwidth, numbers = _bandwidth(chip), _numbers(sizes)
    with machines.joined() as there:
        if there is not None:
            _show_times(*source.load(None, there), max_tokens, as_json)
            return
    from mlx_redrafter.distributed import predict
    from mlx_redrafter.hub import resolve

    found = predict.sizes_of(resolve(source.model, source.revision))
    found_rows = {
        name: predict.table(found, bandwidth, numbers, rise) for name, rise in predict.RISES.items()
    }
    if as_json:
        plain = {name: [asdict(row) for row in rows] for name, rows in found_rows.items()}
        typer.echo(json.dumps({"predicted": True, "bandwidth": bandwidth, "tables": plain}))
        return
    for name, rows in found_rows.items():
        _show(f"{PREDICTED}: {chip}, {name}", rows)


def _show(title: str, rows: list[Row]) -> None:
    from mlx_redrafter.distributed.predict import DRAFTED

    drafted = (f"{nodes} rows, {tokens:g}" for nodes, tokens in DRAFTED)
    table = tables.table("machines", "plain tok/s", *drafted)
    for row in rows:
        gains = (f"x{gain:.2f}" for gain in row.gains)
        table.add_row(f"{row.size} {row.setup}", f"{row.plain:.1f}", *gains)
    tables.show(title, table)


def _show_times(model: Any, tokenizer: Any, max_tokens: int, as_json: bool) -> None:
    """Plain and drafted in turns, the whole cluster running."""
    from mlx_redrafter.api import stream_generate
    from mlx_redrafter.text.template import prompt_ids

    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": text}], {}) for text in QUESTIONS]
    times: dict[str, list[float]] = {"plain": [], "drafted": []}
    texts: dict[str, list[list[int]]] = {"plain": [], "drafted": []}
    for number, prompt in enumerate([prompts[0], *prompts]):  # the first one makes the graphs
        for name, draft in (("plain", False), ("drafted", True)):
            tokens, start = [], 0.0
            for response in stream_generate(model, tokenizer, prompt, max_tokens, draft=draft):
                start = start or time.perf_counter()
                tokens.append(response.token)
            if number and len(tokens) > 1:
                times[name].append((len(tokens) - 1) / (time.perf_counter() - start))
                texts[name].append(tokens)
    rates = {name: sum(found) / max(1, len(found)) for name, found in times.items()}
    same = texts["plain"] == texts["drafted"]
    if as_json:
        typer.echo(json.dumps({"predicted": False, "tokens_per_second": rates, "same_text": same}))
        return
    typer.echo(
        f"timed on these machines: plain {rates['plain']:.2f} tokens/s, "
        f"drafted {rates['drafted']:.2f} tokens/s; the text is "
        f"{'the same' if same else 'NOT the same'}"
    )
    if not same:
        console.warn("drafted and plain text differ: mlx-redrafter doctor --hosts says more")


def _bandwidth(chip: str) -> float:
    from mlx_redrafter.distributed.predict import BANDWIDTH, GB

    known = {name.lower(): value for name, value in BANDWIDTH.items()}
    if chip.lower() in known:
        return known[chip.lower()]
    try:
        value = float(chip)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e5:
        raise OptionError(
            f"--chip {chip} is not known: give one of {', '.join(BANDWIDTH)}, or the memory "
            "bandwidth in GB/s"
        )
    return value * GB


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(2 <= number <= 64 for number in found):
        raise OptionError(f"--sizes {text} is not possible: give numbers of 2 to 64, such as 2,4")
    return found
