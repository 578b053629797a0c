"""The table of published drafters, and what is said of a model that has one."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli import remarks
from mlx_redrafter.drafters import published
from mlx_redrafter.drafters.published import PUBLISHED, of_model

ARCTIC = "Snowflake/Arctic-LSTM-Speculator-Llama-3.1-8B-Instruct"
LLAMA = [
    "lmsys/SGLang-EAGLE3-Llama-3.1-8B-Instruct-SpecForge",
    "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
    "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3",
    ARCTIC,
    "yuhuili/EAGLE-LLaMA3.1-Instruct-8B",
    "philschmid/llama-3-1-8b-instruct-medusa",
]
KINDS = ("MEDUSA", "MLP", "LSTM", "EAGLE_3", "EAGLE_1", "DSPARK", "DFLASH")
NONE = "no trained drafter for {} was found, so drafts come from the text itself; "


FEW = frozenset({published.MEDUSA, published.MLP, published.LSTM})
ALL = frozenset({published.SMALL, *(row.kind for row in PUBLISHED)})


@pytest.fixture
def kinds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds that are loaded and converted, whatever this version can."""
    monkeypatch.setattr(published, "LOADED_KINDS", request.param)
    monkeypatch.setattr(published, "CONVERTED_KINDS", request.param)


few = pytest.mark.parametrize("kinds", [FEW], indirect=True)
every = pytest.mark.parametrize("kinds", [ALL], indirect=True)


def test_the_rows() -> None:
    ids = [row.id for row in PUBLISHED]
    assert len(ids) == len(set(ids))
    kinds = {getattr(published, name) for name in KINDS}
    assert kinds | {published.SMALL} >= published.LOADED_KINDS
    assert published.CONVERTED_KINDS <= published.LOADED_KINDS
    for row in PUBLISHED:
        assert row.kind in kinds
        assert row.bases and all(name.count("/") == 1 for name in (row.id, *row.bases))
        assert row.size >= 0 and row.source
        assert row in of_model(row.bases[0])


def test_what_is_recommended_can_be_used() -> None:
    for row in PUBLISHED:
        best = published.recommended(row.bases[0])
        assert row.usable == (
            row.kind in published.LOADED_KINDS
            and (not row.pickled or row.kind in published.CONVERTED_KINDS)
        )
        assert not row.usable if best is None else best.usable
    assert published.recommended("org/other") is None


@few
def test_the_best_one_that_is_loaded_is_recommended(kinds: None) -> None:
    best = published.recommended("mlx-community/Llama-3.1-8B-Instruct-4bit")
    assert best is not None and best.id == ARCTIC
    assert published.recommended("Qwen/Qwen3-8B") is None


@every
def test_of_all_kinds_the_first_is(kinds: None) -> None:
    assert all(
        published.recommended(row.bases[0]) == of_model(row.bases[0])[0] for row in PUBLISHED
    )
    name = "org/Llama-3.1-8B-Instruct"
    assert remarks.no_drafter(name).startswith(
        NONE.format(name)
        + f"published for this model (EAGLE-3, 0.85 GB): --drafter {LLAMA[0]}; to train one: "
    )


def test_a_pickle_that_convert_does_not_read_is_not_recommended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(published, "LOADED_KINDS", ALL)
    monkeypatch.setattr(published, "CONVERTED_KINDS", FEW)
    best = published.recommended("lmsys/vicuna-7b-v1.3")
    assert best is not None and best.kind == published.MEDUSA


@few
def test_a_pickle_is_recommended_with_its_conversion(kinds: None) -> None:
    name = "lmsys/vicuna-7b-v1.3"
    assert remarks.no_drafter(name) == NONE.format(name) + (
        "published for this model (Medusa, 1.48 GB): mlx-redrafter convert "
        "FasterDecoding/medusa-vicuna-7b-v1.3 --out FOLDER, then --drafter FOLDER; to train one: "
        "mlx-redrafter train -m lmsys/vicuna-7b-v1.3"
    )


@every
def test_a_family_has_a_small_member(kinds: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, small = "mlx-community/Qwen3-30B-4bit", "Qwen/Qwen3-0.6B"
    assert f"a small model of its family can draft: --drafter {small}; " in remarks.no_drafter(
        model
    )
    assert f"use a small model of its family (--drafter {small}) or one of your" in listed(model)
    for other in ("mlx-community/Qwen3-0.6B-8bit", "Qwen/Qwen2-7B", "smollm2-135m", "", "/"):
        assert published.small_member(other) is None
    monkeypatch.setattr(published, "LOADED_KINDS", FEW)
    assert published.small_member(model) is None and small not in listed(model)
    assert "--drafter Q" not in remarks.no_drafter(model)


@few
@pytest.mark.parametrize(
    "model",
    [
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Meta-Llama-3.1-8B-Instruct@main",
        "mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
        "mlx-community/Llama-3.1-8B-Instruct-4bit-DWQ",
        "/models/llama-3.1-8b-instruct-mlx-bf16/",
    ],
)
def test_a_copy_of_the_model_counts(kinds: None, model: str) -> None:
    assert [row.id for row in of_model(model)] == LLAMA
    assert remarks.no_drafter(model) == NONE.format(model) + (
        f"published for this model (LSTM, 2.37 GB): --drafter {ARCTIC}; to train one: "
        f"mlx-redrafter train -m {model}"
    )


@pytest.mark.parametrize(
    "model", ["smollm2-135m", "meta-llama/Llama-3.1-8B", "org/Llama-3.1-8B-Instruct-code", "", "/"]
)
def test_other_models_have_none(model: str) -> None:
    assert of_model(model) == []
    assert remarks.no_drafter(model).endswith("--drafter FOLDER-OR-ID")


def listed(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["drafters", *arguments])
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


@few
def test_the_command_lists_them(kinds: None) -> None:
    lines = [line.split() for line in listed().splitlines()]
    marked = {True: "", False: "*"}
    for row in PUBLISHED:
        kind = row.kind + marked[row.kind in FEW]
        assert [row.id, kind, *([f"{row.size:g}", "GB"] if row.size else ["-"])] in lines
        assert [row.bases[0]] in lines
    lines = listed("mlx-community/Llama-3.1-8B-Instruct-4bit").splitlines()
    assert lines[1].strip() == "meta-llama/Llama-3.1-8B-Instruct"
    assert [line.split()[0] for line in lines if "GB" in line or " - " in line] == LLAMA
    assert lines[3].strip() == "MT-bench 3.52, HumanEval 4.32, GSM8K 2.85; chain of 5"
    assert lines[-1] == "* not read by this version of mlx-redrafter"
    rows = json.loads(listed("lmsys/vicuna-7b-v1.3", "--json"))["drafters"]
    assert [(r["id"], r["kind"], r["size"], r["pickled"], r["usable"]) for r in rows] == [
        ("yuhuili/EAGLE-Vicuna-7B-v1.3", "EAGLE-1", 0, True, False),
        ("FasterDecoding/medusa-vicuna-7b-v1.3", "Medusa", 1.48, True, True),
    ]


def test_eighty_columns_do() -> None:
    for model in dict.fromkeys(row.bases[0] for row in PUBLISHED):
        assert max(len(line.rstrip()) for line in listed(model).splitlines()) <= 80
    assert max(len(line.rstrip()) for line in listed().splitlines()) <= 80


def test_the_command_says_that_there_are_none() -> None:
    assert listed("org/other") == (
        "no published drafter for org/other is known here: use one of your own (mlx-redrafter "
        "train -m org/other); to see all that are: mlx-redrafter drafters\n"
    )
    assert json.loads(listed("org/other", "--json")) == {"drafters": []}
