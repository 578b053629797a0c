"""`bench exactness`: what it compares, and in which precision."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model as load_mlx_lm
from tiny_chat import write_chat_model
from typer.testing import CliRunner

from mlx_redrafter.bench import exactness
from mlx_redrafter.cli import main as cli
from mlx_redrafter.errors import ModelError
from mlx_redrafter.evaluation.prompts import Prompt


@pytest.fixture
def sixteen_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that is stored in bfloat16; its steps are not compiled, which would take longer."""
    folder = write_chat_model(tmp_path / "model")
    file = str(folder / "model.safetensors")
    rounded = {name: value.astype(mx.bfloat16) for name, value in mx.load(file).items()}
    mx.save_safetensors(file, rounded, metadata={"format": "mlx"})
    monkeypatch.setattr("mlx_redrafter.api.parts._compiler_present", lambda: False)
    return folder


def run(model: Path, report: Path) -> int:
    """The exit code."""
    given = ["--count", "2", "--max-tokens", "24", "--sampled", "2", "--sampled-tokens", "8"]
    line = ["bench", "exactness", "--model", str(model), *given, "--json", str(report)]
    return CliRunner().invoke(cli.app, line).exit_code


def test_both_models_are_compared_in_float32(
    sixteen_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    reference = exactness.load_reference(sixteen_bits)
    assert {v.dtype for v in reference.model.layers[0].self_attn.q_proj.parameters().values()} == {
        mx.float32
    }
    assert run(sixteen_bits, tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["differences"] == []
    assert report["compared"]["greedy: plain against mlx_lm"] == 2
    assert report["dtype"] == "float32"
    assert os.environ["MLX_ENABLE_TF32"] == "0"


def test_a_folder_that_mlx_lm_cannot_load(sixteen_bits: Path) -> None:
    (sixteen_bits / "generation_config.json").write_bytes(b"\x96\x01")
    with pytest.raises(ModelError, match=r"model cannot be loaded by mlx_lm .*: download it again"):
        exactness.load_reference(sixteen_bits)


def test_a_reference_as_stored_would_differ(
    sixteen_bits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exactness, "load_reference", lambda folder: load_mlx_lm(folder)[0])
    assert run(sixteen_bits, tmp_path / "report.json") == 1
    assert json.loads((tmp_path / "report.json").read_text())["differences"]


def test_a_report_says_where_the_first_difference_is() -> None:
    report = exactness.Report()
    prompt = Prompt("How so?", "chat")
    report.compare("a", prompt, [1, 2, 3], [1, 2, 3])
    report.compare("a", prompt, [1, 2, 3], [1, 2])
    assert (report.compared["a"], report.tokens["a"]) == (2, 6)
    assert report.differences == [{"what": "a", "prompt": "How so?", "first_at": 2}]
