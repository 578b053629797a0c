"""A machine's report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown(report: Mapping[str, Any]) -> str:
    """What `mlx_redrafter.bench.machine.report.measured` found, to be pasted into an issue."""
    facts = report["machine"]
    lines = [
        f"### mlx-redrafter {facts['mlx_redrafter']} on {facts['chip']}",
        "",
        ", ".join(f"{name.replace('_', ' ')} {_short(fact)}" for name, fact in facts.items()),
        "",
        f"Model {report['model']['name']}, {report['model']['dtype']}, drafter "
        f"{report['model']['drafter'] or 'none'}",
        "",
        *_table(
            ("check", "", "found"),
            [(check["name"], check["mark"], check["detail"]) for check in report["checks"]],
        ),
    ]
    for name, found in report["parts"].items():
        lines += ["", f"#### {name}", ""]
        if isinstance(found, Mapping) and "error" in found:
            lines.append(f"failed: {found['error']}")
            continue
        shown = _PAGES.get(name.split(",")[0])
        lines += shown(found) if shown is not None else [_plain(found)]
    return "\n".join(lines) + "\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    body = [f"| {' | '.join(row)} |" for row in [list(titles), *cells]]
    return [body[0], "|" + "---|" * len(titles), *body[1:]]


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _plain(found: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _compiling(found: Any) -> list[str]:
    rows = [(name, each["first"], each["again"]) for name, each in found.items()]
    return _table(("4 tokens, seconds", "first", "again"), rows)


def _kernels(found: Any) -> list[str]:
    attention = [(shape, *by.values()) for shape, by in found["attention"].items()]
    chips = list(next(iter(found["products"].values())))
    products = [(size, *by.values()) for size, by in found["products"].items()]
    return [
        *_table(("heads / of keys x size", "queries", "a prompt"), attention),
        "",
        *_table(("4-bit product, rows", *chips), products),
    ]


def _answers(found: Any) -> list[str]:
    rows = [
        (
            row["group"],
            row["plain"]["tokens_per_second"],
            row["drafted"]["tokens_per_second"],
            f"{row['drafted']['tokens_per_second'] / row['plain']['tokens_per_second']:.2f}",
            row["drafted"]["stats"]["tokens_per_step"],
            "all" if row["parted_at"] is None else row["parted_at"],
            row["drafted"]["stats"].get("near_ties", "-"),
            row["plain"]["prompt_tokens_per_second"],
        )
        for row in found
    ]
    titles = (
        "prompt", "plain tokens/s", "drafted", "times", "tokens a step", "tokens the same",
        "near ties", "prompt tokens/s",
    )  # fmt: skip
    return _table(titles, rows)


def _passes(found: Any) -> list[str]:
    by_context = found["milliseconds"]
    sizes = list(next(iter(by_context.values())))
    rows = [(context, *by.values()) for context, by in by_context.items()]
    said = f"{found['layers']} of {found['of_layers']} layers, {found['dtype']}, milliseconds"
    return [said, "", *_table(("cached, tokens of a pass", *sizes), rows)]


_PAGES = {
    "compiling": _compiling, "kernels": _kernels, "answers": _answers, "passes": _passes,
}  # fmt: skip
