"""The demo: its tasks, both ways, one table, and nothing but answers and table on stdout."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import ByteTokenizer, Oracle, plainly
from test_generate import model_of
from test_race import altered
from typer.testing import CliRunner

from mlx_redrafter.api import Model, stream_generate
from mlx_redrafter.cli import demo
from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli.options import DecodeOptions
from mlx_redrafter.cli.race import contest as race
from mlx_redrafter.cli.race.lanes import Piece, View
from mlx_redrafter.models import Decoder
from mlx_redrafter.tree.shape import TreeShape

LENGTH = 12


class Tokenizer(ByteTokenizer):
    has_chat_template, think_start, think_end = False, None, None


@pytest.fixture(scope="module")
def model(byte_target: Decoder) -> Model:
    """Knows how the answers to all tasks go on."""
    prompts = [ByteTokenizer().encode(text) for text in (*demo.TASKS.values(), "once")]
    texts = [ids + plainly(byte_target, ids, LENGTH) for ids in prompts]
    return model_of(byte_target, Oracle(byte_target, texts, (0, 0, 1, 0, 0, 9)))


@pytest.fixture
def invoke(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def command(*arguments: str, replaced: Any = stream_generate) -> Any:
        api = importlib.import_module("mlx_redrafter.api")
        monkeypatch.setattr(api, "load", lambda *_, **__: (model, Tokenizer()))
        monkeypatch.setattr(api, "stream_generate", replaced)
        return CliRunner().invoke(cli.app, ["demo", "--max-tokens", str(LENGTH), *arguments])

    return command


def test_every_task_is_answered_aloud_once_and_has_a_row(
    invoke: Callable[..., Any], model: Model
) -> None:
    result = invoke()
    assert result.exit_code == 0, result.stderr
    answers = [
        "".join(r.text for r in stream_generate(model, Tokenizer(), text, LENGTH, draft=False))
        for text in demo.TASKS.values()
    ]
    assert result.stdout.startswith("\n".join(answers) + "\n\n")
    table = result.stdout[len("\n".join(answers)) + 2 :].splitlines()
    assert table[1].split() == ["task", "tokens", *["tokens/s"] * 2, "times", "per", "step", "text"]
    rows = [line.split() for line in table[2:5]]
    assert [(row[0], row[1], row[6]) for row in rows] == [
        (task, str(LENGTH), "yes") for task in ("question", "code", "editing")
    ]
    assert all(float(row[5]) > 1.5 for row in rows)
    assert table[-1].startswith("With drafting: ")
    assert all(len(line) < 80 for line in table)
    # What is being done, the tasks and the conditions are not part of the result.
    said = " ".join(result.stderr.split())
    assert all(" ".join(text.split()) in said for text in demo.TASKS.values())
    assert "Warming up" in said and "dtype float32" in said


def test_a_question_of_ones_own(invoke: Callable[..., Any]) -> None:
    result = invoke("once")
    assert result.exit_code == 0, result.stderr
    assert "> once" in result.stderr and "question" not in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines() if " yes" in line] == ["yours"]


def test_other_tokens_are_not_hidden(invoke: Callable[..., Any]) -> None:
    result = invoke("once", replaced=altered)
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("yours ")]
    assert row.endswith("NO")
    assert "they part at token 5" in result.stdout


def test_without_drafting_there_is_nothing_to_show(invoke: Callable[..., Any]) -> None:
    result = invoke("--no-draft")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "leave out --no-draft" in result.stderr


def view(tokens: int, seconds: float) -> View:
    return View("way", tuple(Piece("x", 7, False) for _ in range(tokens)), tokens, seconds)


def test_the_verdict_is_over_all_tasks() -> None:
    short = demo.Result("a", view(10, 1.0), view(10, 0.5))
    long = demo.Result("b", view(90, 4.0), view(90, 2.0))
    assert demo.verdict([short, long], "float32") == [
        "With drafting: 2.00x the speed of plain decoding."
    ]
    slow = demo.Result("c", view(10, 1.0), view(10, 10.0))
    assert demo.verdict([short, slow], "float32")[0].endswith("here drafting does not pay.")
    assert slow.times == pytest.approx(0.1)


def test_every_shape_is_used_before_the_clocks_run(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TreeShape] = []

    def answer(contest: race.Contest, draft: bool, tree: TreeShape, **_: Any) -> Iterator[Any]:
        asked.append(tree)
        yield from stream_generate(model, Tokenizer(), "once", 2, draft=draft, tree=tree)

    monkeypatch.setattr(race.Contest, "answer", answer)
    race.Contest(model, Tokenizer(), "once", DecodeOptions()).warm_up()
    assert asked == list(model.budget.policy(sampled=False).shapes) and len(asked) > 1
