"""Pictures of a measurement, as PNG files; without matplotlib one warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_redrafter.bench.speed.document import SPEED, SWEEP, Document
from mlx_redrafter.bench.speed.summary import ALL
from mlx_redrafter.bench.speed.sweep import best, cells
from mlx_redrafter.bench.speed.ways import AUTOMATIC, PERFECT_NAME, PLAIN
from mlx_redrafter.evaluation import figures
from mlx_redrafter.terminal import console
from mlx_redrafter.training.plots import acceptance_by_depth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPEEDUP, HEAT, ACCEPTANCE, COST = "speedup.png", "heatmap.png", "acceptance.png", "cost.png"
Row = Mapping[str, Any]


def write_all(document: Document, folder: Path) -> list[Path]:
    """All pictures there is data for."""
    if not figures.available():
        console.warn(f"no plots: {figures.MISSING}")
        return []
    files = []
    rows = document.summary
    if document.kind == SPEED and rows:
        files.append(speedup(rows, folder / SPEEDUP))
        if drafted := _accepted(rows):
            files.append(acceptance_by_depth({"live": drafted}, folder / ACCEPTANCE))
    if document.kind == SWEEP and cells(rows):
        files.append(heat_map(rows, folder / HEAT))
    if len(document.cost_curve) > 1:
        curve = {int(n): seconds for n, seconds in document.cost_curve.items()}
        files.append(cost(curve, folder / COST))
    return files


def speedup(rows: Sequence[Row], file: Path) -> Path:
    """Speed over plain decoding by group: bars are medians, whiskers the slowest and the fastest
    prompt, and a tick the worst tenth."""
    temps = list(dict.fromkeys(r["temp"] for r in rows))
    groups = [*dict.fromkeys(r["group"] for r in rows if r["group"] != ALL), ALL]
    groups = groups if len(groups) > 2 else [ALL]
    shown = [r for r in rows if r["way"] != PLAIN and PERFECT_NAME not in r["way"]]
    names = list(dict.fromkeys(r["way"] for r in shown))
    figure = figures.new(2 + 1.3 * len(groups) * max(1, len(names) / 3), 2.9 * len(temps) + 0.4)
    axes = figure.subplots(len(temps), 1, sharex=True, sharey=True, squeeze=False)
    for axis, temp in zip(axes[:, 0], temps, strict=True):
        for i, name in enumerate(names):
            mine = [r for r in shown if r["way"] == name and r["temp"] == temp]
            _bars(axis, mine, groups, i, len(names), name)
        axis.axhline(1, color="#888888", lw=1)
        axis.set_title(figures.answers(temp), fontsize=10)
        axis.set_xticks(range(len(groups)), groups)
        axis.set_ylabel("times plain decoding")
        axis.set_ylim(bottom=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right upper")
    return figures.save(figure, file)


def _bars(
    axis: Axes, rows: Sequence[Row], groups: Sequence[str], index: int, of: int, name: str
) -> None:
    """One way's bars, one for every group."""
    by_group = {r["group"]: r for r in rows}
    chosen = [(groups.index(g), by_group[g]) for g in groups if g in by_group]
    width = 0.8 / of
    x = [place - 0.4 + width * (index + 0.5) for place, _ in chosen]
    y = [r["times_plain"] for _, r in chosen]
    below = [r["times_plain"] - r["lowest"] for _, r in chosen]
    above = [r["highest"] - r["times_plain"] for _, r in chosen]
    axis.bar(
        x,
        y,
        0.9 * width,
        color=figures.COLOURS[index % len(figures.COLOURS)],
        alpha=0.75,
        label=name,
    )
    axis.errorbar(x, y, [below, above], fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
    deciles = [r["worst_decile"] for _, r in chosen]
    axis.plot(x, deciles, "_", color="#333333", ms=7, mew=2)


def heat_map(rows: Sequence[Row], file: Path) -> Path:
    """Speed over plain decoding by width and depth, each at its fastest number of nodes.

    The best cell has a solid frame, the one of the automatic choice a broken one. (Apple's port
    draws the same over beam width and beam length.)
    """
    from matplotlib.colors import TwoSlopeNorm

    found = cells(rows)
    usual = next((r for r in rows if r["way"] == AUTOMATIC and r["group"] == ALL), None)
    winner = best(found)
    assert winner is not None, "a heat map has cells"
    widths, depths = sorted({w for w, _ in found}), sorted({d for _, d in found})
    nan = float("nan")
    values = [
        [found[w, d]["times_plain"] if (w, d) in found else nan for d in depths] for w in widths
    ]
    flat = [row["times_plain"] for row in found.values()]
    reach = max(0.05, max(flat) - 1, 1 - min(flat))
    figure = figures.new(1.15 * len(depths) + 1.6, 0.9 * len(widths) + 1.5)
    axis = figure.subplots()
    norm = TwoSlopeNorm(1, 1 - reach, 1 + reach)
    image = axis.imshow(values, cmap="RdBu_r", norm=norm, origin="lower", alpha=0.8, aspect="auto")
    for (w, d), row in found.items():
        text = f"{row['times_plain']:.2f}\n{row['shape']['nodes']} nodes"
        axis.text(depths.index(d), widths.index(w), text, ha="center", va="center", fontsize=8)
    frames = [(winner["shape"], "-", f"best: {winner['way']}, {winner['times_plain']:.2f}")]
    if usual is not None:
        frames.append((usual["shape"], "--", f"automatic: {usual['times_plain']:.2f}"))
    for shape, style, label in frames:
        _frame(axis, widths, depths, shape, style, label)
    axis.set_xticks(range(len(depths)), [str(d) for d in depths])
    axis.set_yticks(range(len(widths)), [str(w) for w in widths])
    axis.set(xlabel="draft depth (root not counted)", ylabel="beam width")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=2)
    figure.colorbar(image, label="times plain decoding")
    return figures.save(figure, file)


