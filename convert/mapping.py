"""What a conversion does with each tensor: the unit of plans, of dry runs and of summaries."""

from __future__ import annotations

from typing import NamedTuple


class Mapping(NamedTuple):
    """One tensor of the output, or a tensor of the source that is left out (no target).

    Args:
        source: name in the source.
        target: name in the output; empty for a tensor that is not carried over.
        shape: of the output; for a dropped tensor of the source.
        note: what else happens to it: transposed, quantised, dropped and why.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    note: str = ""


def size_text(size: int) -> str:
    """Bytes in units of a thousand: 999 B, 1.0 kB, 12.3 GB."""
    if size < 1000:
        return f"{size} B"
    value, unit = size / 1e3, "kB"
    for larger in ("MB", "GB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}"
