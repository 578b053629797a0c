"""Training's prompts and answers on a tiny model; stopping and going on."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import pytest  # isort: skip
import tiny_chat
from tiny_chat import (
    SMALL,
    all_answers,
    begin,
    contents,
    lines_of,
    refusal,
    stop_at,
    words,
    write_chat_model,
)
from typer.testing import CliRunner

from mlx_redrafter.budget import yields
from mlx_redrafter.cli import info
from mlx_redrafter.cli import main as cli
from mlx_redrafter.evaluation.prompts import Prompt, read_prompts
from mlx_redrafter.training import folder, imports, prompts, stages, supply
from mlx_redrafter.training.shards import read_conversations, record_layers, recorded_layers
from mlx_redrafter.tree.shape import TreeShape

model = tiny_chat.model
finished = tiny_chat.finished


# Prompts


def test_prompt_files_of_every_form_without_duplicates_and_evaluation_prompts(
    tmp_path: Path, model: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        lines_of(
            "ba be",
            {"prompt": "Ba  be!"},
            {"prompt": read_prompts()[0].text},
            {"messages": [{"role": "system", "content": "du"}, {"role": "user", "content": "do"}]},
            {"conversations": [{"from": "human", "value": "fa"}, {"from": "gpt", "value": "fe"}]},
        )
    )
    run = begin(tmp_path / "run", model, prompts=file, system_prompt="ka ka")
    stages.prompts(run)
    rows = run.supply.rows
    assert [row.get("prompt", "messages") for row in rows[:3]] == ["ba be", "messages", "fa"]
    assert [words(*run.supply.encode(row)) for row in rows[:2]] == [
        "<|im_start|> system ka ka <|im_end|> <|im_start|> user ba be <|im_end|> "
        "<|im_start|> assistant",
        "<|im_start|> system du <|im_end|> <|im_start|> user do <|im_end|> <|im_start|> assistant",
    ]


def test_too_few_prompts_are_answered_again_but_not_greedily(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines_of("ba be", "do du du", "fa " * 2000))
    run = begin(tmp_path / "run", model, prompts=file)
    stages.answers(run)
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 3 prompts" in said and "more than 1024 tokens" in said
    assert "holds 2 prompts and 28 are needed" in said
    found = [c for file in imports.split(run.config.out)[1] for c in read_conversations(file)]
    assert [c.temp for c in found].count(0.0) == 1
    sampled = [tuple(c.answer) for c in found if c.temp]
    assert len(set(sampled)) > len(sampled) / 2


def test_own_prompts_are_new_and_none_is_of_the_evaluation(
    tmp_path: Path, model: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [r["prompt"] for r in begin(finished, model).supply.rows]
    assert len(texts) > 10 and len({*texts}) == len(texts)
    monkeypatch.setattr(prompts, "read_prompts", lambda: [Prompt(texts[1], "chat")])
    run = begin(tmp_path / "run", model)
    stages.prompts(run)
    again = [row["prompt"] for row in run.supply.rows]
    assert texts[1] not in again and again[:4] == [texts[0], *texts[2:5]]


def test_a_model_without_new_prompts_is_said(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts.OwnTurns, "text", lambda *_: "ba")
    text = refusal(lambda: stages.prompts(begin(tmp_path / "run", model)))
    assert "writes no new prompts by itself" in text and "--prompts" in text


# Resuming


@pytest.mark.parametrize(
    ("module", "name", "calls"),
    [(supply, "write_lines", (1, 3)), (stages, "write_shard", (1, 2, 5))],
)
def test_an_interrupted_run_makes_the_same_files(
    tmp_path: Path, model: Path, finished: Path, module: Any, name: str, calls: tuple[int, ...]
) -> None:
    for call in calls:
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, module, name, call)
            with pytest.raises(KeyboardInterrupt):
                stages.answers(begin(tmp_path / "run", model))
    stages.answers(begin(tmp_path / "run", model))
    parts = ("prompts", "answers", "features")
    assert contents(tmp_path / "run", *parts) == contents(finished, *parts)


@pytest.mark.parametrize("text", ["[0, 1", "7", '["a"]', ""])
def test_features_of_unknown_layers_are_none(tmp_path: Path, text: str) -> None:
    record_layers(tmp_path, (0, 2))
    assert recorded_layers(tmp_path) == (0, 2)
    (tmp_path / "features" / "layers.json").write_text(text)
    assert recorded_layers(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "use"),
    [
        ("fit/checkpoint.safetensors", b"", "delete TMP/fit to fit anew"),
        ("fit/checkpoint.safetensors", b"\x02" + bytes(7) + b"{}", "delete TMP/fit to fit anew"),
        ("fit/answers.json", b"[]", "delete TMP/fit to fit anew"),
        ("features/00000.npy", b"[" * 99, "delete it, it can be computed again"),
        ("prompts/00000.jsonl", b"null\n", "delete TMP and begin anew"),
        ("answers/00000.jsonl", b"null\n", "give lines of "),
        ("train.yaml", b"", "restore it, or choose another --out"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(
    tmp_path: Path, model: Path, finished: Path, name: str, content: bytes, use: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "fit").mkdir()
    (out / "fit" / "answers.json").write_text('{"answer_tokens": 300}')
    (out / name).write_bytes(content)
    if name == "fit/answers.json":
        (out / "fit" / "checkpoint.safetensors").write_bytes(content)
    said = refusal(lambda: stages.fit(begin(out, model)))
    assert said.startswith(f"{out / name} ") and use.replace("TMP", str(out)) in said


def test_more_answers_later_are_those_of_asking_for_all_at_once(
    tmp_path: Path, model: Path, finished: Path
) -> None:
    stages.answers(begin(tmp_path / "run", model, answer_tokens=100))
    few = contents(tmp_path / "run", "answers")
    stages.answers(begin(tmp_path / "run", model))
    assert contents(tmp_path / "run", "answers") == contents(finished, "answers")
    assert 0 < len(few) < len(contents(finished, "answers"))


def test_answers_reach_the_budget_and_not_a_batch_more(finished: Path) -> None:
    batches = [
        [len(c.answer) for c in read_conversations(f)] for f in imports.split(finished)[1]
    ]  # fmt: skip
    assert all(len(batch) == SMALL["batch"] for batch in batches)
    total = sum(map(sum, batches))
    assert total >= SMALL["answer_tokens"] > total - sum(batches[-1])


def test_shorter_answers_than_expected_take_more_prompts(
    tmp_path: Path, model: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "EXPECTED", 3.0)
    run = begin(tmp_path / "run", model)
    stages.prompts(run)
    few = len(run.supply.rows)
    stages.answers(run)
    assert few < len(run.supply.rows)
    assert contents(run.config.out, "answers") == contents(finished, "answers")


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my run"
    file = tmp_path / "train.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in SMALL.items()))
    arguments = ["train", "--eval-prompts", "3", "answers", "--model", str(model)]
    arguments += ["--out", str(out), "--system-prompt", "ba 'be' $HOME", "--config", str(file)]
    arguments += ["--eval-tokens", "8", "--debug"]
    stop_at(monkeypatch, stages, "write_shard", 2)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 130
    said, _, line = result.stderr.splitlines()[-1].partition("To go on: ")
    assert said == "stopped; what is done is kept. "
    program, *again = shlex.split(line)
    assert (program, again[:2]) == ("mlx-redrafter", ["train", "answers"])
    assert sorted(again) == sorted(arguments) and "'ba '\"'\"'be'\"'\"' $HOME'" in line
    assert len(list((out / "answers").iterdir())) == 1
    monkeypatch.undo()
    result = CliRunner().invoke(cli.app, again)
    assert result.exit_code == 0, result.stderr
    assert len(list((out / "answers").iterdir())) > 1


def test_stopped_before_anything_is_written_down_the_way_on_names_the_model(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, stages, "load_model", 1)
    arguments = ["train", "-m", str(model), "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 130 and not (tmp_path / "run" / folder.FILE).exists()
    assert result.stderr.splitlines()[-1].endswith(
        f"mlx-redrafter train --model {model} --out {tmp_path / 'run'}"
    )


def test_what_to_run_first_can_be_copied(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "my run"
    for stage, wanted in (("fit", "train answers"), ("evaluate", "train")):
        result = CliRunner().invoke(
            cli.app, ["train", stage, "-m", str(model), "-o", str(out)], env={"COLUMNS": "500"}
        )
        assert result.exit_code == 1
        line = f"`mlx-redrafter {wanted} --model {model} --out '{out}'`"
        assert line in result.stderr, result.stderr


@pytest.mark.slow
def test_the_fit_alone_takes_answers_into_a_new_folder(
    tmp_path: Path, model: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "old answers.jsonl", tmp_path / "run"
    file.write_text(all_answers(finished))
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    arguments = ["train", "fit", "-m", str(model), "-o", str(out), "--answers", str(file)]
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_REDRAFTER_DATA", str(tmp_path / "file" / "data"))
    result = CliRunner().invoke(cli.app, [*arguments, *options])
    assert result.exit_code == 0, result.stderr
    assert imports.tokens(out) == (imports.tokens(finished)[1], 0)
    assert (out / "drafter" / "model.safetensors").is_file()
    warning, last = result.stderr.splitlines()[-2:]
    assert warning.startswith("warning: the drafter is not kept for this model: ")
    assert "the data folder cannot be written" in warning and str(tmp_path / "file") in warning
    use = f"mlx-redrafter chat --model {model} --drafter {out / 'drafter'}"
    assert last == f"wrote {out / 'drafter'}; use it: {use}"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my model.gguf", "convert 'TMP/my model.gguf' --out FOLDER"),
        ("lamma", "model_type 'lamma' is not supported"),
        ("fails", "chat template fails ('list object' has no attribute"),
        ("none", "there is no folder"),
    ],
)
def test_a_model_that_cannot_be_trained_for_is_one_line(
    tmp_path: Path, name: str, says: str
) -> None:
    (tmp_path / "my model.gguf").write_bytes(b"GGUF" + bytes(100))
    write_chat_model(tmp_path / "fails", "{{ messages.nothing.at_all }}")
    write_chat_model(tmp_path / "lamma")
    config = json.loads((tmp_path / "lamma" / "config.json").read_text())
    (tmp_path / "lamma" / "config.json").write_text(json.dumps({**config, "model_type": "lamma"}))
    arguments = ["train", "-m", str(tmp_path / name), "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "1000"})
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert says.replace("TMP", str(tmp_path)) in result.stderr


@pytest.mark.slow
def test_a_base_model_gets_a_drafter_too(tmp_path: Path) -> None:
    model, out = write_chat_model(tmp_path / "base", template=None), tmp_path / "run"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    options += ["--eval-prompts", "1", "--eval-tokens", "4", "--prompt-tokens", "8"]
    result = CliRunner().invoke(cli.app, ["train", "-m", str(model), "-o", str(out), *options])
    assert result.exit_code == 0, result.stderr
    use = "mlx-redrafter generate 'Once upon a time' --raw --model"
    assert result.stderr.splitlines()[-1].endswith(f"kept it for this model; use it: {use} {model}")
    card = (out / "drafter" / "README.md").read_text()
    assert f"\n{use} base --drafter run/drafter\n" in card and "no chat template" in card


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, model: Path) -> None:
    with folder.alone(tmp_path):
        result = CliRunner().invoke(cli.app, ["train", "-m", str(model), "-o", str(tmp_path)])
    assert result.exit_code == 1 and "another run is at work in" in result.stderr


def test_a_run_that_could_not_begin_leaves_no_options_behind(tmp_path: Path, model: Path) -> None:
    arguments = ["train", "-m", str(model), "-o", str(tmp_path), "--answers", "none.jsonl"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1 and "there is no file none.jsonl" in result.stderr
    assert folder.stored(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path: Path, model: Path) -> None:
    arguments = ["train", "evaluate", "-m", str(model), "-o", str(tmp_path / "new" / "run")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1 and "has no drafter yet" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_one_command_makes_a_drafter_from_nothing_but_a_model(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_REDRAFTER_DATA", str(tmp_path / "data"))
    out = tmp_path / "run"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    arguments = ["train", "-m", str(model), "-o", str(out), *options]
    arguments += ["--eval-prompts", "2", "--eval-tokens", "8"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "tokens per step" in result.stderr
    made = {file.name for file in (out / "drafter").iterdir()}
    assert made >= {"README.md", "config.json", "evaluation.json", "model.safetensors"}
    own, usual = yields.load(out / "drafter"), yields.load(None)
    shape = TreeShape(1, 2, 3, lookup=yields.LOOKUP)
    assert 1 <= own.tokens(shape, sampled=True) != usual.tokens(shape, sampled=True)
    for stage in ("prompts", "answers", "fit", "evaluate"):
        assert re.search(rf"^{stage}: at most \d+\.\d GB", result.stderr, re.MULTILINE)
    card = (out / "drafter" / "README.md").read_text()
    assert f"--model ../{model.name} --out run" in card and str(tmp_path) not in card
    assert f"mlx-redrafter chat --model ../{model.name} --drafter run/drafter\n" in card
    use = f"use it: mlx-redrafter chat --model {model}"
    last = result.stderr.splitlines()[-1]
    assert last == f"wrote {out / 'drafter'} and kept it for this model; {use}"
    arguments = ["train", "fit", "-o", str(tmp_path / "run2"), "-m", str(model), *options]
    file = tmp_path / "old.jsonl"
    file.write_text(all_answers(out))
    result = CliRunner().invoke(cli.app, [*arguments, "--answers", str(file)])
    assert f"and kept it for this model, before 1 older one; {use}" in result.stderr
    for place in (tmp_path / "data").glob("drafters/*/*-run2"):
        shutil.rmtree(place)
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    found = info.collect(str(moved))["drafter"]
    assert found["fits"] and found["origin"].startswith("trained on 20")
    assert found["origin"].endswith(f"in {out}, kept by train")
    assert json.loads(Path(found["folder"], "evaluation.json").read_text())["live"]
