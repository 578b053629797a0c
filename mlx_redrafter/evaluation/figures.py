"""One style for all pictures of the project; needs the extra ``plot``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_redrafter.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito).
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000",
)  # fmt: skip
MISSING = 'plots need matplotlib: pip install "mlx-redrafter[plot]"'


FORMATS = (".png", ".svg", ".pdf")


def check(plot: Path) -> None:
    """Refuse what could not be drawn at the end of a long measurement.

    Raises:
        OptionError: a file of another kind, a folder that does not exist, no matplotlib.
    """
    if plot.suffix not in FORMATS or not plot.parent.is_dir():
        raise OptionError(
            f"the plot cannot be written to {plot}: give a file in an existing folder that ends "
            f"in {', '.join(FORMATS)}"
        )
    if not available():
        raise OptionError(MISSING)


def available() -> bool:
    """Is matplotlib there?"""
    return find_spec("matplotlib") is not None


def new(width: float, height: float) -> Figure:
    """An empty figure of so many inches, without pyplot and its global state.

    Raises:
        OptionError: no matplotlib.
    """
    if not available():
        raise OptionError(MISSING)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, file: Path) -> Path:
    """Written to the file, with the project's axes."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    figure.savefig(file, dpi=150)
    return file


def answers(temp: float) -> str:
    """How answers at a temperature are called in titles."""
    return f"temperature {temp:g}" if temp else "greedy"
