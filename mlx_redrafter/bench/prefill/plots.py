"""The picture of a measurement: seconds by length, dense and sparse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_redrafter.evaluation import figures


def draw(document: Mapping[str, Any], file: Path) -> Path:
    """Measured times as lines, what the attention's share makes one expect as dotted ones.

    Raises:
        OptionError: no matplotlib.
    """
    rows = [row for row in document["lengths"] if row["ways"]]
    lengths = [row["length"] for row in rows]
    figure = figures.new(6, 3.8)
    axes = figure.subplots()
    for number, first in enumerate(rows[0]["ways"]):
        ways = [row["ways"][number] for row in rows]
        colour = figures.COLOURS[number % len(figures.COLOURS)]
        label, seconds = first["way"], [way["seconds"] for way in ways]
        axes.plot(lengths, seconds, "os^Dv"[number % 5] + "-", ms=5, color=colour, label=label)
        if number:
            predicted = [way["predicted_seconds"] for way in ways]
            axes.plot(lengths, predicted, ":", lw=1.2, color=colour)
    axes.plot([], [], ":", color="grey", label="expected of the attention's share")
    axes.set(xlabel="tokens of the prompt", ylabel="seconds to read it", xticks=lengths)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figures.save(figure, file)
