"""The command line of conversion, its summary, the model card and the upload."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_drafters as tiny
from tiny_drafters import apple_config, apple_weights, renamed, write
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.convert import Summary, card, convert
from mlx_redrafter.convert.formats import Format
from mlx_redrafter.errors import HubError

FULL = "elman-6-2"


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_a_dry_run_shows_the_mapping_and_writes_nothing(runner: CliRunner, tmp_path: Path) -> None:
    weights = renamed(apple_weights("sum-8-1"), "0")
    source = write(tmp_path / "trt", weights, {"hidden_size": tiny.D, "exit_dim": 8, "rnn": False})
    arguments = ["convert", str(source), "--out", str(tmp_path / "out"), "--dry-run"]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines == [
        f"{source}: ReDrafter for TensorRT-LLM, 3 tensors, to mlx",
        "source             target                   shape   note",
        "0.0.linear.bias    lm_head.0.linear.bias    8",
        "0.0.linear.weight  lm_head.0.linear.weight  8 x 8",
        "0.1.weight         lm_head.1.weight         11 x 8",
        "note: beam_length: drafted tokens here and in TensorRT-LLM (draft_len_per_beam); Apple "
        "counts the root too, its 5 is 4 here",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trt"]


def test_the_summary_has_sizes_and_hashes(runner: CliRunner, tmp_path: Path) -> None:
    source = write(tmp_path / "apple", apple_weights(FULL), apple_config(FULL))
    result = runner.invoke(cli.app, ["convert", str(source), "--out", str(tmp_path / "out")])
    digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert result.exit_code == 0, result.output
    files = [line.split() for line in result.stdout.splitlines() if " kB" in line]
    assert [files[0][0], files[0][-1]] == ["model.safetensors", digest]
    arguments = ["convert", str(source), "--out", str(tmp_path / "json"), "--json"]
    content = json.loads(runner.invoke(cli.app, arguments).stdout)
    assert content["files"][1] == {
        "name": "model.safetensors",
        "size": (tmp_path / "out" / "model.safetensors").stat().st_size,
        "sha256": digest,
    }
    assert content["format"] == "apple" and len(content["mapping"]) == 10


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--q-bits", "4"], "error: --q-bits and --q-group-size say how to quantise; add -q"),
        (["-q", "--q-bits", "3"], "error: --q-bits 3 is not possible; needed: 4, 8 or 16"),
        (["--format", "base", "--q-bits", "16"], "error: --q-bits 16 is for drafters; for a model"),
        (["--dtype", "int8"], "error: --dtype 'int8' is unknown; needed: float16, bfloat16"),
        (["--format", "onnx"], "error: --format 'onnx' is unknown; needed: auto, apple, mlx"),
        (["--to", "onnx"], "error: --to 'onnx' is unknown; needed: mlx, apple, tensorrt-llm"),
        (["-q", "--to", "apple"], "error: apple has no quantised drafters; drop -q"),
        (["--upload-repo", "a/b/c"], "error: --upload-repo 'a/b/c' is no repository id"),
    ],
)
def test_options_that_make_no_sense(
    more: list[str], line: str, runner: CliRunner, tmp_path: Path
) -> None:
    source = write(tmp_path / "apple", apple_weights(FULL), apple_config(FULL))
    result = runner.invoke(cli.app, ["convert", str(source), "--out", str(tmp_path / "o"), *more])
    assert result.exit_code == 1
    assert result.stderr.startswith(line) and result.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_python_m_is_the_same_command(tmp_path: Path) -> None:
    source = write(tmp_path / "apple", apple_weights(FULL), apple_config(FULL))
    command = [sys.executable, "-m", "mlx_redrafter.convert", str(source)]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{source}: ReDrafter of Apple's PyTorch code, 10 tensors")
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (1, "")
    assert " exists; give another folder, or --force" in again.stderr


def test_upload_with_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repo: str, exist_ok: bool) -> str:
            calls.append(("create", repo))
            return f"https://huggingface.co/{repo}"

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            if len(calls) > 3:
                raise OSError("the line is dead")
            calls.append(("upload", sorted(p.name for p in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    source = write(tmp_path / "apple", apple_weights(FULL), apple_config(FULL))
    with pytest.raises(HubError, match="hf auth login"):
        convert(source, tmp_path / "out", upload_repo="me/drafter")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    summary = convert(source, tmp_path / "out", upload_repo="me/drafter")
    files = ["README.md", "config.json", "model.safetensors"]
    assert calls == [("create", "me/drafter"), ("upload", files)]
    assert summary.url == "https://huggingface.co/me/drafter"
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text
    for file in summary.files:
        assert f"| {file.name} | {file.size} | `{file.sha256}` |" in text
    convert(source, tmp_path / "again", upload_repo="me/drafter")
    with pytest.raises(HubError, match="is complete, but could not be uploaded"):
        convert(source, tmp_path / "third", upload_repo="me/drafter")
    assert (tmp_path / "third" / "model.safetensors").is_file()
    assert convert(source, tmp_path / "no", upload_repo="me/x", dry_run=True).url is None


@pytest.mark.parametrize(
    ("to", "lines"),
    [
        (
            "mlx",
            [
                "base_model: org/model",
                "Drafter for org/model.",
                "mlx-redrafter chat --model org/model --drafter me/drafter",
            ],
        ),
        ("apple", ["drafts 4 tokens."]),
        ("tensorrt-llm", ["`--redrafter_draft_len_per_beam` counts drafted tokens, not the root"]),
    ],
)
def test_a_card_says_how_to_run(to: str, lines: list[str]) -> None:
    text = card.render(
        Summary("org/pytorch", Format.APPLE, to, None, []), "me/drafter", "org/model"
    )
    assert text.startswith("---\nlibrary_name: mlx\nbase_model: org/model\ntags:\n- mlx\n")
    for line in lines:
        assert line in text


@pytest.mark.parametrize("safetensors", [True, False])
def test_pickles_of_the_hub_are_converted_too(
    safetensors: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = write(tmp_path / "snapshot", apple_weights(FULL), apple_config(FULL))
    if not safetensors:
        (source / "model.safetensors").rename(source / "model.pt")
    asked: list[Any] = []

    def resolve(name: str, revision: str | None = None, also: Any = ()) -> Path:
        asked.append((name, tuple(also)))
        return source

    monkeypatch.setattr("mlx_redrafter.hub.resolve", resolve)
    summary = convert("org/drafter@v1", tmp_path / "out")
    assert (summary.source, summary.size > 0) == ("org/drafter@v1", True)
    assert asked == [("org/drafter@v1", ("*.bin", "*.pt"))]


def test_neither_a_path_nor_an_id(runner: CliRunner, tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["convert", "no such thing", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: there is no folder 'no such thing'")
