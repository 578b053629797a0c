"""Answers on a terminal: lines break between words, and code keeps its own lines."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from mlx_redrafter.cli.answer_writer import AnswerWriter, WordWrap
from mlx_redrafter.terminal import console


def wrapped(text: str, width: int, cuts: int | None = None) -> str:
    """The text as it is shown when it comes in pieces."""
    wrap = WordWrap(lambda: width)
    rng, shown = random.Random(cuts), ""
    while text:
        size = len(text) if cuts is None else rng.randint(1, 5)
        shown += wrap.feed(text[:size])
        text = text[size:]
    return shown + wrap.flush()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two three four", "one two\nthree four"),
        ("one two\nthree  four", "one two\nthree\nfour"),
        ("0123456789 ab", "0123456789\nab"),
        ("ab 0123456789012 cd", "ab\n0123456789\n012 cd"),
        ("  indented words", "  indented\nwords"),
        ("```\na b c d e f g h\n```\na b c d e f", "```\na b c d e f g h\n```\na b c d e\nf"),
        ("日本語日本語日本", "日本語日本\n語日本"),
        ("a 日本語 word", "a 日本語\nword"),
        ("ends with a space ", "ends with\na space "),
        ("", ""),
    ],
)
def test_lines_break_between_words_however_the_text_comes_in(text: str, shown: str) -> None:
    for cuts in (None, 1, 2, 3):
        assert wrapped(text, 10, cuts) == shown


def test_a_wide_terminal_changes_nothing() -> None:
    text = "Some *text*,\twith tabs.\n\n- a list\n\n```py\nx = 1\n```\n  日本 and the end "
    assert wrapped(text, 80, 5) == text


def test_a_pipe_gets_every_byte_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    writer = AnswerWriter(("<think>", "</think>"), terminal=False)
    for piece in ("word " * 40, "<thi", "half"):
        writer.write(piece)
        assert capsys.readouterr().out == piece


def test_on_a_terminal_a_word_waits_for_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    writer = AnswerWriter(None, terminal=True)
    shown = []
    for piece in ("The sky", " is", " bl", "ue.", " Yes"):
        writer.write(piece)
        shown.append(capsys.readouterr().out)
    writer.close()
    assert [*shown, capsys.readouterr().out] == ["The", " sky", " is", "", "\nblue.", " Yes"]


def test_notes_wrap_between_words_on_a_terminal_and_stay_one_line_on_a_pipe() -> None:
    text = "error: [bold] :smile: " + "word " * 20 + "/a/long/path"
    for terminal in (True, False):
        out = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=40)
        console.show(text, out)
        lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert " ".join(line.rstrip() for line in lines) == text
        assert (len(lines) > 1) == terminal and (max(map(len, lines)) <= 40) == terminal


def test_the_second_column_of_a_note_stays_a_column() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=30)
    console.show(
        "last answer\n  steps     9 (passes of the model), 18\n\n  folder    /home/a-long-path/x",
        out,
    )
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.rstrip() for line in lines] == [
        "last answer", "  steps     9 (passes of the", "            model), 18", "",
        "  folder    /home/a-long-path/", "            x",
    ]  # fmt: skip


def test_thinking_is_dim_and_nothing_of_it_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = ["<th", "ink>hm", "</thi", "nk>", "4 < 5", " <t"]
    for terminal, opened, expected in [
        (True, False, "\x1b[2m<think>hm</think>\x1b[22m4 < 5 <t"),
        (False, False, "<think>hm</think>4 < 5 <t"),
    ]:
        writer = AnswerWriter(("<think>", "</think>"), thinking=opened, terminal=terminal)
        for piece in pieces:
            writer.write(piece)
        writer.close()
        assert capsys.readouterr().out == expected


def test_a_thought_that_the_prompt_opens_is_dim_from_its_first_token(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for terminal, expected in [(True, "\x1b[2mhm</think>\x1b[22mFour"), (False, "hm</think>Four")]:
        writer = AnswerWriter(("<think>", "</think>"), thinking=True, terminal=terminal)
        for piece in ["hm</thi", "nk>Four"]:
            writer.write(piece)
        writer.close()
        assert capsys.readouterr().out == expected
        assert writer.in_thought("hm") and not writer.in_thought("hm</think>Four")
