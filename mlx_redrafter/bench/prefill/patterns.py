"""`mlx-redrafter bench patterns`: which sparse pattern fits which head of a model, as a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mlx_redrafter.api import Model, load
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import conditions, figures
from mlx_redrafter.evaluation.prompts import long_text
from mlx_redrafter.models import DecoderConfig
from mlx_redrafter.prefill.config import HeadPattern, SparsePrefill, write_patterns
from mlx_redrafter.prefill.reading import USUAL, parts, read
from mlx_redrafter.prefill.search import CANDIDATES, Found, Search, split
from mlx_redrafter.prefill.selectors import Chunk, Selection
from mlx_redrafter.prefill.sparse import SparseAttention, check_able
from mlx_redrafter.terminal import console, tables

Results = Sequence[dict[int, Found]]
LATE = 0.75  # of the length: keys before a query of the second half, on average


def run(
    model: str, out: Path, text: Path | None, length: int, density: float, plot: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Search on a text, write the patterns, and show what was found.

    Raises:
        OptionError: a text that cannot be read or is too short, a length beyond the context, a
            file that cannot be written.
    """
    _check_files(out, plot)
    if not 0 < density < 1:
        raise OptionError(f"--density {density:g} is not possible: use a number between 0 and 1")
    source = long_text(text)
    loaded, tokenizer = load(model, None)
    config = loaded.target.config
    tokens = list(tokenizer.encode(source))
    check_length(length, density, len(tokens), config)
    passes = len(list(_sparse_parts(length))) * sum(not w for w in config.layer_windows)
    with tables.progress(passes) as step:
        results, alone = search(loaded, tokens[:length], density, step)
    patterns, scores = split(results)
    try:
        write_patterns(out, patterns, scores)
    except OSError as error:
        raise OptionError(f"{out} cannot be written ({error.strerror})") from None
    if plot is not None:
        draw(results, plot)
    facts = summary(results, alone)
    if as_json:
        held = conditions.of(loaded)
        print(json.dumps({**facts, "length": length, "density": density, **held}))
        return
    tables.show("Patterns that fit the heads", shown(facts))
    windows = sum(w > 0 for w in config.layer_windows)
    if windows:
        console.note(
            f"{windows} of {config.num_layers} layers have a sliding window and stay dense: their "
            "patterns are not used"
        )
    console.note(
        f"written: {out}; use it with --sparse-prefill minference --sparse-prefill-config {out}"
    )


def search(
    model: Model, tokens: Sequence[int], density: float, on_pass: Callable[[], None]
) -> tuple[Results, list[list[Found]]]:
    """The best pattern of every head; and for every head all that cost no more.

    The first half of the text is only read: short contexts are dense anyway.
    """
    target, config = model.target, model.target.config
    options = _options(len(tokens))
    searching = Search(config, options, density, LATE * len(tokens))

    def select(layer: int, chunk: Chunk) -> Selection:
        chosen = searching(layer, chunk)
        on_pass()
        return chosen

    session = Session().open(target.caches, capacity_for(len(tokens)), target.dtype)
    read(
        target,
        tokens,
        session,
        USUAL,
        sparse=SparseAttention(options, config, selector=select),
    )
    layers = [i for i, window in enumerate(config.layer_windows) if not window]
    heads = range(config.num_heads)
    return searching.results(), [searching.fitting(i, head) for i in layers for head in heads]


