"""Writes the table of docs/models.md: every type of mlx_lm, how it is run, and how exactly; and its
summary in README.md.

Run from the checkout: MLX_DISABLE_COMPILE=1 .venv/bin/python tests/support/adapter_table.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

from adapter_cases import LIMIT, TYPES, figures  # isort: skip
from mlx_redrafter.errors import ModelError
from mlx_redrafter.models import SUPPORTED, registry

ROOT = Path(__file__).parents[2]
HEAD = "| type | run by | drafts | prompt | steps | tree | after |\n|---|---|---|---|---|---|---|"


def row(kind: str) -> str:
    """A line of the table."""
    by = "decoder, adapter" if kind in SUPPORTED else "adapter"
    if reason := registry.DECLINED.get(kind):
        return f"| {kind} | - | declined: {reason} | | | | |"
    try:
        found = figures(TYPES[kind])
    except (KeyError, ModelError, SystemExit) as error:
        return f"| {kind} | {by} | not run here: {_why(error)} | | | | |"
    if max(found) >= LIMIT:
        raise SystemExit(f"{kind} differs by {max(found):.1e}")
    return f"| {kind} | {by} | trees | " + " | ".join(map(_figure, found)) + " |"


def _figure(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def _why(error: BaseException) -> str:
    if isinstance(error, ModelError):
        return str(error).partition("(")[2].partition(")")[0].replace("[metal_kernel] ", "")
    return "mlx_lm wants another package for it"


def main() -> None:
    rows = []
    for kind in registry.mlx_lm_types():
        rows.append(row(kind))
        print(rows[-1], file=sys.stderr, flush=True)
    trees = [line for line in rows if "| trees |" in line]
    equal = [line for line in trees if line.endswith("| 0 | 0 | 0 | 0 |")]
    total = (
        f"{len(rows)} types: {len(trees)} draft trees, of which {len(equal)} are equal to mlx_lm "
        f"to the last bit in all four; {len(rows) - len(trees)} declined or not run."
    )
    put(ROOT / "docs" / "models.md", "table", [total, "", HEAD, *rows])
    put(ROOT / "README.md", "types", summary(rows))


def summary(rows: list[str]) -> list[str]:
    """The lines of a table of who runs what."""
    by: dict[str, list[str]] = {"decoder": [], "adapter": [], "declined": [], "not run": []}
    for line in rows:
        how = next((w for w in ("declined", "not run") if f"| {w}" in line), None)
        by[how or ("decoder" if "| decoder" in line else "adapter")].append(line)
    names = {how: ", ".join(line.split()[1] for line in lines) for how, lines in by.items()}
    return [
        "| run by | types | drafts | beside mlx_lm's single steps |",
        "|---|---|---|---|",
        f"| our decoder | {', '.join(sorted(SUPPORTED))} | trees | {checked(by['decoder'])} |",
        f"| mlx_lm's own module | {len(by['adapter'])} more: {names['adapter']} | trees "
        f"| {checked(by['adapter'])} |",
        f"| - | {names['declined']} | declined, with the reason | |",
        f"| mlx_lm's own module | {names['not run']} | trees, not run here | |",
    ]


def checked(rows: list[str]) -> str:
    equal = sum(line.endswith("| 0 | 0 | 0 | 0 |") for line in rows)
    return f"{equal} equal to the last bit, {len(rows) - equal} within 1e-5"


def put(file: Path, mark: str, lines: list[str]) -> None:
    """Between the marks of a document."""
    begin, end = f"<!-- {mark} -->", "<!-- end -->"
    text, table = file.read_text(encoding="utf-8"), "\n".join([begin, *lines, end])
    new = re.sub(f"{begin}.*?{end}", lambda _: table, text, count=1, flags=re.DOTALL)
    file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
