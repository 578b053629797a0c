"""The options of sparse prefill and MInference's pattern files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_redrafter.errors import OptionError
from mlx_redrafter.prefill.config import (
    HeadPattern,
    SparsePrefill,
    read_patterns,
    write_patterns,
)

# As published: numbers of heads are strings, the score is a share or a count.
PUBLISHED = [
    {"0": ["vertical_and_slash", 3500, 100, 0.93], "1": ["stream_llm", 100, 800, 4153]},
    {"1": ["block_sparse", 100, 1, 0.5], "0": ["vertical_and_slash", 30, 800, 1.0]},
]


def write(folder: Path, content: Any) -> Path:
    file = folder / "patterns.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_published_file_is_read_and_written(tmp_path: Path) -> None:
    patterns = read_patterns(write(tmp_path, PUBLISHED), layers=2, heads=2)
    assert patterns == (
        {0: HeadPattern(vertical=3500, slash=100), 1: HeadPattern("stream_llm", 100, 800)},
        {0: HeadPattern(vertical=30, slash=800), 1: HeadPattern("block_sparse", 100, 1)},
    )
    again = tmp_path / "again.json"
    write_patterns(again, patterns, [{0: 0.93, 1: 4153}, {0: 1.0, 1: 0.5}])
    assert json.loads(again.read_text()) == PUBLISHED
    write_patterns(again, patterns)
    assert read_patterns(again, 2, 2) == patterns


def test_a_missing_head_has_the_default(tmp_path: Path) -> None:
    patterns = read_patterns(write(tmp_path, [PUBLISHED[0], {}]), layers=2, heads=4)
    options = SparsePrefill("minference", patterns=patterns)
    assert options.head_patterns(0, 3)[2] == HeadPattern("vertical_and_slash", 1000, 6096)
    assert options.head_patterns(1, 2) == [HeadPattern(), HeadPattern()]
    assert SparsePrefill("minference").head_patterns(5, 1) == [HeadPattern()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({"0": []}, "is not a pattern file; needed: a list over layers"),
        ([[]], "is not a pattern file; needed: a list over layers"),
        ([{"x": ["stream_llm", 1, 1, 1]}, {}], "has a head named 'x'; needed: a number"),
        (
            [{"0": ["dilated1", 1, 1, 1]}, {}],
            'layer 0, head 0: ["dilated1", 1, 1, 1] is not possib',
        ),
        ([{}, {"0": ["stream_llm", 1.5, 1, 1]}], "layer 1, head 0:"),
        ([{}, {"0": ["stream_llm", 1]}], "layer 1, head 0:"),
        ([{}, {"0": ["stream_llm", -1, 1, 1]}], "layer 1, head 0:"),
        ([{}, {"0": "stream_llm"}], "layer 1, head 0:"),
        ([{}], "has 1 layers and the model 2: use the file of this model"),
        (
            [{}, {"2": ["stream_llm", 1, 1, 1]}],
            "names head 2, and the model has only 2 query heads",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_line(
    tmp_path: Path, content: Any, message: str
) -> None:
    with pytest.raises(OptionError) as raised:
        read_patterns(write(tmp_path, content), layers=2, heads=2)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_patterns(tmp_path / "none.json", 2, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "sparse"}, "mode 'sparse' is not possible: use off, a_shape"),
        ({"mode": None}, "mode None is not possible: use off, a_shape"),
        ({"mode": []}, "mode [] is not possible: use off, a_shape"),
        ({"tau": "much"}, "tau 'much' is not possible: use a number above 0 and at most 1"),
        ({"sink": "x"}, "sink 'x' is not possible: use 0 or more"),
        ({"tau": 0.0}, "tau 0.0 is not possible"),
        ({"tau": float("nan")}, "tau nan is not possible"),
        ({"block": 96}, "block 96 is not possible: use a divisor of 128"),
        ({"stride": 24}, "stride 24 is not possible: use a divisor of the block, 128"),
        ({"min_context": -1}, "min_context -1 is not possible: use 0 or more"),
        ({"dense_tail": -1}, "dense_tail -1"),
        ({"sink": -1}, "sink -1"),
        ({"local": -1}, "local -1"),
        ({"start_layer": -1}, "start_layer -1"),
        ({"max_density": 0}, "max_density 0"),
        ({"over": "more"}, "over 'more' is not possible: use dense or cap"),
        ({"last_queries": 0}, "last_queries 0"),
        ({"mode": "xattention", "patterns": ()}, "patterns are for mode minference"),
    ],
)
def test_impossible_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        SparsePrefill(**given)
    assert str(raised.value).startswith("sparse prefill: ")
    assert message in str(raised.value)


def test_the_tag_tells_configurations_apart(tmp_path: Path) -> None:
    patterns = read_patterns(write(tmp_path, PUBLISHED))
    same = [SparsePrefill("xattention"), SparsePrefill("xattention", tau=0.9)]
    others = [
        SparsePrefill("xattention", tau=0.8),
        SparsePrefill("trianglemix"),
        SparsePrefill("xattention", min_context=4096),
        SparsePrefill("minference"),
        SparsePrefill("minference", patterns=patterns),
        SparsePrefill("minference", patterns=(patterns[0], {})),
    ]
    assert same[0].tag == same[1].tag == "xattention-" + same[0].tag[-8:]
    assert len({options.tag for options in [*same, *others]}) == 1 + len(others)
    assert SparsePrefill().tag == SparsePrefill(tau=0.5).tag == ""


def test_where_layers_start() -> None:
    assert SparsePrefill("trianglemix").first_layer(31) == 15
    assert SparsePrefill("trianglemix", start_layer=3).first_layer(31) == 3
    assert SparsePrefill("xattention").first_layer(31) == 15
    assert SparsePrefill("xattention", start_layer=0).first_layer(31) == 0
    assert (
        SparsePrefill("minference").first_layer(31) == SparsePrefill("a_shape").first_layer(31) == 0
    )
