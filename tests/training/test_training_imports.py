"""Answers of an earlier run, and whether answers are the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import pytest  # isort: skip
import tiny_chat
from tiny_chat import (
    END,
    TEMPLATE,
    WORDS,
    all_answers,
    begin,
    contents,
    lines_of,
    refusal,
    stop_at,
    write_chat_model,
    write_tokenizer,
)

from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.training import agreement, imports, prompts, stages
from mlx_redrafter.training.shards import read_conversations, recorded_layers

model = tiny_chat.model
finished = tiny_chat.finished


def test_imported_answers_are_split_and_count(tmp_path: Path, model: Path, finished: Path) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text(all_answers(finished) * 3)
    total = 3 * sum(
        len(c.answer) for f in imports.split(finished)[1] for c in read_conversations(f)
    )
    out = tmp_path / "run"
    stages.answers(begin(out, model, answers=file, answer_tokens=total))
    taken, written = imports.split(out)
    assert "".join(f.read_text() for f in taken) == file.read_text() and not written
    assert [len(read_conversations(f)) for f in taken[:-1]] == [64] * (len(taken) - 1)
    assert not (out / "prompts").exists()
    run = begin(out, model, answer_tokens=total + 50)
    stages.answers(run)
    written = imports.split(out)[1]
    assert imports.tokens(out)[1] >= 50 and len(written) < 8
    stages._read_features(run)
    assert len(list((out / "features").glob("import*.npy"))) == len(taken)


def test_an_import_that_was_stopped_begins_again(
    tmp_path: Path, model: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text(all_answers(finished) * 4)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, imports, "write_lines", 2)
        with pytest.raises(KeyboardInterrupt):
            stages.prompts(begin(out, model, answers=file))
    stages.prompts(begin(out, model))
    assert "".join(f.read_text() for f in imports.split(out)[0]) == file.read_text()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": [0, len(WORDS)], "answer": [1]}, f"has the token {len(WORDS)}"),
        ({"prompt": [0, -1], "answer": [1]}, "has the token -1"),
        ({"prompt": [0], "answer": []}, "empty prompt or answer"),
        ({"prompt": [0] * 2000, "answer": [1] * 100}, "has 2100 tokens"),
        ({"prompt": "text", "answer": "text"}, "holds no answers"),
    ],
)
def test_impossible_imports_are_refused(
    tmp_path: Path, model: Path, row: dict[str, Any], says: str
) -> None:
    file = tmp_path / "old.jsonl"
    file.write_text(lines_of({"prompt": [0, 3], "answer": [5]}, row))
    assert says in refusal(lambda: stages.prompts(begin(tmp_path / "run", model, answers=file)))


def test_imported_answers_to_evaluation_prompts_are_left_out(
    tmp_path: Path,
    model: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = begin(finished, model).supply.rows[0]["prompt"]
    monkeypatch.setattr(prompts, "read_prompts", lambda: [Prompt(first, "chat")])
    file = tmp_path / "old.jsonl"
    file.write_text(all_answers(finished))
    run = begin(tmp_path / "run", model, answers=file)
    stages.prompts(run)
    prompt = run.supply.encode({"prompt": first})
    kept = [c.prompt for f in imports.split(run.config.out)[0] for c in read_conversations(f)]
    assert prompt not in kept and prompt in [json.loads(r)["prompt"] for r in file.open()]
    assert "1 of" in capsys.readouterr().err


def test_features_of_other_layers_are_made_anew(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "run"
    stages.answers(begin(out, model, answer_tokens=60, context_layers="1"))
    assert recorded_layers(out) == (1, 2)
    first = contents(out, "features")
    stages._read_features(begin(out, model, answer_tokens=60, context_layers="0"))
    assert recorded_layers(out) == (0, 2)
    second = contents(out, "features")
    assert first.keys() == second.keys() and first != second


def test_without_room_no_features_are_kept(tmp_path: Path, model: Path) -> None:
    stages.answers(begin(tmp_path / "run", model, answer_tokens=60, cache_gb=0.0))
    assert not (tmp_path / "run" / "features").exists()


# Warnings


def findings(out: Path, model: Path, **options: Any) -> agreement.Finding:
    (found,) = agreement.findings(begin(out, model, **options).supply).values()
    return found


def test_the_models_own_answers_are_what_it_says(finished: Path, model: Path) -> None:
    found = findings(finished, model)
    assert (found.stored, found.greedy, found.own) == (1.0, True, None)
    assert found.warning("they") is None


OTHER = TEMPLATE.replace("<|im_start|> {{ m['role'] }}", "<|im_start|> du {{ m['role'] }}")


@pytest.mark.parametrize("imported", [False, True])
def test_another_chat_template_is_noticed_with_its_cost(
    tmp_path: Path, model: Path, finished: Path, imported: bool
) -> None:
    other = write_chat_model(tmp_path / "other")  # the same weights
    if imported:
        file, out = tmp_path / "old.jsonl", tmp_path / "run"
        file.write_text(all_answers(finished))
        stages.prompts(begin(out, other, answers=file))
    else:
        out = tmp_path / "moved"
        out.mkdir()
        (out / "answers").symlink_to(finished / "answers")
        (out / "prompts").symlink_to(finished / "prompts")
    assert findings(out, other).warning("they") is None
    write_tokenizer(other, OTHER)
    found = findings(out, other)
    assert found.stored == 1.0 and found.own is not None and found.own < 0.9
    text = found.warning("they")
    assert text is not None and "another chat template" in text
    assert f"other tokens at {1 - found.own:.0%} of the places" in text


def test_another_models_answers_are_noticed(tmp_path: Path, finished: Path) -> None:
    other = write_chat_model(tmp_path / "other", seed=8)
    file = tmp_path / "old.jsonl"
    file.write_text(all_answers(finished))
    stages.prompts(begin(tmp_path / "run", other, answers=file))
    found = findings(tmp_path / "run", other)
    assert found.own is None and found.stored < 0.5
    assert "not what this model says" in (found.warning("they") or "")


def test_a_warning_is_said_before_the_fit(
    tmp_path: Path,
    model: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlx_redrafter.training import fit

    other = write_chat_model(tmp_path / "other", OTHER)
    file, out = tmp_path / "old.jsonl", tmp_path / "run"
    file.write_text(all_answers(finished))
    monkeypatch.setattr(fit, "fit", lambda *_: out)
    run = begin(out, other, answers=file, answer_tokens=1)
    stages.prompts(run)
    stages.fit(run)
    assert "warning: the answers of" in capsys.readouterr().err
    write_tokenizer(other)
    stages.fit(begin(out, other))
    assert "warning" not in capsys.readouterr().err


def test_a_base_model_continues_its_own_text(tmp_path: Path) -> None:
    base = write_chat_model(tmp_path / "base", None)
    run = begin(tmp_path / "run", base, answer_tokens=60)
    stages.answers(run)
    found = read_conversations(imports.split(run.config.out)[1][0])
    assert all(END not in c.prompt for c in found)
    assert findings(tmp_path / "run", base).warning("they") is None