def _frame(
    axis: Axes,
    widths: Sequence[int],
    depths: Sequence[int],
    shape: Mapping[str, int],
    style: str,
    label: str,
) -> None:
    """A frame around a shape's cell; without such a cell only the line in the legend."""
    from matplotlib.patches import Rectangle

    inset = 0.46 if style == "-" else 0.40
    x = depths.index(shape["depth"]) if shape["depth"] in depths else float("nan")
    y = widths.index(shape["width"]) if shape["width"] in widths else float("nan")
    axis.add_patch(
        Rectangle((x - inset, y - inset), 2 * inset, 2 * inset, fill=False, ls=style, lw=1.8,
                  ec="#111111", label=label)
    )  # fmt: skip


def cost(curve: Mapping[int, float], file: Path) -> Path:
    """What a pass over N tokens costs, in passes over one."""
    nodes = list(curve)
    times = [seconds / curve[nodes[0]] for seconds in curve.values()]
    figure = figures.new(5, 3.4)
    axis = figure.subplots()
    axis.plot(nodes, nodes, color="#bbbbbb", lw=1, label="N passes over one token")
    label = f"measured; one token: {1000 * curve[nodes[0]]:.1f} ms"
    axis.plot(nodes, times, "o-", ms=4, color=figures.COLOURS[0], label=label)
    axis.set(xlabel="tokens N in a pass", ylabel="t(N) / t(1)", ylim=(0, 1.3 * max(times)))
    axis.legend(frameon=False, fontsize=8)
    return figures.save(figure, file)


def _accepted(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Drafted ways as ``acceptance_by_depth`` wants them."""
    chosen = [
        r for r in rows if r["shape"] and r["shape"]["nodes"] > 1 and PERFECT_NAME not in r["way"]
    ]
    return [{**r, "shape": r["way"]} for r in chosen]
