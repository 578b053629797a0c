"""What sparse prefill forgets: questions about long prompts, answered densely and sparsely.

Every case (`haystack.py`) is read densely and with each pattern, and answered greedily. Patterns
are made to work on prompts this short: sparse from --min-context on, and a layer is dense only
where nothing would be skipped. A case counts for a pattern where the dense answer is right.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.text import Text

from mlx_redrafter.api import Model, load, stream_generate
from mlx_redrafter.bench.prefill.haystack import TASKS, Case, make
from mlx_redrafter.cache.session import Session
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation import conditions
from mlx_redrafter.prefill.config import HeadPattern, SparsePrefill, read_patterns
from mlx_redrafter.runtime.checks import at_least
from mlx_redrafter.terminal import console, tables
from mlx_redrafter.text.template import render

ANSWER = 20  # tokens
ALL_KEYS = HeadPattern().slash  # below, minference's default sizes skip nothing


@dataclass(frozen=True)
class Answer:
    """What one way of reading led to; ``same`` of the first ``ANSWER`` tokens as densely."""

    text: str
    tokens: list[int]
    right: bool
    same: int
    density: float


@dataclass
class Outcome:
    """A case with its answers by way; a way that would be dense reading is left out."""

    case: Case
    tokens: int
    dense: Answer
    sparse: dict[str, Answer] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        case = {k: v for k, v in vars(self.case).items() if k != "text"}
        question = self.case.text.rpartition("\n")[2]
        sparse = {way: vars(answer) for way, answer in self.sparse.items()}
        return {
            **case, "question": question, "tokens": self.tokens, "dense": vars(self.dense),
            "sparse": sparse,
        }  # fmt: skip


def ways(min_context: int, patterns: Path | None) -> dict[str, SparsePrefill]:
    """The patterns compared; raises OptionError."""
    given: dict[str, Any] = {"min_context": min_context, "max_density": 0.99}
    found = {
        mode: SparsePrefill(mode, **given)  # type: ignore[arg-type]
        for mode in ("trianglemix", "xattention", "minference")
    }
    if patterns is not None:
        searched = read_patterns(patterns)
        found["searched"] = SparsePrefill("minference", patterns=searched, **given)
    return found


def answer_all(
    model: Model, tokenizer: TokenizerWrapper, case: Case, compared: dict[str, SparsePrefill]
) -> Outcome:
    """Densely first. What is before the least context is dense in every way and read once."""
    prompt = render(tokenizer, [{"role": "user", "content": case.text}])
    prompt += tokenizer.encode(case.opening, add_special_tokens=False)
    session = Session()
    outcome = Outcome(case, len(prompt), answer(model, tokenizer, case, prompt, session))
    for way, options in compared.items():
        if way == "minference" and len(prompt) <= ALL_KEYS:
            continue
        session.trim(options.min_context)
        outcome.sparse[way] = answer(
            model, tokenizer, case, prompt, session, options, outcome.dense.tokens
        )
    return outcome


def answer(
    model: Model,
    tokenizer: TokenizerWrapper,
    case: Case,
    prompt: Sequence[int],
    session: Session,
    options: SparsePrefill | None = None,
    expected: Sequence[int] | None = None,
) -> Answer:
    """One greedy answer; ``expected`` are the tokens of the dense one."""
    responses = list(
        stream_generate(
            model, tokenizer, prompt, ANSWER, draft=False, session=session, sparse_prefill=options
        )
    )
    text, tokens = "".join(r.text for r in responses), [r.token for r in responses]
    stats = responses[-1].stats.sparse_prefill
    pairs = zip(tokens, tokens if expected is None else expected, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(tokens))
    density = stats.whole_density if stats is not None else 1.0
    return Answer(text, tokens, case.right(text), same, round(density, 4))


def summary(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Per task and length, and over all: cases, right densely, and of these right by way."""
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for o in outcomes:
        groups.setdefault((o.case.task, o.case.length), []).append(o)
        groups.setdefault(("all", 0), []).append(o)
    groups[("all", 0)] = groups.pop(("all", 0))
    return [
        {
            "task": task,
            "length": length,
            "cases": len(members),
            "dense_right": sum(o.dense.right for o in members),
            "ways": {way: _of_way(members, way) for way in _ways(members)},
        }
        for (task, length), members in groups.items()
    ]


