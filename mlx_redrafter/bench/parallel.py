"""`mlx-redrafter bench parallel`: answers at once, plain and drafted, and one after the other."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, load, stream_generate
from mlx_redrafter.api.batching import BatchGenerator
from mlx_redrafter.bench import servers
from mlx_redrafter.bench.prefill import material
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation.prompts import read_prompts
from mlx_redrafter.terminal import tables

IN_TURN, PLAIN, DRAFTED = "one after the other, drafted", "together, plain", "together, drafted"
Prompts = Sequence[list[int]]
_FEW = 16  # tokens of a short answer


class Served(NamedTuple):
    """What came of some prompts: every answer's tokens, and the seconds that all took."""

    answers: list[list[int]]
    seconds: float


Way = Callable[[Prompts], Served]


def run(
    model: str,
    drafter: str,
    widths: Sequence[int],
    max_tokens: int,
    rounds: int,
    over_http: bool,
    beside: int,
    as_json: bool,
) -> None:
    """Measure in turns, and show medians.

    Raises:
        OptionError: no width, or one below 1; a prompt beside that is longer than the text there
            is, or than the model's context.
    """
    if not widths or min(widths) < 1:
        raise OptionError("--widths needs numbers of answers at once: give 1,2,4,8 for example")
    loaded, tokenizer = load(model, drafter)
    ways = _ways(loaded, tokenizer, max_tokens)
    known = read_prompts(count=max(widths))
    asked = [known[i % len(known)] for i in range(max(widths))]
    found = _measure(ways, [prompt.encode(tokenizer) for prompt in asked], widths, rounds)
    http: list[dict[str, Any]] = []
    if over_http:
        http = servers.measure(
            loaded, drafter, [prompt.text for prompt in asked], widths, max_tokens, rounds
        )
    short: dict[str, Any] = {}
    if beside:
        long = material.tokens(tokenizer, None, beside)
        short = _beside(loaded, tokenizer, asked[0].encode(tokenizer), long, rounds)
    facts = {"name": loaded.name, **loaded.budget.conditions()}
    if as_json:
        figures = {"max_tokens": max_tokens, "widths": found, "servers": http, "beside": short}
        print(json.dumps({**facts, **figures}))
        return
    tables.show("Answers at once", _table(found), facts)
    if http:
        tables.show("Over HTTP", _table(http))
    if short:
        filled = tables.table("a short request", "s to its first token", "tokens/s then")
        for name, (first, rate) in short.items():
            filled.add_row(name, f"{first:.2f}", f"{rate:.1f}")
        tables.show("Beside a long prompt", filled)


def _ways(model: Model, tokenizer: TokenizerWrapper, most: int) -> dict[str, Way]:
    def in_turn(prompts: Prompts) -> Served:
        start = time.perf_counter()
        answers = [
            [r.token for r in stream_generate(model, tokenizer, prompt, most, draft=True)]
            for prompt in prompts
        ]
        return Served(answers, time.perf_counter() - start)

    def together(draft: bool) -> Way:
        def way(prompts: Prompts) -> Served:
            start = time.perf_counter()
            answers: list[list[int]] = [[] for _ in prompts]
            with BatchGenerator(model, tokenizer) as batch:
                for prompt in prompts:
                    batch.insert(prompt, most, draft=draft)
                while len(batch):
                    for number, response in batch.next():
                        answers[number].append(response.token)
            return Served(answers, time.perf_counter() - start)

        return way

    return {IN_TURN: in_turn, PLAIN: together(False), DRAFTED: together(True)}


def _measure(
    ways: dict[str, Way], prompts: Prompts, widths: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    seconds = defaultdict[tuple[int, str], list[float]](list)
    tokens: dict[tuple[int, str], int] = {}
    wanted: dict[int, list[int]] = {}
    others: dict[tuple[int, str], int] = defaultdict(int)
    with tables.progress((rounds + 1) * len(widths) * len(ways)) as advance:
        for turn in range(rounds + 1):  # the first compiles what is run
            for width in widths:
                order = list(ways.items())
                for name, way in order if turn % 2 else reversed(order):
                    served = way(prompts[:width])
                    advance()
                    for i, answer in enumerate(served.answers):
                        others[width, name] += wanted.setdefault(i, answer) != answer
                    tokens[width, name] = sum(map(len, served.answers))
                    if turn:
                        seconds[width, name].append(served.seconds)
    return [
        servers.row(width, name, tokens[width, name], statistics.median(taken), others[width, name])
        for (width, name), taken in sorted(seconds.items(), key=lambda one: one[0][0])
    ]


def _beside(
    model: Model, tokenizer: TokenizerWrapper, short: list[int], long: list[int], rounds: int
) -> dict[str, tuple[float, float]]:
    """Of a short request, seconds to its first token and tokens per second from there on: alone,
    and while a long prompt is read. Medians."""
    found = defaultdict[str, list[tuple[float, float]]](list)
    for turn in range(rounds + 1):  # the first compiles what is run
        for name in ("alone", f"beside a prompt of {len(long)} tokens"):
            with BatchGenerator(model, tokenizer) as batch:
                if name != "alone":
                    batch.insert(long, 1)
                    batch.next()
                start, times = time.perf_counter(), list[float]()
                number = batch.insert(short, _FEW)
                while number in batch:
                    times += [time.perf_counter() for own, _ in batch.next() if own == number]
            if turn:
                rate = (len(times) - 1) / (times[-1] - times[0])
                found[name].append((times[0] - start, rate))
    return {
        name: (statistics.median(first), statistics.median(rate))
        for name, (first, rate) in ((n, zip(*every, strict=True)) for n, every in found.items())
    }


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    first = {one["at_once"]: one["tokens_per_second"] for one in reversed(rows)}
    filled = tables.table("at once", "way", "tokens/s", "each", "ratio", "other texts")
    for one in rows:
        rate = one["tokens_per_second"]
        ratio = f"{rate / first[one['at_once']]:.2f}"
        filled.add_row(
            str(one["at_once"]), one["way"], f"{rate:.1f}", f"{one['each']:.1f}", ratio,
            str(one["other_texts"]),
        )  # fmt: skip
    return filled
