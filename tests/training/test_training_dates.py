"""A chat template that prints the date: a training folder stays on the day it was begun."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import pytest  # isort: skip
import transformers.utils.chat_template_utils as templates
from tiny_chat import TEMPLATE, all_answers, begin, contents, write_chat_model

from mlx_redrafter.text.tokenizer import load_tokenizer
from mlx_redrafter.training import agreement, dates, folder, stages

# Words of the tiny model's vocabulary, chosen by the date, so that another day is another prompt.
DAY = "{{ ['ba', 'da', 'fa', 'ga', 'ka', 'be', 'de'][(strftime_now('%j') | int) % 7] }}"
DATED = f"<|im_start|> system {DAY} bo <|im_end|>{TEMPLATE}"
EVENING = datetime.datetime(2025, 3, 9, 23, 58, 7)


def clock(moment: datetime.datetime) -> Any:
    return SimpleNamespace(now=lambda tz=None: moment)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat"), DATED)


def on(monkeypatch: pytest.MonkeyPatch, moment: datetime.datetime) -> None:
    """It is so late, for templates and for the folder."""
    monkeypatch.setattr(templates, "datetime", clock(moment))
    monkeypatch.setattr(folder, "time", SimpleNamespace(time=moment.timestamp))


@pytest.mark.parametrize(
    "text",
    [
        "\n\n{{ strftime_now('%d %b %Y') }}\n{{ messages[0].content }}",
        "{% set f = '%A, %-d. %B %y at %H:%M:%S, %j, 100%%' %}{{ strftime_now(format=f) }}",
        "{% macro m() %}{{ strftime_now('%F') }}{% endmacro %}{{ m() }}",
        "{% if strftime_now is defined %}{{ strftime_now('%d') | int + 1 }}{% endif %}",
        "  {%- if true %}\n{{ messages[0].content }}{% endif %}",
    ],
)
def test_the_text_is_that_of_the_moment(
    model: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    tokenizer = load_tokenizer(model)
    messages = [{"role": "user", "content": "ba"}]
    monkeypatch.setattr(templates, "datetime", clock(EVENING))
    tokenizer.chat_template = text
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    monkeypatch.undo()
    dates.settle(tokenizer, datetime.datetime(1999, 1, 1))
    dates.settle(tokenizer, EVENING)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    tokenizer.chat_template = {"default": text, "other": "x"}
    dates.settle(tokenizer, EVENING)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected


def test_a_run_over_midnight_makes_what_it_would_have_made_before(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on(monkeypatch, EVENING)
    stages.answers(begin(tmp_path / "whole", model))
    stages.answers(begin(tmp_path / "run", model, answer_tokens=100))
    assert folder.began(tmp_path / "run") == EVENING
    on(monkeypatch, EVENING + datetime.timedelta(days=1))
    run = begin(tmp_path / "run", model)
    stages.answers(run)
    parts = ("prompts", "answers")
    assert contents(tmp_path / "run", *parts) == contents(tmp_path / "whole", *parts)
    stages.answers(begin(tmp_path / "later", model))  # another day is other text
    assert contents(tmp_path / "later", *parts) != contents(tmp_path / "whole", *parts)
    capsys.readouterr()
    agreement.warn(run.supply)
    assert "template" not in capsys.readouterr().err


def test_a_folder_of_an_earlier_version_is_as_old_as_its_first_answers(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    stages.answers(begin(out, model))
    file = out / folder.FILE
    file.write_text(re.sub("(?m)^began: .*\n", "", file.read_text()))
    written = datetime.datetime.fromtimestamp(int((out / "answers/00000.jsonl").stat().st_mtime))
    on(monkeypatch, written + datetime.timedelta(days=400))
    assert folder.began(out) == written
    begin(out, model, answer_tokens=999)  # the file is written anew
    (out / "answers/00000.jsonl").unlink()
    assert folder.began(out) == written


@pytest.mark.parametrize(
    ("template", "warned"),
    [(DATED, False), (DATED.replace("bo", "bu"), True), (TEMPLATE, True)],
)
def test_answers_of_another_day_are_in_the_same_template(
    tmp_path: Path,
    model: Path,
    template: str,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on(monkeypatch, EVENING)
    old = write_chat_model(tmp_path / "old", template)
    stages.answers(begin(tmp_path / "first", old))
    file = tmp_path / "old.jsonl"
    file.write_text(all_answers(tmp_path / "first"))
    on(monkeypatch, EVENING + datetime.timedelta(days=3))
    run = begin(tmp_path / "run", model, answers=file, answer_tokens=1)
    stages.prompts(run)
    capsys.readouterr()
    agreement.warn(run.supply)
    assert ("another chat template" in capsys.readouterr().err) is warned
