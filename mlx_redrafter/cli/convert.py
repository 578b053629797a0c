"""`mlx-redrafter convert`, also `python -m mlx_redrafter.convert`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_redrafter.cli.options import Json
from mlx_redrafter.convert import Summary
from mlx_redrafter.convert import convert as convert_checkpoint
from mlx_redrafter.convert.mapping import size_text
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.paths import expanded
from mlx_redrafter.terminal import console

if TYPE_CHECKING:
    from mlx_redrafter.convert.writer import Progress

BITS, GROUP_SIZE = 4, 64


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Folder, file or Hugging Face id of a model or drafter."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", callback=expanded, help="Folder to create.")],
    format: Annotated[
        str,
        typer.Option(
            help="Format of SRC: auto, apple, mlx, tensorrt-llm, modelopt, medusa, speculator, "
            "eagle, block, base or gguf."
        ),
    ] = "auto",
    to: Annotated[
        str, typer.Option(help="Format to write: mlx; for a ReDrafter also apple or tensorrt-llm.")
    ] = "mlx",
    target: Annotated[
        str | None, typer.Option(help="Model that the drafter is for, to check that they fit.")
    ] = None,
    self_check: Annotated[
        bool,
        typer.Option(
            help="With --target, also load it and count how often the drafter's first choice is "
            "its next token."
        ),
    ] = True,
    quantize: Annotated[
        bool,
        typer.Option(
            "--quantize",
            "-q",
            help="Quantise the weights. On a Mac with Metal, heads and speculators always "
            "are, unless --dtype or --q-bits 16 is given.",
        ),
    ] = False,
    q_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of a quantised weight: 4 or 8; 16 leaves a drafter as it is.",
            show_default=str(BITS),
        ),
    ] = None,
    q_group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale: 32, 64 or 128.", show_default=str(GROUP_SIZE)
        ),
    ] = None,
    keep_quantization: Annotated[
        bool,
        typer.Option(
            "--keep-quantization",
            help="Keep all blocks of a GGUF file packed, as they are where MLX has the same form.",
        ),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights: float16, bfloat16 or float32.", show_default="as stored"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what becomes of every tensor and write nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the folder of --out if it holds a model.")
    ] = False,
    upload_repo: Annotated[
        str | None,
        typer.Option(help="Upload the result to this Hugging Face repository, with a model card."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a drafter or a base model: PyTorch, TensorRT-LLM or GGUF to MLX, and back.

    The format of SRC is told from its tensor names and config.json.
    """
    if not quantize and (q_bits not in (None, 16) or q_group_size is not None):
        raise OptionError("--q-bits and --q-group-size say how to quantise; add -q")
    with _progress_bar() as progress:
        summary = convert_checkpoint(
            source,
            out,
            format=format,
            to=to,
            target=target,
            bits=(q_bits or BITS) if quantize else q_bits,
            group_size=q_group_size or GROUP_SIZE,
            dtype=dtype,
            keep_quantization=keep_quantization,
            self_check=self_check,
            dry_run=dry_run,
            force=force,
            upload_repo=upload_repo,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(_as_dict(summary)))
    else:
        _show(summary)


def _show(summary: Summary) -> None:
    kept = [row for row in summary.mapping if row.target]
    console.show(f"{summary.source}: {summary.format.label}, {len(kept)} tensors, to {summary.to}")
    if summary.out is None:
        rows = [(m.source, m.target or "-", _shape(m.shape), m.note) for m in summary.mapping]
        _table(("source", "target", "shape", "note"), rows)
    for note in summary.notes:
        console.show(f"note: {note}")
    if summary.out is not None:
        rows_of_files = [(f.name, size_text(f.size), f.sha256) for f in summary.files]
        _table(("file", "size", "SHA-256"), rows_of_files)
        console.show(f"wrote {summary.out}: {size_text(summary.size)}")
    if summary.url:
        console.show(f"uploaded to {summary.url}")


def _table(titles: tuple[str, ...], rows: list[Any]) -> None:
    """Columns as wide as they need on a pipe, as wide as there is room on a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles, box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False).print(table)


def _as_dict(summary: Summary) -> dict[str, Any]:
    return {
        "source": summary.source,
        "format": summary.format.value,
        "to": summary.to,
        "out": str(summary.out) if summary.out else None,
        "size": summary.size,
        "files": [file._asdict() for file in summary.files],
        "mapping": [row._asdict() for row in summary.mapping],
        "notes": summary.notes,
        "url": summary.url,
    }


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """Tensors done, on stderr; nothing if that is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
