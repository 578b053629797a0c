"""The tables of a measurement on stdout, its conditions on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_redrafter.bench.prefill import controls
from mlx_redrafter.prefill.sparse import SELECTORS
from mlx_redrafter.terminal import console, tables
from mlx_redrafter.terminal.tables import table

Row = Mapping[str, Any]
# Of the conditions, what stands below the tables; the rest is in the file.
_SHOWN = (
    "model_name", "dtype", "chip", "device", "threads", "mlx", "blas", "text", "tokens_per_pass",
    "rounds", "load_average", "load_average_after",
)  # fmt: skip


def show(document: Mapping[str, Any]) -> None:
    """Everything that was measured."""
    if not document["complete"]:
        console.warn("incomplete: the run was stopped")
    if "layer" in document:
        layer(document["layer"])
    for row in document.get("lengths", []):
        if row["ways"]:
            times(row)
        if "quality" in row:
            methods(row)
            for one in row["quality"]:
                layers(row["length"], one)
            sweep(row)
    known = document["conditions"]
    console.note(console.facts(known, *_SHOWN))


def times(row: Row) -> None:
    """Dense and sparse prefills of one length."""
    filled = table(
        "", "seconds", "x dense", "expected", "density", "sparse", "passes", "recall", "p5"
    )
    filled.collapse_padding = True  # nine columns in 80 characters
    for way in row["ways"]:
        cells = [f"{way['seconds']:.2f}"]
        if "times_dense" in way:
            sparse = way["sparse_layers"]
            of = sparse + sum(way["declined"].values())
            cells += [
                f"{way['times_dense']:.2f}", f"{way['predicted_times_dense']:.2f}",
                f"{way['whole_density']:.0%}", f"{way['density']:.0%}" if sparse else "-",
                f"{sparse}/{of}", *_share(way, "recall", "recall_p5"),
            ]  # fmt: skip
        filled.add_row(way["way"], *cells)
    share = f"attention is {row['attention_share']:.0%} of a dense prefill"
    title = f"{row['length']} tokens, sparse from token {row['min_context']} on; {share}"
    tables.show(title, filled)
    for way in row["ways"]:
        if way.get("declined"):
            reasons = ", ".join(f"{why} {count}" for why, count in way["declined"].items())
            console.note(f"{way['way']}, dense layer passes: {reasons}")


def methods(row: Row) -> None:
    """Every mode over all its layers, beside the controls."""
    filled = table("", "recall", "p5", "error", "density", *controls.CONTROLS, "ahead")
    for one in row["quality"]:
        filled.add_row(one["method"], *_figures(one), *_controls(one), _ahead(one))
    tables.show(
        f"{row['length']} tokens: kept by the selection alone; then recall of as many random, "
        "nearest and best blocks; layers ahead of the first two",
        filled,
    )


def layers(length: int, method: Row) -> None:
    """One method by layer."""
    filled = table("layer", "recall", "p5", "error", "density", *controls.CONTROLS, "passes")
    for one in method["layers"]:
        passes = f"{one['sparse']}/{one['passes']}"
        filled.add_row(str(one["layer"]), *_figures(one), *_controls(one), passes)
    tables.show(f"{method['method']} at {length} tokens, by layer", filled)


def sweep(row: Row) -> None:
    """What other settings keep."""
    filled = table("", "recall", "p5", "error", "density", "passes that pay")
    for one in row["sweep"]:
        filled.add_row(one["method"], *_figures(one), f"{one['sparse']}/{one['passes']}")
    tables.show(f"{row['length']} tokens: other settings", filled)


def layer(found: Row) -> None:
    """One layer at a long prefix."""
    filled = table("", "ms", "low-high", "select", "density", "x pairs", "x own", "x fast")
    filled.collapse_padding = True
    for way in found["ways"]:
        sparse = way["way"].partition(",")[0] in SELECTORS
        filled.add_row(
            way["way"], f"{way['milliseconds']:.0f}", f"{way['lowest']:.0f}-{way['highest']:.0f}",
            f"{way['selection_milliseconds']:.0f}" if sparse else "", f"{way['density']:.1%}",
            f"{way['times_pairs']:.2f}", f"{way['times_own']:.2f}", f"{way['times_fused']:.2f}",
        )  # fmt: skip
    tables.show(
        f"Layer {found['layer']}: {found['queries']} queries behind {found['prefix']} tokens "
        f"({found['real_tokens']} real ones, repeated)",
        filled,
    )


def _figures(one: Row) -> Sequence[str]:
    return [*_share(one, "recall", "recall_p5"), f"{one['error']:.2f}", f"{one['density']:.0%}"]


def _share(one: Row, *names: str) -> Sequence[str]:
    return [f"{one[name]:.1%}" if name in one else "-" for name in names]


def _controls(one: Row) -> Sequence[str]:
    return [f"{one[name]['recall']:.1%}" if name in one else "-" for name in controls.CONTROLS]


def _ahead(one: Row) -> str:
    """In how many layers the method keeps more than random and than the nearest blocks."""
    rows = one["layers"]
    beaten = [
        row for row in rows
        if all(row["recall"] > row[name]["recall"] for name in (controls.RANDOM, controls.LOCAL))
    ]  # fmt: skip
    return f"{len(beaten)}/{len(rows)}"
