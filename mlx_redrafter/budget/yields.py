"""What a step of a shape yields on average text: tokens per step, recorded with a drafter.

The table is made by replaying drafts along the model's own answers (``evaluation.yields_record``);
training writes one beside every drafter, and `bench acceptance --record` beside one from elsewhere.
A drafter without one is reckoned with the built-in model's: the policy learns the difference.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_redrafter.errors import DrafterError
from mlx_redrafter.runtime.paths import ASSETS
from mlx_redrafter.tree.shape import TreeShape

FILE, OLD_FILE = "yields.json", "prospects.json"
LOOKUP = 7  # drafts from the text cost next to nothing and are always among the candidates
BEAMS = ((0, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (3, 4),
         (4, 3), (4, 5))  # fmt: skip
NODES = (2, 3, 4, 5, 6, 8, 12, 16)
KINDS = {"greedy": False, "sampled": True}


@dataclass(frozen=True)
class Yields:
    """Tokens per step by beam (width, depth) and nodes, greedy and sampled.

    ``table[sampled][width, depth][nodes]``, lookup included.
    """

    table: dict[bool, dict[tuple[int, int], dict[int, float]]]

    def tokens(self, shape: TreeShape, sampled: bool) -> float:
        """Of a shape of ``shapes``; 1 where nothing is known of it."""
        return self.table[sampled].get(beam_of(shape), {}).get(shape.nodes, 1.0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            kind: {f"{w}x{d}": {str(n): round(t, 4) for n, t in row.items()}
                   for (w, d), row in self.table[sampled].items()}
            for kind, sampled in KINDS.items()
        }  # fmt: skip


def beam_of(shape: TreeShape) -> tuple[int, int]:
    """Width and depth as the table has them: 0 and 0 without beams."""
    return (shape.width if shape.depth else 0, shape.depth)


def shapes(drafter: bool) -> list[TreeShape]:
    """All that a policy may choose from, plain decoding first: with a drafter, beams and lookup in
    one tree; without, lookup alone (how easy a text is for the one says little of the other)."""
    found = [TreeShape.plain()]
    for width, depth in BEAMS[1:] if drafter else BEAMS[:1]:
        for nodes in NODES:
            if nodes <= 1 + width * depth + LOOKUP and (depth == 0 or nodes > depth):
                found.append(TreeShape(max(width, 1), depth, nodes, lookup=LOOKUP))
    return found


def chains(drafter: bool, most: int = 8) -> list[TreeShape]:
    """Those of one path and so many nodes: where the order of rows must be that of plain steps."""
    found = [shape for shape in shapes(False) if shape.nodes <= most]
    depths = [depth for width, depth in BEAMS if width == 1 and depth < most]
    return found + [TreeShape.chain(depth) for depth in depths if drafter]


def save(file: Path, table: Yields) -> None:
    file.write_text(json.dumps(table.as_dict(), indent=1, sort_keys=True) + "\n")


def load(folder: Path | None) -> Yields:
    """Those of a drafter's folder, or the built-in model's.

    Raises:
        DrafterError: a file that cannot be read.
    """
    own = [folder / name for name in (FILE, OLD_FILE)] if folder is not None else []
    file = next((path for path in own if path.is_file()), ASSETS / FILE)
    try:
        stored = json.loads(file.read_text())
        table = {
            sampled: {
                _beam(name): {int(n): float(t) for n, t in row.items()}
                for name, row in stored[kind].items()
            }
            for kind, sampled in KINDS.items()
        }
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DrafterError(
            f"{file} cannot be read ({type(error).__name__}): delete it, or record it again "
            "(mlx-redrafter bench acceptance --record --drafter DIR)"
        ) from None
    return Yields(table)


def _beam(name: str) -> tuple[int, int]:
    width, depth = name.split("x")
    return int(width), int(depth)
