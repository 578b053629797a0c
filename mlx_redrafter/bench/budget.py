"""`mlx-redrafter bench budget`: the measured cost curve, and what the policy makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_redrafter.api import Model, load
from mlx_redrafter.budget import yields
from mlx_redrafter.budget.chunks import FAR as BEHIND
from mlx_redrafter.budget.chunks import Chunks
from mlx_redrafter.budget.costs import FAR, NEAR, Costs
from mlx_redrafter.evaluation import figures
from mlx_redrafter.terminal import console, tables
from mlx_redrafter.tree.shape import TreeShape

PLAIN = TreeShape.plain()
LENGTHS = (1024, 4096, 16384, 65536)  # tokens of a prompt


def run(model: str, drafter: str, again: bool, plot: Path | None, as_json: bool) -> None:
    """Measure or read the costs, and show them.

    Raises:
        OptionError: a plot file of another kind, or in a folder that does not exist.
    """
    if plot is not None:
        figures.check(plot)
    loaded, _ = load(model, drafter)
    known = loaded.budget.costs(console.note, again)
    chunks = loaded.budget.chunks(console.note, again)
    table = yields.load(loaded.drafter_folder)
    choices = {
        kind: [row(s, known, table, sampled) for s in loaded.budget.policy(sampled).shapes]
        for kind, sampled in yields.KINDS.items()
    }
    facts = {"name": loaded.name, **loaded.budget.conditions()}
    if plot is not None:
        draw(known, plot)
        console.note(f"written: {plot}")
    if as_json:
        measured = {"costs": known.as_dict(), "choices": choices, "chunks": chunks.as_dict()}
        print(json.dumps({**facts, **measured, "prefill_step_sizes": step_sizes(loaded)}))
        return
    out = Console(highlight=False)
    out.print("Passes of the model", style="bold")
    out.print(passes(known))
    out.print("\nWhat the policy chooses from", style="bold")
    out.print(offers(choices))
    out.print("\nReading a prompt", style="bold")
    out.print(chunk_sizes(chunks, loaded.target.config.num_layers))
    sizes = step_sizes(loaded).items()
    out.print("chosen: " + ", ".join(f"{n} for {prompt} tokens" for prompt, n in sizes))
    console.note(console.facts(facts, "name", "machine", "device", "dtype", "mlx", "blas"))


def row(shape: TreeShape, known: Costs, table: yields.Yields, sampled: bool) -> dict[str, Any]:
    """What is expected of a shape on average text."""
    tokens, seconds = table.tokens(shape, sampled), known.table(shape)
    return {
        "shape": str(shape),
        "milliseconds": round(1e3 * seconds, 2),
        "tokens_per_step": round(tokens, 3),
        "times_plain": round(tokens * known.table(PLAIN) / seconds, 3),
    }


def passes(known: Costs) -> Table:
    """t(N) near the beginning of a text and far into it."""
    titles = (f"ms at {NEAR} cached", "times one token", f"ms at {FAR} cached")
    more = ("experts, times one token's",) if known.distinct else ()
    shown = tables.table("tokens checked", *titles, *more)
    for nodes, seconds in known.verify.items():
        far = known.checking(nodes, FAR)
        ratio = seconds / known.verify[1]
        row = [f"{1e3 * seconds:.1f}", f"{ratio:.2f}", f"{1e3 * far:.1f}"]
        if known.distinct:
            row.append(f"{known.distinct[nodes] / known.distinct[1]:.2f}")
        shown.add_row(str(nodes), *row)
    for width, (first, further) in known.draft.items():
        level = f"{1e3 * first:.2f} + {1e3 * further:.2f} a level"
        shown.add_row(f"draft, width {width}", level, "", "", *[""] * len(more), style="dim")
    return shown


def offers(choices: dict[str, list[dict[str, Any]]]) -> Table:
    """The contenders, greedy and sampled."""
    shown = tables.table("shape", "decoding", "ms a step", "tokens a step", "times plain")
    for kind, rows in choices.items():
        for r in rows:
            figures = (r["milliseconds"], r["tokens_per_step"], r["times_plain"])
            shown.add_row(r["shape"], kind, *(f"{x:.2f}" for x in figures))
    return shown


def chunk_sizes(known: Chunks, layers: int) -> Table:
    """What a prompt token takes in a model of so many layers, by how many are read at a time."""
    titles = ("ms a token at the start", f"behind {BEHIND} tokens")
    shown = tables.table("tokens read at a time", *titles)
    whole = layers / known.layers
    for n in known.near:
        shown.add_row(str(n), *(f"{1e3 * whole * part[n]:.2f}" for part in (known.near, known.far)))
    return shown


def step_sizes(model: Model) -> dict[int, int]:
    """The chunk that is chosen, by the length of the prompt."""
    longest = model.target.config.max_positions
    prompts = [n for n in LENGTHS if n < longest] or [longest]
    return {prompt: model.budget.step_size(prompt) for prompt in prompts}


def draw(known: Costs, file: Path) -> None:
    """The cost curve: milliseconds by tokens checked, near and far, and N times one token."""
    figure = figures.new(6, 3.6)
    axes = figure.subplots()
    nodes = list(known.verify)
    axes.plot(nodes, [1e3 * known.verify[n] for n in nodes], marker="o", label=f"{NEAR} cached")
    shapes = [TreeShape(1, 0, n, lookup=n - 1) if n > 1 else PLAIN for n in nodes]
    axes.plot(nodes, [1e3 * known.table(s, FAR) for s in shapes], marker="s", label=f"{FAR} cached")
    top = 1.05 * 1e3 * known.table(shapes[-1], FAR)
    linear = [1e3 * n * known.verify[1] for n in nodes]
    axes.plot(nodes, linear, linestyle=":", color="grey", label="one token at a time")
    axes.set(
        xlabel="tokens checked in one pass", ylabel="milliseconds", ylim=(0, top), xticks=nodes
    )
    axes.legend(frameon=False)
    figures.save(figure, file)
