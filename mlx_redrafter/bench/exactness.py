"""Is the drafted text the text of plain decoding, and that the text of mlx_lm? Token by token.

    python -m mlx_redrafter.bench.exactness [--drafter DIR] [--prompts FILE] [--count 40] [--sampled 200]

Greedy: every prompt with mlx_lm, plain, and drafted with several tree shapes and with those that
the policy chooses. Sampled: plain against drafted, with mixed temperatures, filters and penalties.
Exit code 1 if a single token differs.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import typer
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model as load_mlx_lm

from mlx_redrafter.api import Model, load, stream_generate
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cli import net
from mlx_redrafter.errors import ModelError, OptionError, one_line
from mlx_redrafter.evaluation.acceptance import SHAPES
from mlx_redrafter.evaluation.prompts import DEV, Prompt, read_prompts
from mlx_redrafter.runtime import blas
from mlx_redrafter.runtime.checks import at_least
from mlx_redrafter.runtime.paths import BUILTIN, expanded
from mlx_redrafter.terminal import console


@dataclass
class Report:
    """Comparisons made and the differences found."""

    compared: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    differences: list[dict[str, Any]] = field(default_factory=list)

    def compare(self, what: str, prompt: Prompt, expected: list[int], given: list[int]) -> None:
        self.compared[what] += 1
        self.tokens[what] += len(expected)
        if expected == given:
            return
        pairs = itertools.zip_longest(expected, given)
        at = next(i for i, (a, b) in enumerate(pairs) if a != b)
        self.differences.append({"what": what, "prompt": prompt.text[:60], "first_at": at})


def sampling_options() -> Iterator[dict[str, Any]]:
    """An endless, fixed mixture of temperatures, filters, penalties and seeds."""
    filters: list[dict[str, Any]] = [
        {},
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"top_k": 20, "top_p": 0.95},
        {"top_p": 0.8, "min_p": 0.02, "top_k": 100},
    ]
    penalties: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.15},
        {"presence_penalty": 0.6, "frequency_penalty": 0.3, "frequency_context_size": 64},
        {},
        {"repetition_penalty": 1.3, "repetition_context_size": 50, "logit_bias": {198: -2.0}},
    ]
    temperatures = [0.3, 0.5, 0.7, 0.8, 1.0, 1.1, 1.2]
    for seed in itertools.count():
        yield {
            "temp": temperatures[seed % len(temperatures)],
            **filters[seed % len(filters)],
            **penalties[seed % len(penalties)],
            "seed": seed,
        }


def load_reference(folder: Path, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """mlx_lm's model in the type of ours, in whichever it is stored. Raises ModelError."""
    return in_mlx_lm(folder, dtype)[0]


