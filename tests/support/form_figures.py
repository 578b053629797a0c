"""Steps and times of answers that follow a schema, for docs/decisions.md: run as a program."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from mlx_redrafter import load, stream_generate
from mlx_redrafter.decoding.answering import Answering
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.text.grammar import Standing
from mlx_redrafter.text.template import render
from mlx_redrafter.tree.shape import TreeShape

TEXT, NUMBER, FLAG = {"type": "string", "maxLength": 60}, {"type": "integer"}, {"type": "boolean"}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("Describe Paris.", {"city": TEXT, "country": TEXT, "population": NUMBER, "capital": FLAG}),
    ("Invent a person.", {"first_name": TEXT, "last_name": TEXT, "age": NUMBER, "job": TEXT}),
    ("Plan a dinner.", {"title": TEXT, "courses": {"type": "array", "items": TEXT, "maxItems": 4}}),
    ("Review a film.", {"film": TEXT, "rating": {"enum": [1, 2, 3, 4, 5]}, "summary": TEXT}),
    ("Describe a car.", {"maker": TEXT, "model": TEXT, "year": NUMBER, "electric": FLAG}),
    ("Name a river.", {"name": TEXT, "length_in_kilometres": NUMBER, "flows_into": TEXT}),
]


def schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


def main() -> None:
    model, tokenizer = load()
    spent: Counter[str] = Counter()

    def timed(owner: Any, name: str, clock: Callable[[], float]) -> None:
        real = getattr(owner, name)

        def run(*given: Any) -> Any:
            start = clock()
            try:
                return real(*given)
            finally:
                spent[name] += clock() - start  # type: ignore[assignment]
                spent[f"{name} calls"] += 1

        setattr(owner, name, run)

    # Processor time, as others may use the machine.
    timed(Standing, "take", time.thread_time)
    timed(Standing, "forced", time.thread_time)
    timed(Answering, "_choose_again", time.process_time)
    forced = Standing.forced

    def only_the_end(self: Standing, most: int) -> list[int]:
        found = forced(self, most)
        return found if self.end in found else []

    ways: dict[str, tuple[bool, Any, TreeShape]] = {
        "free, drafted": (False, forced, TreeShape(3, 4, 8)),
        "grammar, plain, nothing given": (True, only_the_end, TreeShape.plain()),
        "grammar, plain": (True, forced, TreeShape.plain()),
        "grammar, drafted, nothing given": (True, only_the_end, TreeShape(3, 4, 8)),
        "grammar, drafted": (True, forced, TreeShape(3, 4, 8)),
    }
    for way, (form, given, shape) in ways.items():
        Standing.forced = given  # type: ignore[method-assign]
        for asked in (ASKED[:1], ASKED):  # the first time graphs are made
            stats = DraftStats()
            spent.clear()
            begun = time.process_time()
            for question, properties in asked:
                prompt = render(
                    tokenizer, [{"role": "user", "content": f"{question} Answer in JSON."}]
                )
                for sampling in ({}, {"temp": 0.8, "seed": 3}):
                    options = {"json_schema": schema(properties)} if form else {}
                    answer = stream_generate(
                        model, tokenizer, prompt, 80, tree=shape, **options, **sampling
                    )  # type: ignore[arg-type]
                    stats.add(list(answer)[-1].stats)
        taken = time.process_time() - begun
        host = 1e6 * (spent["take"] + spent["forced"]) / stats.steps
        second = spent["_choose_again calls"]
        cost = 1e3 * spent["_choose_again"] / second if second else 0.0
        print(
            f"{way:32} {stats.tokens:5} tokens {stats.steps:5} steps "
            f"{stats.tokens_per_step:.2f} tokens/step, "
            f"{1e3 * taken / stats.steps:.1f} ms/step, grammar {host:.0f} us/step, "
            f"{second} second choices of {cost:.2f} ms"
        )


if __name__ == "__main__":
    main()
