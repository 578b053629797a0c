"""`mlx-redrafter demo`: a few tasks, answered plainly and with drafting. One text, two speeds."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mlx_redrafter.cli.answer_writer import AnswerWriter
from mlx_redrafter.cli.options import DecodeOptions, ModelOptions
from mlx_redrafter.cli.race import contest
from mlx_redrafter.cli.race.lanes import View, views
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.checks import at_least, checked_text
from mlx_redrafter.terminal import console
from mlx_redrafter.terminal.tables import table
from mlx_redrafter.text.template import prompt_ids

TASKS = {
    "question": "Explain in a few sentences why the sky is blue during the day and red at sunset.",
    "code": "Write a Python function that counts the vowels in a string, and show how to use it.",
    "editing": """\
Fix the punctuation and capitalization of this text, and change nothing else:

The old lighthouse stands on a rock near the harbour. Every evening the keeper climbs the stairs \
and lights the lamp. It has guided ships for more than a hundred years. in winter the waves are so \
high that it seems to stand in the sea. when the fog comes in from the north the keeper rings a \
heavy bell until the morning.""",
}


HEADINGS = (
    "plain\ntokens/s", "drafted\ntokens/s", "\ntimes", "tokens\nper step", "same\ntext"
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One task, and both ways of answering it."""

    task: str
    plain: View
    drafted: View

    @property
    def times(self) -> float:
        return self.drafted.speed / self.plain.speed

    @property
    def parted(self) -> contest.Difference | None:
        return contest.difference(self.plain.pieces, self.drafted.pieces)


def command(
    *,
    prompt: Annotated[
        str | None, typer.Argument(help="A question of your own.", show_default=False)
    ] = None,
    source: ModelOptions,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
) -> None:
    """Compare text and speed with and without drafting, on three tasks or your question."""
    at_least(1, max_tokens=max_tokens)
    run(source, None if prompt is None else checked_text(prompt, "prompt"), max_tokens)


def run(source: ModelOptions, question: str | None, max_tokens: int) -> None:
    """Load, warm up, answer aloud and measure, task by task.

    Raises:
        OptionError: drafting is switched off; and the errors of loading.
    """
    if source.no_draft:
        raise OptionError("demo compares plain decoding with drafting: leave out --no-draft")
    options = DecodeOptions(max_tokens=max_tokens)
    options.check()
    started = time.perf_counter()
    console.note("Loading the model ...")
    model, tokenizer = source.load()
    tasks = {"yours": question} if question else TASKS
    contests = [
        contest.Contest(
            model, tokenizer, prompt_ids(tokenizer, [{"role": "user", "content": text}]), options
        )
        for text in tasks.values()
    ]
    console.note("Warming up: what is used for the first time here has to be compiled ...")
    contests[0].warm_up()
    console.note(f"Ready after {time.perf_counter() - started:.0f} s.")
    results = [
        _answer(name, text, one) for (name, text), one in zip(tasks.items(), contests, strict=True)
    ]
    _report(results, contest.conditions_of(model, options, None))


def _answer(name: str, text: str, one: contest.Contest) -> Result:
    """The answer aloud, then both ways on clocks: everything that they use is traced by then."""
    Console(stderr=True, highlight=False).print(Text(f"\n> {text}\n", "bold"))
    writer = AnswerWriter.after(one.tokenizer, one.prompt, terminal=sys.stdout.isatty())
    for response in one.answer(draft=True):
        writer.write(response.text)
    writer.close()
    console.write("\n")
    console.note("Measuring, plainly and with drafting in turns ...")
    for _ in one.answer(draft=False):
        pass
    return Result(name, *views(one.in_turns()))


def _report(results: Sequence[Result], conditions: Mapping[str, Any]) -> None:
    out = Console(highlight=False)
    rows = table("\ntask", "\ntokens", *HEADINGS)
    for result in results:
        rows.add_row(
            result.task,
            str(result.plain.tokens),
            f"{result.plain.speed:.1f}",
            f"{result.drafted.speed:.1f}",
            f"{result.times:.2f}",
            f"{result.drafted.tokens_per_step:.2f}",
            "yes" if result.parted is None else "NO",
        )
    out.print()
    out.print(rows)
    out.print()
    for line in verdict(results, conditions["dtype"]):
        console.show(line, out)
    console.note(console.facts(conditions))
    console.note('To watch both side by side: mlx-redrafter race "QUESTION"')


def verdict(results: Sequence[Result], dtype: str) -> list[str]:
    """What the measurement says, without flattery."""
    plain, drafted = (
        sum(len(view.pieces) for view in way) / sum(view.seconds for view in way)
        for way in ([r.plain for r in results], [r.drafted for r in results])
    )
    lines = [contest.compared(drafted / plain)]
    for result in results:
        if result.parted is not None:
            about = contest.verdict(result.plain, result.drafted, dtype, contest.is_exact(dtype))
            lines += [f"{result.task}:", *about[:-1]]
    return lines
