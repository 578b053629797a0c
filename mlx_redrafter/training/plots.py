"""Pictures of a training run and of its drafter, as PNG files; needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import figures
from mlx_redrafter.evaluation.positions import FILE, read
from mlx_redrafter.terminal import console
from mlx_redrafter.training.shards import read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES, ACCEPTANCE, CALIBRATION = "curves.png", "acceptance.png", "calibration.png"
_DEPTHS = ("#08306b", "#2171b5", "#6baed6", "#d98b3a", "#a0481c")  # near to far
_FEWEST = 20  # predictions of a bin that is drawn
_POINTS = 200  # of a smoothed curve


def write_all(folder: Path, log: Path | None = None) -> list[Path]:
    """All pictures there is data for, into the drafter's folder; without matplotlib, one warning.

    Args:
        folder: where evaluation.json is, if there was an evaluation.
        log: log.jsonl of the fit.
    """
    if not figures.available():
        console.warn(f"no plots: {figures.MISSING}")
        return []
    files = []
    if log is not None and log.is_file():
        files.append(curves(log, folder / CURVES))
    if (folder / FILE).is_file():
        values = read(folder)
        files.append(acceptance_by_depth(values, folder / ACCEPTANCE))
        files.append(reliability(values, folder / CALIBRATION))
    return files


def curves(log: Path, file: Path) -> Path:
    """Loss and agreement over the positions processed, trained and held out.

    Both are computed among the candidate tokens of training, so agreement is higher here than
    among all tokens: ``reliability`` and the card show the latter.

    Raises:
        OptionError: no matplotlib, or no steps in the log.
    """
    # A run that was resumed may have logged a step twice: the last time counts.
    rows = sorted({row["step"]: row for row in read_lines(log)}.values(), key=lambda r: r["step"])
    if not rows:
        raise OptionError(f"{log} holds no steps yet: train first")
    held = [{**r["held_out"], "positions": r["positions"]} for r in rows if r.get("held_out")]
    figure = figures.new(7, 6)
    loss, agreement = figure.subplots(2, 1, sharex=True)
    _line(loss, rows, [r["loss"] for r in rows], "#555555", "training")
    if held:
        label = "held out, without the acceptance loss"
        loss.plot(_millions(held), [r["loss"] for r in held], "o-", ms=3, color=figures.COLOURS[1],
                  label=label)  # fmt: skip
    loss.set_ylabel("loss")
    loss.legend(frameon=False)
    for k in range(len(rows[0]["agreement"])):
        color, label = _DEPTHS[k % len(_DEPTHS)], f"draft {k + 1}"
        values = [r["agreement"][k] for r in rows]
        _line(agreement, rows, values, color, None if held else label)
        if held:
            agreement.plot(_millions(held), [r["agreement"][k] for r in held], "o-", ms=3,
                           color=color, label=label)  # fmt: skip
    agreement.set_ylabel("agreement with the target\namong the candidates of training")
    agreement.set_xlabel("positions processed (millions)")
    agreement.legend(frameon=False, title="held out; faint: training" if held else None)
    return figures.save(figure, file)


def acceptance_by_depth(evaluation: Mapping[str, Any], file: Path) -> Path:
    """Share of live steps in which the draft of each depth was accepted, by group.

    Args:
        evaluation: see ``Evaluation.as_dict``.
    """
    live = evaluation["live"]
    shapes = list(dict.fromkeys(row["shape"] for row in live))
    temps = list(dict.fromkeys(row["temp"] for row in live))
    groups = list(dict.fromkeys(row["group"] for row in live if row["group"] != "all"))
    figure = figures.new(3.6 * len(temps) + 0.6, 2.8 * len(shapes) + 0.4)
    axes = figure.subplots(len(shapes), len(temps), sharex=True, sharey=True, squeeze=False)
    deepest = {
        shape: max(1, *(len(r["per_depth"]) for r in live if r["shape"] == shape))
        for shape in shapes
    }
    for row in live:
        if row["group"] not in groups:
            continue
        axis = axes[shapes.index(row["shape"])][temps.index(row["temp"])]
        depths = range(1, deepest[row["shape"]] + 1)
        shares = [*row["per_depth"], *[0.0] * len(depths)][: len(depths)]
        color = figures.COLOURS[groups.index(row["group"]) % len(figures.COLOURS)]
        label = f"{row['group']}, {row['tokens_per_step']:.2f} tokens per step"
        axis.plot(depths, shares, "o-", ms=4, color=color, label=label)
        axis.set_title(f"{row['shape']}, {figures.answers(row['temp'])}", fontsize=10)
        axis.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylim(0, 1)
    axes[0][0].set_xticks(range(1, max(deepest.values()) + 1))
    figure.supxlabel("draft depth", fontsize=10)
    figure.supylabel("share of steps with this draft accepted", fontsize=10)
    return figures.save(figure, file)


def reliability(evaluation: Mapping[str, Any], file: Path) -> Path:
    """How often a draft of a given probability is right: all groups, a line per depth.

    Bins of fewer than 20 predictions are left out; below are the shares of all bins.
    """
    edges = evaluation["calibration"]["edges"]
    tables = [t for t in evaluation["calibration"]["tables"] if t["group"] == "all"]
    overall = {r["temp"]: r["ece"] for r in evaluation["teacher_forced"] if r["group"] == "all"}
    figure = figures.new(3.8 * len(tables) + 0.4, 5)
    axes = figure.subplots(
        2, len(tables), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1)
    )
    for column, table in enumerate(tables):
        upper, lower = axes[0][column], axes[1][column]
        upper.plot([0, 1], [0, 1], color="#bbbbbb", lw=1)
        for d in table["depths"]:
            points = [
                (p, share)
                for p, share, n in zip(d["probability"], d["agreed"], d["count"], strict=True)
                if n >= _FEWEST
            ]
            upper.plot(*zip(*points, strict=True) if points else ([], []), "o-", ms=3,
                       color=_DEPTHS[(d["depth"] - 1) % len(_DEPTHS)],
                       label=f"draft {d['depth']}, ECE {_number(d['ece'])}")  # fmt: skip
        error = _number(overall.get(table["temp"]))
        upper.set_title(f"{figures.answers(table['temp'])}, ECE {error}", fontsize=10)
        upper.legend(frameon=False, fontsize=8)
        counts = [sum(bin) for bin in zip(*(d["count"] for d in table["depths"]), strict=True)]
        width = edges[1] - edges[0]
        total = max(sum(counts), 1)
        lower.bar(edges[:-1], [n / total for n in counts], 0.9 * width, align="edge",
                  color="#999999")  # fmt: skip
    axes[0][0].set(xlim=(0, 1), ylim=(0, 1), ylabel="share right")
    axes[1][0].set_ylabel("share of drafts")
    figure.supxlabel("the drafter's probability of its first choice", fontsize=10)
    return figures.save(figure, file)


def _line(
    axis: Axes,
    rows: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    color: str,
    label: str | None,
) -> None:
    """A curve of running means, at most ``_POINTS`` of them; without a label a faint one."""
    width = -(-len(rows) // _POINTS)
    x = [_mean(_millions(rows[i : i + width])) for i in range(0, len(rows), width)]
    y = [_mean(values[i : i + width]) for i in range(0, len(rows), width)]
    axis.plot(x, y, lw=1, color=color, alpha=1.0 if label else 0.4, label=label)


def _millions(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["positions"] / 1e6 for row in rows]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
