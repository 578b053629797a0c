"""What a conversion did."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .formats import Format
    from .mapping import Mapping
    from .writer import Written


@dataclass(frozen=True)
class Summary:
    """What was converted, or would be.

    Attributes:
        source: as given.
        format: what the source was recognised as, or declared to be.
        to: layout of the output.
        out: the new folder; None after a dry run.
        mapping: every tensor.
        files: of the output, with size and SHA-256.
        notes: what a person should know.
        url: where it was uploaded to.
    """

    source: str
    format: Format
    to: str
    out: Path | None
    mapping: list[Mapping]
    files: list[Written] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    url: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the output."""
        return sum(file.size for file in self.files)