def _options(length: int) -> SparsePrefill:
    return SparsePrefill("minference", min_context=length // 2, dense_tail=0)


def _sparse_parts(length: int) -> list[Any]:
    every = parts(0, length, USUAL, _options(length))
    return [part for part in every if not part.dense]


def check_length(length: int, density: float, tokens: int, config: DecoderConfig) -> None:
    """Refuse what cannot be searched; raises OptionError."""
    check_able(config)
    options = SparsePrefill("minference")
    always = options.sink + options.local + options.block
    least = round(always / max(LATE * density, 1e-9))  # a number, at any density
    if length < least:
        raise OptionError(
            f"--length {length} is not possible: the {always} keys that are always kept are more "
            f"than {density:.0%} of the attention there; use {least} or more, or a higher --density"
        )
    if length > config.max_positions:
        raise OptionError(
            f"--length {length} is beyond the model's context of {config.max_positions} tokens: "
            f"use {config.max_positions} or less"
        )
    if tokens < length:
        raise OptionError(
            f"the text has {tokens} tokens and --length is {length}: give a longer --text"
        )


def _check_files(out: Path, plot: Path | None) -> None:
    writable = os.access(out if out.exists() else out.parent, os.W_OK)
    if not out.parent.is_dir() or out.is_dir() or not writable:
        raise OptionError(f"{out} cannot be written: give a file in a folder that you can write to")
    if plot is not None:
        figures.check(plot)


def name(pattern: HeadPattern) -> str:
    """A candidate in words."""
    if pattern.kind == "block_sparse":
        return f"block-sparse {pattern.vertical}"
    kind = "A-shape" if pattern.kind == "stream_llm" else "vertical-slash"
    return f"{kind} {pattern.vertical}/{pattern.slash}"


def summary(results: Results, alone: Sequence[Sequence[Found]]) -> dict[str, Any]:
    """Per candidate: heads it is the best of, and its means where it fits; those of the best."""
    best = [f for layer in results for f in layer.values() if f.candidate >= 0]
    rows = [
        {
            "candidate": name(candidate),
            "best_of": sum(f.candidate == i for f in best),
            **means([f for head in alone for f in head if f.candidate == i]),
        }
        for i, candidate in enumerate(CANDIDATES)
    ]
    return {"candidates": rows, "best": means(best)}


def means(found: Sequence[Found]) -> dict[str, float | int]:
    """Of recall, error and density over heads, and the worst 5 % of the recalls."""
    if not found:
        return {"heads": 0}
    recalls = sorted(f.recall for f in found)
    return {
        "heads": len(found),
        "recall": round(sum(recalls) / len(found), 4),
        "recall_p5": round(recalls[len(found) // 20], 4),
        "error": round(sum(f.error for f in found) / len(found), 4),
        "density": round(sum(f.density for f in found) / len(found), 4),
    }


def shown(facts: dict[str, Any]) -> Table:
    """A row per candidate, were it every head's; the last row is what was written."""
    table = tables.table(
        "candidate", "best of", "fits", "recall", "worst 5 %", "output error", "density"
    )
    for row in facts["candidates"]:
        table.add_row(row["candidate"], str(row["best_of"]), *_cells(row))
    table.add_row("the best of each head", "", *_cells(facts["best"]), style="bold")
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    figures = [
        f"{row[k]:.3f}" if k in row else "-" for k in ("recall", "recall_p5", "error", "density")
    ]
    return [str(row["heads"]), *figures]


def draw(results: Results, file: Path) -> None:
    """Layers by heads, coloured by the candidate that fits best; grey: a sliding window."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure = figures.new(7.5, 0.9 + 0.25 * max(len(layer) for layer in results))
    axes = figure.subplots()
    grid = [[layer[head].candidate for layer in results] for head in sorted(results[0])]
    colours = ("lightgrey", *figures.COLOURS)
    axes.imshow(grid, ListedColormap(colours), vmin=-1, vmax=len(CANDIDATES) - 1, aspect="auto")
    axes.set(xlabel="layer", ylabel="query head")
    present = sorted({candidate for row in grid for candidate in row})
    names = ["sliding window", *map(name, CANDIDATES)]
    marks = [Patch(color=colours[i + 1], label=names[i + 1]) for i in present]
    axes.legend(handles=marks, bbox_to_anchor=(1, 1), loc="upper left", frameon=False)
    figures.save(figure, file)
