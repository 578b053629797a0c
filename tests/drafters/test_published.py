"""The table of published drafters, and what is said of a model that has one."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli import remarks
from mlx_redrafter.drafters import published
from mlx_redrafter.drafters.published import PUBLISHED, of_model

LLAMA = [
    "philschmid/llama-3-1-8b-instruct-medusa",
    "Snowflake/Arctic-LSTM-Speculator-Llama-3.1-8B-Instruct",
]


def test_the_rows() -> None:
    ids = [row.id for row in PUBLISHED]
    assert len(ids) == len(set(ids))
    for row in PUBLISHED:
        assert row.kind in (published.MEDUSA, published.MLP, published.LSTM)
        assert row.bases and all(name.count("/") == 1 for name in (row.id, *row.bases))
        assert row.size >= 0 and row.source
        assert row in of_model(row.bases[0])


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
def test_a_copy_of_the_model_counts(model: str) -> None:
    assert [row.id for row in of_model(model)] == LLAMA
    text = remarks.no_drafter(model)
    assert text.endswith(f"; published for this model: {LLAMA[0]} (Medusa heads)")


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


def test_the_command_lists_them() -> None:
    assert all(row.id in listed() and row.kind in listed() for row in PUBLISHED)
    lines = listed("mlx-community/Llama-3.1-8B-Instruct-4bit").splitlines()
    assert lines[0].split() == ["for", "drafter", "kind", "size", "licence", "facts", "from"]
    found = [line.split()[:2] for line in lines[1:]]
    assert found == [["meta-llama/Llama-3.1-8B-Instruct", name] for name in LLAMA]
    rows = json.loads(listed("lmsys/vicuna-7b-v1.3", "--json"))["drafters"]
    assert [(row["id"], row["kind"], row["size"], row["licence"]) for row in rows] == [
        ("FasterDecoding/medusa-vicuna-7b-v1.3", "Medusa heads", 1.48, "as the base model")
    ]


def test_the_command_says_that_there_are_none() -> None:
    assert listed("org/other").startswith("no published drafter for org/other is known here; ")
    assert json.loads(listed("org/other", "--json")) == {"drafters": []}
