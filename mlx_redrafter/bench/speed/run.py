"""One measurement: run it, write what is known after every turn, show tables and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, load
from mlx_redrafter.bench.speed import divergence, document, plots, report, sweep, ways
from mlx_redrafter.bench.speed.compare import Comparison, Encoded
from mlx_redrafter.bench.speed.document import DIVERGENCE, SPEED, SWEEP, Document
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation.prompts import Prompt, prompt_file, read_prompts
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.runtime.checks import at_least
from mlx_redrafter.runtime.paths import BUILTIN
from mlx_redrafter.terminal import console, tables
from mlx_redrafter.tree.shape import TreeShape

# Prompts, tokens per answer and rounds where none are given: a few minutes on two cores.
_USUAL = {SPEED: (6, 48, 2), SWEEP: (3, 32, 1), DIVERGENCE: (6, 32, 1)}


@dataclass(frozen=True)
class BenchOptions:
    """What to measure; the command line says what each is. None: as usual for the kind."""

    kind: str = SPEED
    model: str = BUILTIN
    drafter: str = "auto"
    against: str | None = None
    dtype: str | None = None
    prompts: str = "dev"
    count: int | None = None
    max_tokens: int | None = None
    rounds: int | None = None
    temps: tuple[float, ...] = ()
    shapes: tuple[str, ...] = ()
    mlx_lm_draft: str | None = None
    draft_tokens: int = 3
    perfect: bool = True
    seed: int = 0
    output: Path | None = None
    as_json: bool = False
    sparse_prefill: SparsePrefill | None = None
    sparse_prefill_config: str | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64

    def numbers(self) -> tuple[int, int, int]:
        """Prompts, tokens and rounds.

        Raises:
            OptionError: one of them, or a temperature or the number of drafts, is not possible.
        """
        given = (self.count, self.max_tokens, self.rounds)
        count, tokens, rounds = (
            usual if value is None else value
            for value, usual in zip(given, _USUAL[self.kind], strict=True)
        )
        limits = {
            "--count": (count, 1),
            "--max-tokens": (tokens, 2),
            "--rounds": (rounds, 1),
            "--draft-tokens": (self.draft_tokens, 1),
        }
        for name, (value, least) in limits.items():
            at_least(least, **{name: value})
        return count, tokens, rounds


def measure(options: BenchOptions) -> bool:
    """Measure and report; False if a divergence is larger than rounding explains."""
    count, max_tokens, rounds = options.numbers()
    shapes = list(dict.fromkeys(ways.parse_shape(text) for text in options.shapes))
    temps = _temperatures(options)
    sparse = options.sparse_prefill
    if options.kind != SPEED and options.against is not None:
        raise OptionError("--against compares speeds: leave out --sweep and --divergence")
    if options.kind == DIVERGENCE and sparse is not None:
        raise OptionError(
            "--divergence judges each difference with a dense pass: leave out --sparse-prefill"
        )
    file = prompt_file(options.prompts)
    prompts = read_prompts(file, count)
    dtype = getattr(mx, options.dtype) if options.dtype is not None else None
    packed: dict[str, Any] = {}
    if options.kv_bits is not None:
        packed = {"kv_bits": options.kv_bits, "kv_group_size": options.kv_group_size}
    model, tokenizer = load(options.model, options.drafter, dtype=dtype, **packed)
    if model.drafter is None and (options.kind == SWEEP or any(s.depth for s in shapes)):
        raise OptionError(f"there is no drafter for {options.model}: give one with --drafter")
    facts = {"max_tokens": max_tokens, "rounds": rounds, "temps": temps, "seed": options.seed}
    facts |= {"mlx_lm_draft": options.mlx_lm_draft, "shapes": options.shapes}
    facts["against"] = Path(options.against).name if options.against is not None else None
    facts["sparse_prefill"] = _sparse_facts(options)
    facts |= packed
    encoded = encode(prompts, tokenizer)
    longest = max(len(ids) for _, ids in encoded)
    if sparse is not None and longest <= sparse.min_context:
        raise OptionError(
            f"the longest prompt has {longest} tokens, and {sparse.min_context} are read densely "
            "before --sparse-prefill begins: give longer --prompts, or a smaller "
            "--sparse-prefill-min-context"
        )
    if options.output is not None:
        _make(options.output)
    result = Document(options.kind, document.conditions(model, file, prompts, facts))
    with _reported(result, options):
        if options.kind == DIVERGENCE:
            _divergence(result, model, encoded, shapes, max_tokens, options)
        else:
            comparison = Comparison(
                model, [], max_tokens, rounds, temps, seed=options.seed, sparse=sparse
            )
            _compare(result, comparison, encoded, shapes, options)
        result.complete = True
    return not any(case["bug"] for case in result.cases)


def show_again(folder: Path, as_json: bool) -> None:
    """Tables and plots of what a run wrote, whole or stopped."""
    found = document.read(folder)
    _show(found, folder, as_json)


def _sparse_facts(options: BenchOptions) -> dict[str, Any] | None:
    """How long prompts are read, for whoever reads the figures; None: densely."""
    sparse, file = options.sparse_prefill, options.sparse_prefill_config
    if sparse is None:
        return None
    facts = {"mode": sparse.mode, "min_context": sparse.min_context, "tau": sparse.tau}
    return {**facts, "config": Path(file).name if file else None, "tag": sparse.tag}


def _temperatures(options: BenchOptions) -> tuple[float, ...]:
    if options.kind == DIVERGENCE and any(options.temps):
        raise OptionError("--divergence compares greedy answers: leave out --temp")
    if options.kind == SWEEP and len(options.temps) > 1:
        raise OptionError("--sweep is for one temperature: give --temp once")
    usual = (0.0, 0.8) if options.kind == SPEED else (0.0,)
    return tuple(dict.fromkeys(options.temps or usual))


def encode(prompts: list[Prompt], tokenizer: TokenizerWrapper) -> list[Encoded]:
    """Groups and token ids."""
    return [(prompt.group, prompt.encode(tokenizer)) for prompt in prompts]


def _compare(
    result: Document,
    comparison: Comparison,
    prompts: list[Encoded],
    shapes: list[TreeShape],
    options: BenchOptions,
) -> None:
    """Speed, or a sweep."""
    model, tokens, seed = comparison.model, comparison.max_tokens, comparison.seed
    sparse = comparison.sparse
    usual = ways.automatic(model, tokens, seed, sparse)
    turns = len(prompts) * len(comparison.temps) * comparison.rounds
    if options.kind == SWEEP:
        grid = shapes or sweep.grid()
        turns *= -(-len(grid) // sweep.BLOCK)
        source = sweep.turns(comparison, grid, usual, prompts)
    else:
        reference = ways.load_reference(model)
        comparison.others = [ways.mlx_lm(reference, tokens, seed)]
        if options.mlx_lm_draft is not None:
            draft = ways.load_draft(options.mlx_lm_draft, model)
            number = options.draft_tokens
            comparison.others.append(ways.mlx_lm_draft(reference, draft, number, tokens, seed))
        comparison.others += [
            usual,
            *(ways.ours(model, s, tokens, seed, sparse=sparse) for s in shapes),
        ]
        if options.against is not None:
            other = ways.with_drafter(model, options.against)
            comparison.others += ways.named_after(
                other,
                ways.automatic(other, tokens, seed, sparse),
                *(ways.ours(other, s, tokens, seed, sparse=sparse) for s in shapes if s.depth),
            )
        comparison.perfect = options.perfect
        source = comparison.turns(prompts)
    with tables.progress(turns) as step:
        for turn in source:
            result.add(turn)
            if options.output is not None:
                result.compute()
                result.save(options.output)
            step()


def _divergence(
    result: Document,
    model: Model,
    prompts: list[Encoded],
    shapes: list[TreeShape],
    tokens: int,
    options: BenchOptions,
) -> None:
    drafted = [ways.automatic(model, tokens, 0)]
    drafted += [ways.ours(model, shape, tokens, 0) for shape in shapes]
    compared = []
    with tables.progress(len(prompts) * len(drafted)) as step:
        for one in divergence.compare(model, prompts, drafted, tokens):
            compared.append(one)
            result.divergences(compared)
            if options.output is not None:
                result.save(options.output)
            step()


@contextmanager
def _reported(result: Document, options: BenchOptions) -> Iterator[None]:
    """Show what was measured at the end, and also when the user stops the run before it."""
    try:
        yield
    finally:
        if result.timings or result.summary:
            if result.timings:
                result.compute()
            if options.output is not None:
                result.save(options.output)
            _show(result, options.output, options.as_json)


def _show(result: Document, folder: Path | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.figures()))
    else:
        report.tables(result)
    if folder is not None:
        files = [folder / document.FILE, *plots.write_all(result, folder)]
        console.note(f"written: {', '.join(str(file) for file in files)}")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"{folder} cannot be made ({error.strerror}): give --output another folder"
        ) from None
