"""`mlx-redrafter bench speed`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mlx_redrafter.cli.options import (
    DrafterName,
    Json,
    KVBits,
    KVGroupSize,
    ModelName,
    SparseConfig,
    SparseMinContext,
    SparseMode,
    SparseTau,
)
from mlx_redrafter.cli.options import (
    sparse_prefill as sparse_options,
)
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.paths import BUILTIN, expanded

COMPARED, INSTEAD = "What is compared", "Instead of timing"


def command(
    model: ModelName = BUILTIN,
    drafter: DrafterName = "auto",
    against: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=COMPARED,
            help="Another drafter to measure in the same turns: folder or Hugging Face id.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Type of the weights and of the arithmetic.", show_default="float32 on a CPU"
        ),
    ] = None,
    prompts: Annotated[
        str, typer.Option(help='dev, copy, or a jsonl file with "prompt" and "category".')
    ] = "dev",
    count: Annotated[
        int | None,
        typer.Option(
            help="Number of prompts in total, spread over the groups.", show_default="6; sweep 3"
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Length of every answer, in tokens.", show_default="48; sweep 32; divergence 32"
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="How many times every prompt is measured.", show_default="2; sweep 1"),
    ] = None,
    temp: Annotated[
        list[float] | None,
        typer.Option(help="Temperature; repeatable.", show_default="0 and 0.8; sweep 0"),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            rich_help_panel=COMPARED,
            help="Another tree to measure, besides the automatic one; repeatable: 3x4/8 (width x "
            "depth / nodes), 1x4 (a chain), lookup7, 3x4/8+lookup7.",
        ),
    ] = None,
    mlx_lm_draft: Annotated[
        str | None,
        typer.Option(rich_help_panel=COMPARED, help="Also measure mlx_lm with this draft model."),
    ] = None,
    draft_tokens: Annotated[
        int,
        typer.Option(
            rich_help_panel=COMPARED, help="Tokens that mlx_lm's draft model drafts in a step."
        ),
    ] = 3,
    perfect: Annotated[
        bool,
        typer.Option(
            rich_help_panel=COMPARED,
            help="Also measure a drafter that knows the answer (4, 8 and 16 nodes).",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the sampled answers.")] = 0,
    sparse_prefill: SparseMode = "off",
    sparse_prefill_config: SparseConfig = None,
    sparse_prefill_min_context: SparseMinContext = 32768,
    sparse_prefill_tau: SparseTau = 0.9,
    kv_bits: KVBits = None,
    kv_group_size: KVGroupSize = 64,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            rich_help_panel=INSTEAD,
            help="Time trees of many widths, depths and sizes instead.",
        ),
    ] = False,
    divergence: Annotated[
        bool,
        typer.Option(
            "--divergence",
            rich_help_panel=INSTEAD,
            help="Compare greedy drafted with greedy plain text instead.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            callback=expanded,
            help="Folder for bench.json and plots, updated after every turn.",
        ),
    ] = None,
    plot_only: Annotated[
        Path | None,
        typer.Option(
            callback=expanded,
            rich_help_panel=INSTEAD,
            help="Measure nothing: show the results in such a folder again.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time mlx_lm, plain and drafted decoding, in turns in one process.

    With no option: 6 prompts x 48 tokens x 2 rounds x 2 temperatures,
    3 ways to decode, and a drafter that knows the answer: 3 to 4 minutes for
    the built-in model on 2 idle cores. --sweep: 3 prompts x 32 tokens x 40
    trees.
    """
    from mlx_redrafter.bench.speed import run as measuring

    if plot_only is not None:
        measuring.show_again(plot_only, as_json)
        return
    if sweep and divergence:
        raise OptionError("--sweep and --divergence are two measurements: give one of them")
    options = measuring.BenchOptions(
        kind="sweep" if sweep else "divergence" if divergence else "speed",
        model=model, drafter=drafter, against=against, dtype=dtype, prompts=prompts, count=count,
        max_tokens=max_tokens, rounds=rounds, temps=tuple(temp or ()), shapes=tuple(shape or ()),
        mlx_lm_draft=mlx_lm_draft, draft_tokens=draft_tokens, perfect=perfect, seed=seed,
        output=output, as_json=as_json, sparse_prefill_config=sparse_prefill_config,
        kv_bits=kv_bits, kv_group_size=kv_group_size,
        sparse_prefill=sparse_options(
            sparse_prefill, sparse_prefill_config, sparse_prefill_min_context, sparse_prefill_tau
        ),
    )  # fmt: skip
    if not measuring.measure(options):
        raise typer.Exit(1)
