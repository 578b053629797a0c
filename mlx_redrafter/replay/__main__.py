"""Compare ways to choose a shape, and write the table that the policy reckons with.

    python -m mlx_redrafter.replay [--count 30] [--max-tokens 128] [--prospects FILE]

Every position of every answer gets the drafts that the program would have made there, so that a
policy can walk through an answer without the model, under this machine's measured costs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mlx_redrafter import console, net, reports, tuning
from mlx_redrafter.api import load
from mlx_redrafter.checks import at_least
from mlx_redrafter.decoding import prospects
from mlx_redrafter.decoding.costs import Costs
from mlx_redrafter.decoding.policy import Automatic, Fixed, contenders
from mlx_redrafter.decoding.prospects import LOOKUP, Prospects
from mlx_redrafter.decoding.tree import TreeShape
from mlx_redrafter.paths import expanded
from mlx_redrafter.prompts import DEV, read_prompts
from mlx_redrafter.replay.record import TEMPERATURES, Answer, record, tabulate
from mlx_redrafter.replay.walks import (
    PLAIN,
    Calibration,
    Walk,
    after_draft_walk,
    grouped,
    oracle_walk,
    policy_walk,
    speedups,
)


def main(
    model: str = "smollm2-135m",
    drafter: str = "auto",
    prompts: Annotated[Path, typer.Option(callback=expanded)] = DEV,
    count: int = 30,
    max_tokens: int = 128,
    lost: Annotated[
        float, typer.Option(help="Seconds of a step that is not launched ahead.")
    ] = 1e-3,
    write: Annotated[
        Path | None, typer.Option("--prospects", callback=expanded, help="JSON file for the table.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Record answers, replay every way to choose, print the speed-ups over plain decoding."""
    at_least(1, count=count, max_tokens=max_tokens)
    loaded, tokenizer = load(model, drafter)
    chosen = read_prompts(prompts, count)
    answers = []
    with reports.progress(len(chosen) * len(TEMPERATURES)) as step:
        for answer in record(loaded, tokenizer, chosen, max_tokens):
            answers.append(answer)
            step()
    shapes = prospects.shapes(loaded.drafter is not None)
    table = tabulate(answers, loaded.drafter is not None)
    if write is not None:
        prospects.save(write, table)
        console.note(f"written: {write}")
    costs = tuning.costs(loaded, console.note)
    speed, yields = compare(answers, shapes, table, costs, lost), sources(answers)
    if as_json:
        found = {"speed_over_plain": speed, "tokens_per_step": yields}
        print(json.dumps({"costs": costs.as_dict(), **found}))
        return
    for title, rows in (("speed over plain decoding", speed), ("tokens per step", yields)):
        names = list(next(iter(rows.values())))
        shown = Table(title, *names, box=None, header_style="dim")
        for name, values in rows.items():
            shown.add_row(name, *(f"{values[n]:.2f}" if n in values else "" for n in names))
        Console(width=160).print(shown, "")


def sources(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Tokens per step of each source of drafts alone and of both, at the same number of nodes; and
    of sampled answers drafted without their noise."""
    rows: dict[str, dict[str, float]] = {}
    for nodes in (4, 8):
        both = TreeShape(3, 4, nodes, lookup=LOOKUP)
        for shape in (replace(both, lookup=0), both.without_drafter(), both):
            rows[str(shape)] = tokens_per_step(answers, shape)
    sampled = [a for a in answers if a.sampled]
    for shape in (TreeShape(1, 4, 5), TreeShape(3, 4, 8), TreeShape(3, 4, 8, lookup=LOOKUP)):
        rows[str(shape)] = tokens_per_step(answers, shape)
        rows[f"{shape}, noise unknown"] = tokens_per_step([a.blindly() for a in sampled], shape)
    return rows


def tokens_per_step(answers: Sequence[Answer], shape: TreeShape) -> dict[str, float]:
    """By group and over all, greedy and sampled."""
    return {
        name: sum(len(a.tokens) for a in part) / sum(a.steps(shape) for a in part)
        for name, part in grouped(answers)
    }


def compare(
    answers: Sequence[Answer],
    shapes: Sequence[TreeShape],
    table: Prospects,
    costs: Costs,
    lost: float,
) -> dict[str, dict[str, float]]:
    """Speed-ups of fixed shapes, the policy, a choice after drafting, and the offline optimum."""
    plain = costs.table(PLAIN)

    def automatic(sampled: bool) -> Automatic:
        def tokens(shape: TreeShape) -> float:
            return table.tokens(shape, sampled)

        return Automatic(contenders(shapes, tokens, costs.table), tokens, costs.table)

    def fixed(shape: TreeShape) -> Walk:
        return policy_walk(lambda sampled: Fixed(shape), costs)

    found = {str(s): speedups(answers, fixed(s), costs) for s in shapes if s.drafts}
    ranked = sorted(found, key=lambda n: -found[n]["greedy all"] - found[n]["sampled all"])
    rows = {f"always {name}": found[name] for name in ranked[:4]}
    rows["before drafting, learned"] = speedups(answers, policy_walk(automatic, costs), costs)
    speed = max(found[n]["greedy all"] for n in found) / plain
    for width, depth in ((2, 2), (2, 3), (3, 3)):
        shape = TreeShape(width, depth, 8, lookup=LOOKUP)
        if shape not in shapes:
            continue
        right = Calibration(answers, shape)
        for late in (lost, 0.0):
            walk = after_draft_walk(shape, costs, speed, right, late)
            name = f"after drafting {width}x{depth}, {late * 1e3:g} ms lost"
            rows[name] = speedups(answers, walk, costs)
    rows["knowing what will be accepted"] = speedups(
        answers, oracle_walk(shapes, costs, 1.3 * speed), costs
    )
    return rows


if __name__ == "__main__":
    net.run_module(main)
