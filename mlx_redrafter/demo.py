"""One question answered with and without drafting: the same text, and both speeds as measured."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from mlx_redrafter import console
from mlx_redrafter.chat_template import prompt_ids
from mlx_redrafter.info import device, machine
from mlx_redrafter.options import ModelOptions

QUESTION = "Explain in a few sentences why the sky is blue during the day and red at sunset."
ROUNDS = 3
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Run:
    """One timed answer; `speed` in tokens per second after the prompt was read."""

    tokens: tuple[int, ...]
    speed: float
    tokens_per_step: float


def run(source: ModelOptions, question: str | None, max_tokens: int) -> None:
    """Load, warm up, measure in turns, print; raises the errors of loading."""
    started = time.perf_counter()
    console.note("Loading the model ...")
    model, tokenizer = source.load()
    question = question or QUESTION
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": question}])
    kinds = {"plain decoding": False}
    if model.drafting:
        kinds["with drafting"] = True
    console.note("Warming up: the first pass compiles the kernels ...")
    for draft in kinds.values():
        stream = _stream(model, tokenizer, prompt, max_tokens, draft)
        for _ in itertools.islice(stream, WARM_UP_TOKENS):
            pass
        stream.close()
    console.note(f"Ready after {time.perf_counter() - started:.0f} s.\n")
    console.write(f"> {question}\n\n")
    runs: dict[str, list[Run]] = {name: [] for name in kinds}
    for round_ in range(ROUNDS):
        # The first answer that is shown is a drafted one, where there is a drafter.
        for name, draft in sorted(kinds.items(), key=lambda kind: not kind[1]):
            aloud = round_ == 0 and draft == model.drafting
            runs[name].append(_timed(model, tokenizer, prompt, max_tokens, draft, aloud))
            if aloud:
                console.write("\n\n")
                console.note(f"Measuring: {ROUNDS} answers each way, in turns ...")
    _report(model, runs)


def _stream(model: Any, tokenizer: Any, prompt: list[int], max_tokens: int, draft: bool) -> Any:
    from mlx_redrafter.api import stream_generate

    return stream_generate(model, tokenizer, prompt, max_tokens=max_tokens, draft=draft)


def _timed(
    model: Any, tokenizer: Any, prompt: list[int], max_tokens: int, draft: bool, aloud: bool
) -> Run:
    tokens = []
    last = None
    for last in _stream(model, tokenizer, prompt, max_tokens, draft):
        tokens.append(last.token)
        if aloud:
            console.write(last.text)
    assert last is not None, "a generation yields at least one response"
    return Run(tuple(tokens), last.generation_tps, last.stats.tokens_per_step)


def _report(model: Any, runs: dict[str, list[Run]]) -> None:
    out = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for title in ("tokens/s", "lowest-highest", "tokens per step"):
        table.add_column(title, justify="right")
    for name, measured in runs.items():
        speeds = [r.speed for r in measured]
        table.add_row(
            name,
            f"{statistics.median(speeds):.1f}",
            f"{min(speeds):.1f}-{max(speeds):.1f}",
            f"{measured[0].tokens_per_step:.2f}",
        )
    out.print(table)
    out.print()
    for line in verdict(runs):
        console.show(line, out)
    facts = machine()
    console.note(
        f"{model.name} in {_dtype(model)} on {facts['chip']} "
        f"({device()}), MLX {facts['mlx']}, BLAS {facts['blas']}; greedy, "
        f"{len(next(iter(runs.values()))[0].tokens)} tokens, median of {ROUNDS} answers each way."
    )


def verdict(runs: dict[str, list[Run]]) -> list[str]:
    """What the measurement says, without flattery."""
    if len(runs) == 1:
        return ["There is no drafter for this model: only plain decoding was measured."]
    plain, drafted = runs.values()
    texts = {r.tokens for r in (*plain, *drafted)}
    ratio = statistics.median(r.speed for r in drafted) / statistics.median(r.speed for r in plain)
    word = f"{ratio:.2f}x the speed of plain decoding"
    if ratio < 1:
        word += ": here drafting does not pay"
    if len(texts) == 1:
        same = f"yes, all {len(plain[0].tokens)} tokens in every run"
    else:
        agree = next(
            i
            for i, pair in enumerate(
                itertools.zip_longest(
                    plain[0].tokens, next(t for t in texts if t != plain[0].tokens)
                )
            )
            if len(set(pair)) > 1
        )
        same = f"NO, they part at token {agree + 1}: please run `mlx-redrafter doctor`"
    return [f"With drafting: {word}.", f"Same text: {same}."]


def _dtype(model: Any) -> str:
    return str(model.target.dtype).removeprefix("mlx.core.")
