"""`bench acceptance`: how good a drafter is, as tables or JSON, and recorded beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, load
from mlx_redrafter.budget import yields
from mlx_redrafter.drafters import calibration
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import acceptance, conditions, positions, sharing
from mlx_redrafter.evaluation.agreement import Agreement
from mlx_redrafter.evaluation.prompts import DEV, read_prompts
from mlx_redrafter.runtime.checks import at_least
from mlx_redrafter.terminal import console, tables


def run(
    model: str,
    drafter: str,
    prompts: Path | None,
    count: int | None,
    max_tokens: int,
    record: bool,
    as_json: bool,
) -> None:
    """Show tokens per step by tree, temperature and prompt group. ``record``: agreement by draft
    position too, and write what the policy reads into the drafter's folder. Raises OptionError."""
    at_least(1, count=count, max_tokens=max_tokens)
    if record and drafter == "auto":
        raise OptionError("--record writes into the drafter's folder: name it with --drafter DIR")
    loaded, tokenizer, place = _loaded(model, drafter)
    chosen = read_prompts(prompts or DEV, count)
    if record and not os.access(place, os.W_OK):
        raise OptionError(f"nothing can be written into {place}: give a copy of it to --drafter")
    shapes, agreement = acceptance.SHAPES, tuple[Agreement, ...]()
    facts = {**conditions.of(loaded, chosen), "max_tokens": max_tokens}
    if record:
        with tables.progress(positions.answers(len(chosen), shapes)) as step:
            found = positions.evaluate(
                loaded, tokenizer, chosen, shapes=shapes, max_tokens=max_tokens, on_answer=step
            )
        positions.write(place, found)
        rows, agreement, fitted = list(found.live), found.agreement, found.fitted
    else:
        with tables.progress(len(chosen) * len(shapes) * len(acceptance.TEMPERATURES)) as step:
            rows = acceptance.measure(
                loaded, tokenizer, chosen, max_tokens=max_tokens, on_answer=step
            )
    if as_json:
        along: dict[str, object] = {}
        if record:
            along = {"teacher_forced": [r.as_dict() for r in agreement], "fitted": fitted.as_dict()}
        print(json.dumps({"rows": [row.as_dict() for row in rows], **along, **facts}))
        return
    _live(rows, facts)
    if record:
        _along(agreement)
        console.note(str(fitted))
        names = f"{positions.FILE}, {yields.FILE} and {calibration.FILE}"
        console.note(f"wrote {names} into {place}")


def share(
    model: str,
    drafter: str,
    prompts: Path | None,
    count: int | None,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Show what beams that begin alike save, by width and depth. Raises OptionError."""
    at_least(1, count=count, max_tokens=max_tokens)
    loaded, tokenizer, _ = _loaded(model, drafter)
    chosen = read_prompts(prompts or DEV, count)
    facts = {**conditions.of(loaded, chosen), "max_tokens": max_tokens}
    answers = len(chosen) * len(sharing.WIDTHS) * len(acceptance.TEMPERATURES)
    with tables.progress(answers) as step:
        rows = sharing.measure(loaded, tokenizer, chosen, max_tokens=max_tokens, on_answer=step)
    if as_json:
        print(json.dumps({"rows": [row.as_dict() for row in rows], **facts}))
        return
    depths = list(dict.fromkeys(row.depth for row in rows))
    shown = tables.table("beam width", "temperature", *(f"depth {depth}" for depth in depths))
    for i in range(0, len(rows), len(depths)):
        part = rows[i : i + len(depths)]
        cells = [f"{row.saved:.0%}" for row in part]
        shown.add_row(str(part[0].width), f"{part[0].temp:g}", *cells)
    tables.show("Drafted tokens that need no node of their own", shown, facts)


def _loaded(model: str, drafter: str) -> tuple[Model, TokenizerWrapper, Path]:
    """The model with a drafter, and the drafter's folder."""
    loaded, tokenizer = load(model, drafter)
    if loaded.drafter is None or loaded.drafter_folder is None:
        raise OptionError(f"there is no drafter for {model}: give one with --drafter")
    return loaded, tokenizer, loaded.drafter_folder


def _live(rows: Sequence[acceptance.Row], facts: dict[str, object]) -> None:
    groups = list(dict.fromkeys(row.group for row in rows))
    rates = tables.table("tree", "temperature", *groups, "accepted of checked")
    for i in range(0, len(rows), len(groups)):
        part = rows[i : i + len(groups)]
        cells = [f"{row.stats.tokens_per_step:.2f}" for row in part]
        share = f"{part[-1].stats.acceptance_rate:.0%}"
        rates.add_row(str(part[0].shape), f"{part[0].temp:g}", *cells, share)
    tables.show("Tokens per step", rates, facts)


def _along(rows: Sequence[Agreement]) -> None:
    depths = [f"draft {d.depth}" for d in rows[0].depths]
    shares = tables.table("answers", "temperature", *depths, "ECE")
    for row in rows:
        cells = [_share(d.calibration.agreement, "{:.0%}") for d in row.depths]
        shares.add_row(row.group, f"{row.temp:g}", *cells, _share(row.error, "{:.3f}"))
    tables.show("First choices that are right, all earlier tokens being true", shares)


def _share(value: float, form: str) -> str:
    return "-" if value != value else form.format(value)
