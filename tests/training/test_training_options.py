"""Options of training: flags, file, folder, and what may not be mixed."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import pytest  # isort: skip
import tiny_chat
from tiny_chat import begin, refusal
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli import train as command
from mlx_redrafter.training import folder, lines, stages
from mlx_redrafter.training.config import TrainConfig

model = tiny_chat.model
finished = tiny_chat.finished


def test_flags_win_over_the_file_and_the_file_over_what_was_begun(tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "train.yaml"
    folder.write(TrainConfig(out=out, seed=5, batch=8, rollout=4, model="first"))
    file.write_text("batch: 16\nrollout: 5\nlearning_rate: 1e-3\ncontext_layers: [0, 2]\n")
    config, before = folder.settle({"out": out, "rollout": 2}, file)
    assert before is not None and (before.seed, before.batch) == (5, 8)
    assert (config.model, config.seed, config.batch, config.rollout) == ("first", 5, 16, 2)
    assert (config.learning_rate, config.context_layers) == (0.001, "0,2")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    config = TrainConfig(
        out=tmp_path, prompts=Path("some") / "file.jsonl", system_prompt="a: b\n# c", cache_gb=3.0
    )
    folder.write(config)
    assert folder.stored(tmp_path) == config
    assert str(tmp_path) not in (tmp_path / folder.FILE).read_text()  # the folder may be moved


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batches: 3", "unknown option 'batches'"),
        ("batch: many", "batch in"),
        ("- batch", "is no configuration"),
        ("batch: [", "cannot be read"),
        ("batch: 0", "batch 0 is not possible"),
        ("segment: 2048", "segment 2048 is not possible: use 1024 or less, the batch_positions"),
        ('system_prompt: "\\uDC80"', "the system prompt is not UTF-8 text"),
        ("learning_rate:", "learning_rate in"),
        ("[" * 10**5, "cannot be read"),
        ("seed: -1", "seed -1 is not possible: use 0 or more"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    result = CliRunner().invoke(
        cli.app, ["train", "-c", str(file), "-o", str(tmp_path / "run")], env={"COLUMNS": "500"}
    )
    assert (result.exit_code, result.stdout) == (1, "")
    assert says in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_option_is_a_flag_with_help() -> None:
    names = [name for panel in command.OPTIONS.values() for name in panel]
    assert sorted(names) == sorted(f.name for f in fields(TrainConfig))
    assert {*folder.DATA, *folder.FREE, *folder.FIT} == set(names)
    result = CliRunner().invoke(cli.app, ["train", "answers", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(f"--{name.replace('_', '-')}" in result.stdout for name in names)


def parsed(line: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a command line, as the command gets them."""
    calls: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(command, "_stages", lambda given, *_, **__: calls.append(given))
        result = CliRunner().invoke(cli.app, shlex.split(line)[1:])
    assert result.exit_code == 0, result.stderr
    return calls[0]


def test_the_command_in_the_card_makes_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(
        out=Path("run"), model="org/name", batch=8, hard=0.0, system_prompt="it's", exit_dim=64,
        context_layers="", prompts=Path("some prompts.jsonl"),
    )  # fmt: skip
    line = lines.Shown(config).made_by()
    assert line == (
        "mlx-redrafter train --model org/name --out run --prompts 'some prompts.jsonl' "
        "--system-prompt 'it'\"'\"'s' --batch 8 --context-layers '' --exit-dim 64 --hard 0.0"
    )
    assert folder.settle(parsed(line, monkeypatch))[0] == config


@pytest.mark.parametrize(
    ("model", "out", "prompts", "shown"),
    [
        ("models/a b", "runs/r", "p.jsonl", ("models/a b", "runs/r", "p.jsonl")),
        ("TMP/models/a b", "TMP/runs/r", "TMP/p.jsonl", ("../models/a b", "r", "../p.jsonl")),
        ("TMP/models/a b", "r", "TMP/p.jsonl", ("models/a b", "r", "p.jsonl")),
        ("org/name@main", "TMP/r", None, ("org/name@main", "r", None)),
    ],
)
def test_paths_in_a_card_are_relative_and_exist(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    out: str,
    prompts: str | None,
    shown: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "a b").mkdir(parents=True)
    (tmp_path / "p.jsonl").touch()
    here = [s and s.replace("TMP", str(tmp_path)) for s in (model, out, prompts)]
    config = folder.settle({"model": here[0], "out": here[1], "prompts": here[2]})[0]
    found = lines.Shown(config)
    assert tuple(found.values()[k] for k in ("model", "out", "prompts")) == shown
    (tmp_path / "runs").mkdir()
    base = tmp_path / "runs" if "TMP/runs" in out else tmp_path
    assert prompts is None or ((base / shown[0]).is_dir() and (base / shown[2]).is_file())
    for line in (found.made_by(), found.measured_by(3, 8)):
        assert str(tmp_path) not in line and parsed(line, monkeypatch)["out"] == Path(shown[1])


# Mixing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "other"), ("seed", 1), ("max_tokens", 17), ("prompt_tokens", 17),
        ("system_prompt", "du"), ("prompts", Path("a.jsonl")), ("answers", Path("a.jsonl")),
    ],
)  # fmt: skip
def test_other_options_for_the_same_text_are_refused(
    finished: Path, model: Path, name: str, value: Any
) -> None:
    text = refusal(lambda: folder.settle({"out": finished, name: value}))
    stored = getattr(folder.stored(finished), name)
    assert text.startswith(f"{name} {folder._shown(value)} was given")
    assert f"begun with {name} {folder._shown(stored)}" in text


def test_another_batch_is_refused_once_there_is_text(finished: Path, model: Path) -> None:
    assert "batch 2 was given" in refusal(lambda: begin(finished, model, batch=2))


def test_options_of_the_fit_are_free_until_it_begins(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "run"
    stages.prompts(begin(out, model))
    config, _ = folder.settle({"out": out, "rollout": 2, "cell": "elman"})
    folder.write(config)
    assert folder.settle({"out": out, "answer_tokens": 999, "cache_gb": 1.0})[0].rollout == 2
    (out / "fit").mkdir()
    (out / "fit" / "checkpoint.safetensors").touch()
    text = refusal(lambda: folder.settle({"out": out, "rollout": 3}))
    assert "rollout 3 was given" in text and "rollout 2" in text and f"{out / 'fit'}" in text
    assert folder.settle({"out": out, "answer_tokens": 999})[0].answer_tokens == 999