def _ways(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(way for o in outcomes for way in o.sparse))


def _of_way(outcomes: Sequence[Outcome], way: str) -> dict[str, Any]:
    both = [(o.dense, o.sparse[way]) for o in outcomes if way in o.sparse]
    return {
        "cases": len(both),
        "judged": sum(dense.right for dense, _ in both),
        "right": sum(dense.right and sparse.right for dense, sparse in both),
        "right_only_sparsely": sum(sparse.right and not dense.right for dense, sparse in both),
        "identical": sum(dense.tokens == sparse.tokens for dense, sparse in both),
        "density": round(statistics.mean(sparse.density for _, sparse in both), 4),
    }


def show(outcomes: Sequence[Outcome]) -> None:
    """Every case with its answers, then the summary."""
    names = _ways(outcomes)
    for o in outcomes:
        heading = f"{o.case.name} ({o.tokens} tokens): {', '.join(o.case.expected)}"
        console.show(Text(heading, style="bold"))
        for way, given in {"dense": o.dense, **o.sparse}.items():
            mark = "right" if given.right else "WRONG"
            same = "as densely" if given.tokens == o.dense.tokens else f"{given.same} tokens alike"
            facts = "" if way == "dense" else f", {same}, density {given.density:.2f}"
            console.show(f"  {way:<12}{mark}{facts}: {given.text.strip()!r}")
    table = tables.table("task", "length", "cases", "right densely", *names, "identical answers")
    for row in summary(outcomes):
        found = row["ways"]
        judged = [
            f"{found[w]['right']} of {found[w]['judged']}" if w in found else "-" for w in names
        ]
        alike = ", ".join(str(found[w]["identical"]) if w in found else "-" for w in names)
        first = (row["task"], str(row["length"] or ""), str(row["cases"]), str(row["dense_right"]))
        table.add_row(*first, *judged, alike)
    tables.show("\nRight answers, of those that are right densely", table)


def cases(
    tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], seeds: int,
    count: Callable[[str], int],
) -> Iterator[Case]:  # fmt: skip
    """All combinations; raises OptionError for an unknown task."""
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise OptionError(f"there is no task {unknown[0]!r}: use {', '.join(TASKS)}")
    for length in lengths:
        for task in tasks:
            for depth in depths:
                for seed in range(seeds):
                    yield make(task, length, depth, seed, count)


def numbers(text: str, what: str, most: float = 2**31) -> list[float]:
    """Numbers from 0 to ``most`` with spaces or commas between; raises OptionError."""
    try:
        found = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise OptionError(f"--{what} {text!r} is not possible: give numbers") from None
    if not found or not all(0 <= number <= most for number in found):
        raise OptionError(f"--{what} {text!r} is not possible: use numbers from 0 to {most}")
    return found


def run(
    model: str,
    lengths: str,
    depths: str,
    tasks: str | None,
    seeds: int,
    min_context: int,
    patterns: Path | None,
    output: Path | None,
) -> None:
    """Answer questions about long prompts densely and with every sparse prefill, and show it."""
    at_least(1, seeds=seeds, min_context=min_context)
    compared = ways(min_context, patterns)
    chosen = [task.strip() for task in tasks.split(",")] if tasks else list(TASKS)
    loaded, tokenizer = load(model, None)

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    sizes = [int(n) for n in numbers(lengths, "lengths")]
    places = numbers(depths, "depths", most=1)
    asked = list(cases(chosen, sizes, places, seeds, count))
    outcomes: list[Outcome] = []
    facts = {**conditions.of(loaded), "min_context": min_context}
    with tables.progress(len(asked)) as step:
        for case in asked:
            outcomes.append(answer_all(loaded, tokenizer, case, compared))
            step()
            if output is not None:  # after every case: a long run may be stopped
                write(output, outcomes, facts)
    show(outcomes)
    console.note(", ".join(f"{name} {value}" for name, value in facts.items()))


def write(file: Path, outcomes: Sequence[Outcome], facts: dict[str, Any]) -> None:
    """All cases, the summary and the conditions; raises OptionError."""
    found = {"cases": [o.as_dict() for o in outcomes], "summary": summary(outcomes), **facts}
    try:
        file.write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise OptionError(f"{file} cannot be written ({error.strerror})") from None
