"""Figures of a comparison, from its timings alone: medians, spread, efficiency of the loop."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_redrafter.bench.speed.ways import MLX_LM, PLAIN
from mlx_redrafter.stats import DraftStats

Record = Mapping[str, Any]
ALL = "all"


def cost_curve(passes: Sequence[Record]) -> dict[int, float]:
    """``t(N)``: median seconds of a bare pass over N tokens, by N in rising order."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in passes:
        found[row["nodes"]].append(row["seconds"])
    return {nodes: statistics.median(found[nodes]) for nodes in sorted(found)}


def summarise(timings: Sequence[Record], passes: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per temperature, way and group, ``all`` among the groups.

    tokens_per_second: median over all answers. times_mlx_lm, times_plain: median over prompts of
    the median over rounds of the ratio within a turn; lowest, highest and worst_decile are of the
    prompts' times_plain. tokens_per_step; per_depth: share of steps whose draft at depth 1, 2, ...
    was accepted. efficiency: see :func:`_efficiency`. same: share of the answers that are plain's.
    """
    references = {(t["turn"], t["way"]): _speed(t) for t in timings if t["way"] in (PLAIN, MLX_LM)}
    by_way: dict[tuple[float, str], list[Record]] = defaultdict(list)
    for t in timings:
        by_way[t["temp"], t["way"]].append(t)
    curves = _curves(passes)
    rows = []
    for (temp, way), mine in by_way.items():
        for group in [ALL, *dict.fromkeys(t["group"] for t in mine)]:
            chosen = [t for t in mine if group in (ALL, t["group"])]
            facts = {"temp": temp, "way": way, "group": group, "shape": _usual(chosen)}
            rows.append({**facts, **_row(chosen, references, curves)})
    return rows


def _usual(timings: Sequence[Record]) -> dict[str, Any] | None:
    """The shape of most answers."""
    found = Counter(json.dumps(t["shape"]) for t in timings)
    usual: dict[str, Any] | None = json.loads(found.most_common(1)[0][0])
    return usual


def _row(
    timings: Sequence[Record],
    references: Mapping[tuple[int, str], float],
    curves: Mapping[int, tuple[list[int], list[float]]],
) -> dict[str, Any]:
    prompts: dict[int, list[Record]] = defaultdict(list)
    for t in timings:
        prompts[t["prompt"]].append(t)
    plain = _ratios(prompts, references, PLAIN)
    theirs = _ratios(prompts, references, MLX_LM)
    efficiencies = [
        _efficiency(ratio, rows, curves[number])
        for (number, rows), ratio in zip(prompts.items(), plain, strict=True)
        if rows[0]["shape"] is not None and rows[0]["nodes"] > 1
    ]
    histogram: Counter[int] = Counter()
    for t in timings:
        histogram.update({int(k): n for k, n in t["histogram"].items()})
    stats = DraftStats(steps=histogram.total(), histogram=histogram)
    compared = [t["same"] for t in timings if t["same"] is not None]
    return {
        "prompts": len(prompts),
        "answers": len(timings),
        "tokens_per_second": statistics.median(_speed(t) for t in timings),
        "times_mlx_lm": statistics.median(theirs) if theirs else None,
        "times_plain": statistics.median(plain),
        "lowest": min(plain),
        "highest": max(plain),
        "worst_decile": float(np.quantile(plain, 0.1)),
        "tokens_per_step": sum(t["tokens"] for t in timings) / sum(t["steps"] for t in timings),
        "efficiency": statistics.median(efficiencies) if efficiencies else None,
        "per_depth": stats.per_depth,
        "same": sum(compared) / len(compared) if compared else None,
    }


def _ratios(
    prompts: Mapping[int, Sequence[Record]],
    references: Mapping[tuple[int, str], float],
    reference: str,
) -> list[float]:
    """Per prompt the median over its turns of the speed over the reference's in the same turn."""
    found = []
    for rows in prompts.values():
        keys = [(t, (t["turn"], reference)) for t in rows]
        ratios = [_speed(t) / references[key] for t, key in keys if key in references]
        if ratios:
            found.append(statistics.median(ratios))
    return found


def _efficiency(
    times_plain: float, rows: Sequence[Record], curve: tuple[list[int], list[float]]
) -> float:
    """What the loop makes of what drafts and passes allow:
    speed-up over plain / (tokens per step / (t(N) / t(1))).

    Where N varied from step to step its mean counts, with t(N) between two measured sizes.
    """
    sizes, seconds = curve
    per_step = sum(t["tokens"] for t in rows) / sum(t["steps"] for t in rows)
    nodes = statistics.fmean(t["nodes"] for t in rows)
    cost = float(np.interp(nodes, sizes, seconds)) / seconds[0]
    return times_plain / (per_step / cost)


def _curves(passes: Sequence[Record]) -> dict[int, tuple[list[int], list[float]]]:
    """The cost curve of every prompt: pass sizes and seconds, from the turns of that prompt."""
    numbers = dict.fromkeys(p["prompt"] for p in passes)
    curves = {n: cost_curve([p for p in passes if p["prompt"] == n]) for n in numbers}
    return {n: (list(curve), list(curve.values())) for n, curve in curves.items()}


def _speed(timing: Record) -> float:
    return float(timing["tokens"] / timing["seconds"])