def in_mlx_lm(folder: Path, dtype: mx.Dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A model as mlx_lm loads it, and its configuration. Raises ModelError."""
    try:
        model, config = load_mlx_lm(folder)
    except Exception as error:  # mlx_lm reads files that ours does without, and checks none
        raise ModelError(
            f"{folder} cannot be loaded by mlx_lm ({one_line(error)}): download it again"
        ) from error
    model.set_dtype(dtype)
    return model, config


def reference_tokens(
    model: nn.Module, tokenizer: TokenizerWrapper, ids: list[int], max_tokens: int
) -> list[int]:
    """mlx_lm's greedy answer, its end token included."""
    tokens = []
    for token, _ in generate_step(mx.array(ids), model, max_tokens=max_tokens):
        tokens.append(int(token))
        if tokens[-1] in tokenizer.eos_token_ids:
            break
    return tokens


def answer(
    model: Model, tokenizer: TokenizerWrapper, ids: list[int], max_tokens: int, **options: Any
) -> list[int]:
    return [r.token for r in stream_generate(model, tokenizer, ids, max_tokens, **options)]


def check_greedy(
    model: Model,
    reference: nn.Module,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int,
    report: Report,
) -> None:
    """mlx_lm = plain = drafted with every shape, and with those that the policy chooses."""
    ids, session = prompt.encode(tokenizer), Session()
    plain = answer(model, tokenizer, ids, max_tokens, draft=False, session=session)
    expected = reference_tokens(reference, tokenizer, ids, max_tokens)
    report.compare("greedy: plain against mlx_lm", prompt, expected, plain)
    for shape in SHAPES:
        drafted = answer(model, tokenizer, ids, max_tokens, tree=shape, session=session)
        report.compare(f"greedy: {shape} against plain", prompt, plain, drafted)
    drafted = answer(model, tokenizer, ids, max_tokens, session=session)
    report.compare("greedy: automatic against plain", prompt, plain, drafted)


def check_sampled(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    options: dict[str, Any],
    max_tokens: int,
    report: Report,
) -> None:
    """Same seed, same tokens: plain against one shape, or the policy, in turn."""
    shape = (*SHAPES, None)[options["seed"] % (len(SHAPES) + 1)]
    ids, session = prompt.encode(tokenizer), Session()
    plain = answer(model, tokenizer, ids, max_tokens, draft=False, session=session, **options)
    drafted = answer(model, tokenizer, ids, max_tokens, tree=shape, session=session, **options)
    report.compare(f"sampled: {shape or 'automatic'} against plain", prompt, plain, drafted)


def summary(model: Model, report: Report, seconds: float) -> dict[str, Any]:
    """The report with the conditions it was made under."""
    return {
        **vars(report),
        "model": model.name,
        "drafter": model.drafter_folder.name if model.drafter_folder else None,
        "dtype": "float32",
        "device": str(mx.default_device()),
        "blas": blas.used(),
        "mlx": version("mlx"),
        "seconds": round(seconds),
    }


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if part.isdecimal() and parts.isdecimal() and int(part) < int(parts):
        return int(part), int(parts)
    raise OptionError(f"shard {text!r} is not possible: use i/n, with i from 0 to n-1")


def main(
    model: str = BUILTIN,
    drafter: str = "auto",
    prompts: Annotated[Path, typer.Option(callback=expanded)] = DEV,
    count: int = 40,
    max_tokens: int = 128,
    sampled: int = 200,
    sampled_tokens: int = 48,
    shard: Annotated[str, typer.Option(help="Only part i of n of all runs: i/n.")] = "0/1",
    output: Annotated[
        Path | None, typer.Option("--json", callback=expanded, help="JSON file for the report.")
    ] = None,
) -> None:
    """Compare drafted, plain and mlx_lm decoding token by token."""
    at_least(1, count=count, max_tokens=max_tokens, sampled_tokens=sampled_tokens)
    at_least(0, sampled=sampled)
    part, parts = _shard(shard)
    blas.full_float32()
    start = time.perf_counter()
    loaded, tokenizer = load(model, drafter, dtype=mx.float32)
    reference = load_reference(loaded.folder)
    chosen = read_prompts(prompts, count)
    runs_each = -(-sampled // len(chosen))
    mixture = list(itertools.islice(sampling_options(), sampled))
    report = Report()
    for i, prompt in list(enumerate(chosen))[part::parts]:
        check_greedy(loaded, reference, tokenizer, prompt, max_tokens, report)
        for options in mixture[i * runs_each : (i + 1) * runs_each]:
            check_sampled(loaded, tokenizer, prompt, options, sampled_tokens, report)
        result = summary(loaded, report, time.perf_counter() - start)
        console.note(f"prompt {i + 1} of {len(chosen)}, {len(report.differences)} differences")
        if output is not None:  # after every prompt: a long run may be stopped
            output.write_text(json.dumps(result, indent=2) + "\n")
    for what, runs in report.compared.items():
        wrong = sum(d["what"] == what for d in report.differences)
        print(f"{what}: {runs - wrong} of {runs} identical, {report.tokens[what]} tokens")
    conditions = {k: v for k, v in result.items() if k not in vars(report)}
    print(console.facts(conditions))
    if report.differences:
        print(f"first difference: {report.differences[0]}")
        raise typer.Exit(1)


if __name__ == "__main__":
    net.run_module(main)
