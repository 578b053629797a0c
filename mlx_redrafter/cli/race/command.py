"""`mlx-redrafter race`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_redrafter.cli import question
from mlx_redrafter.cli.options import DecodeOptions, Json, ModelOptions
from mlx_redrafter.cli.question import Question, Raw
from mlx_redrafter.cli.race import contest
from mlx_redrafter.runtime.paths import expanded


def command(
    *,
    prompt: Question = None,
    source: ModelOptions,
    options: DecodeOptions,
    raw: Raw = False,
    save_svg: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Save a picture of the first one's finish."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Watch plain and drafted decoding side by side.

    Exit code 1 if the texts differ in float32.
    """
    text = question.asked(prompt)
    options.check(raw)
    contest.check(source, options, save_svg)
    model, tokenizer = source.load(options.tree())
    ids = question.read(model, tokenizer, text, options, raw)
    code = contest.run(
        model, tokenizer, ids, options, question=text, picture=save_svg, as_json=as_json
    )
    raise typer.Exit(code)
