"""Needle tests: cases by seed, a checker that can fail, and the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_chat import write_chat_model

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)
from mlx_redrafter.bench.prefill import needles
from mlx_redrafter.bench.prefill.haystack import TASKS, Case, make
from mlx_redrafter.bench.prefill.needles import Answer, Outcome
from mlx_redrafter.errors import OptionError


def words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", TASKS)
def test_cases_are_made_by_seed(task: str) -> None:
    one, again, other = (make(task, 900, 0.5, seed, words) for seed in (0, 0, 1))
    assert one == again
    assert one.text != other.text
    assert 700 < words(one.text) <= 900
    assert one.text.rpartition("\n")[2].endswith("?")


def test_a_case_does_not_change_between_versions() -> None:
    """Spelled out: figures in the documents are of these very texts."""
    case = make("single", 512, 0.5, 0, words)
    assert case.expected == ("9981",)
    assert case.opening == "The magic number for London is"
    assert (
        case.text.splitlines()[2][:60]
        == "The gardener walked to the village in the evening. The garde"
    )


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task", ["single", "multi-key", "multi-value", "tracking"])
def test_the_needle_is_at_its_depth_and_can_be_found(task: str, depth: float) -> None:
    case = make(task, 2000, depth, 3, words)
    at = case.text.index(case.expected[0]) / len(case.text)
    assert at == pytest.approx(depth, abs=0.05)
    assert all(case.text.count(word) == 1 for word in case.expected)


def test_several_needles_are_what_they_are_called() -> None:
    many = make("multi-key", 1500, 0.5, 0, words)
    assert many.text.count("magic number for") == 5 + 1  # and the question
    both = make("multi-value", 1500, 0.5, 0, words)
    assert len(set(both.expected)) == 2
    chain = make("tracking", 1500, 0.2, 0, words).text
    first, second = chain.index("has the ticket"), chain.index("has the same ticket as")
    assert first < second < chain.rindex("has the same ticket as")


def test_common_words_are_the_most_frequent() -> None:
    case = make("common words", 1500, 0.0, 0, words)
    listed = case.text.split("\n")[2].split()
    counts = sorted(set(listed), key=listed.count)
    assert set(counts[-2:]) == set(case.expected)
    assert listed.count(counts[-2]) > 2 * listed.count(counts[-3])


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 1234.", True),
        ("It is 1234, and 5678", True),
        ("5678", False),
        (" 12345.", False),
        (" 123 4", False),
        ("", False),
    ],
)
def test_the_checker_can_fail(answer: str, right: bool) -> None:
    assert Case("single", 0, 0, 0, "", "", ("1234",)).right(answer) == right


def test_all_that_is_asked_for_has_to_be_there() -> None:
    case = Case("multi-value", 0, 0, 0, "", "", ("1234", "Apple"))
    assert case.right("apple and 1234")
    assert not case.right("1234 and 1234")


def outcome(dense: bool, sparse: bool, tokens: list[int]) -> Outcome:
    case = make("single", 512, 0.5, 0, words)
    found = Outcome(case, 512, Answer("", [1, 2, 3], dense, 3, 1.0))
    found.sparse["trianglemix"] = Answer("", tokens, sparse, 1, 0.5)
    return found


def test_a_pattern_is_judged_on_what_is_right_densely() -> None:
    outcomes = [
        outcome(True, True, [1, 2, 3]),
        outcome(True, False, [1, 5]),
        outcome(False, True, [1, 6]),
    ]
    every, group = needles.summary(outcomes)[::-1]
    assert (every["task"], group["task"]) == ("all", "single")
    assert every["ways"] == group["ways"]
    assert group["dense_right"] == 2
    assert group["ways"]["trianglemix"] == {
        "cases": 3, "judged": 2, "right": 1, "right_only_sparsely": 1, "identical": 1,
        "density": 0.5,
    }  # fmt: skip


def test_what_cannot_be_asked() -> None:
    with pytest.raises(OptionError, match="there is no task 'none': use single, multi-key"):
        list(needles.cases(["none"], [512], [0.5], 1, words))
    with pytest.raises(OptionError, match="a length of 64 tokens is not possible"):
        make("single", 64, 0.5, 0, words)
    with pytest.raises(OptionError, match="--depths 'half' is not possible: give numbers"):
        needles.numbers("half", "depths")
    for text in ("nan", "1.5", "-0.1", ","):
        with pytest.raises(OptionError, match=f"--depths '{text}' is not possible: use numbers"):
            needles.numbers(text, "depths", most=1)
    assert needles.numbers("0, 0.5 1", "depths", most=1) == [0, 0.5, 1]


def test_the_command_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights answer nothing right; the cases are run, listed and counted all the same."""
    folder = write_chat_model(tmp_path / "model")
    output = tmp_path / "needles.json"
    needles.run(
        str(folder), lengths="1500", depths="0.5", tasks="single, tracking", seeds=1,
        min_context=256, patterns=None, output=output,
    )  # fmt: skip
    found = json.loads(output.read_text())
    assert [case["task"] for case in found["cases"]] == ["single", "tracking"]
    for case in found["cases"]:
        # Below 6096 tokens minference's default sizes leave nothing out.
        assert list(case["sparse"]) == ["trianglemix", "xattention"]
        assert case["sparse"]["trianglemix"]["density"] < 1
        assert len(case["dense"]["tokens"]) <= needles.ANSWER
    assert found["summary"][-1]["cases"] == 2
    out = capsys.readouterr().out
    assert "single 1500 at 50%, seed 0" in out
    assert "Right answers, of those that are right densely" in out
