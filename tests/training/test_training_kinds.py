"""Kinds of drafters that are trained on the same data: Medusa heads beside the ReDrafter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import V
from over_text import logits
from test_training import SMALL, Stop, copied, run_fit, write_answers
from tiny_chat import begin, model, refusal  # noqa: F401  (a fixture)
from tiny_medusa import reference

from mlx_redrafter.drafters.loading import check_folder, kind_of, load_drafter
from mlx_redrafter.drafters.medusa import Medusa
from mlx_redrafter.drafters.rollout import contexts, final_hidden
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder
from mlx_redrafter.training import folder as folders
from mlx_redrafter.training import lines, stages
from mlx_redrafter.training.config import KINDS, TrainConfig, defaults
from mlx_redrafter.training.data import Batch
from mlx_redrafter.training.fit import Fit, fit
from mlx_redrafter.training.kinds import TRAINEES, medusa

HEADS = replace(SMALL, kind="medusa", rollout=4)


@pytest.fixture(scope="module")
def folder(target: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_answers(target, tmp_path_factory.mktemp("training"))


def trained(target: Decoder, folder: Path, to: Path, **changes: object) -> Fit:
    run = Fit(target, replace(HEADS, **changes), copied(folder, to))
    run.run(lambda _: None)
    return run


@pytest.mark.parametrize(
    "changes", [{}, {"draft_vocab_size": 0}, {"num_draft_layers": 2, "bits": 8}]
)
def test_heads_learn_load_and_say_what_they_are(
    folder: Path, target: Decoder, tmp_path: Path, changes: dict[str, int]
) -> None:
    run = Fit(target, replace(HEADS, **changes), copied(folder, tmp_path / "own"))
    batches = [next(run.data.batches(16, 1, 0))]
    untrained = run.score(batches)
    run.run(lambda _: None)
    assert run.score(batches)["loss"] < untrained["loss"] - 0.05
    assert len(run.score(batches)["acceptance"]) == 4
    place = run.export(tmp_path / "drafter")
    drafter = load_drafter(place, target)
    check_folder(place, target)
    assert isinstance(drafter, Medusa) and drafter.config == run.trainee.shape
    raw = json.loads((place / "config.json").read_text())
    assert (raw["model_type"], raw["num_heads"], raw["original_lm_head"]) == ("medusa", 4, True)
    names = mx.load(str(place / "model.safetensors")).keys()
    assert {"blocks.3.layers.0.weight", "blocks.3.layers.0.bias", "lm_head.weight"} <= names
    assert kind_of(place).describe(place).facts["heads"] == 4


def test_untrained_heads_leave_the_hidden_states_as_they_are(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    run = Fit(target, HEADS, copied(folder, tmp_path / "own"))
    hidden = mx.random.normal((3, target.config.hidden_size))
    assert all(mx.array_equal(head(hidden), hidden).item() for head in run.drafter.heads)
    assert mx.std(run.trainee.output_rows()).item() > 0


def one_run(target: Decoder, length: int, steps: int) -> Batch:
    """Random neighbours, all of one answer."""
    random = np.random.default_rng(0)
    size = length + steps
    features = random.standard_normal((1, size, 1, target.config.hidden_size))
    return Batch(
        random.integers(target.config.vocab_size, size=(1, size)).astype(np.int32),
        features.astype(np.float16), np.ones((steps, 1, length), np.float32),
    )  # fmt: skip


def test_the_written_heads_say_what_was_trained(
    folder: Path, target: Decoder, tmp_path: Path
) -> None:
    """In decoding too: the scale of the hidden states is folded into the output matrix."""
    run = Fit(target, HEADS, copied(folder, tmp_path / "own"))
    run.trainee.scale = 3.0  # that of a tiny model is close to 1
    run.run(lambda _: None)
    batch = one_run(target, 6, 4)
    inside = [x @ run.trainee.output_rows().T for x in run.trainee.inputs(run._arrays(batch, 0))]
    drafter = load_drafter(run.export(tmp_path / "drafter"), target)
    assert isinstance(drafter, Medusa)
    hidden = final_hidden(target, mx.array(batch.features[0, :6]))
    recorded = logits(drafter, contexts(drafter, target, mx.array(batch.features[0, :6])),
                      mx.array(np.zeros((6, 4), np.int32)))  # fmt: skip
    for t in range(6):
        state = drafter.first(hidden[t : t + 1], 4)
        for k in range(4):
            live, _ = drafter.level(k, mx.array([0]), state)
            np.testing.assert_allclose(live[0], inside[k][t], atol=0.05)
            np.testing.assert_allclose(live[0], recorded[k][t], atol=1e-4)
    heads = {
        "W": [[np.array(b.linear.weight) for b in h.blocks] for h in drafter.heads],
        "b": [[np.array(b.linear.bias) for b in h.blocks] for h in drafter.heads],
        "U": [np.array(drafter.shared.weight)] * 4,
    }
    expected = reference(heads, np.array(hidden[0]))
    np.testing.assert_allclose(expected, np.stack([r[0] for r in recorded]), atol=1e-3)


def test_head_k_learns_the_token_k_plus_one_after_the_root(
    target: Decoder, folder: Path, tmp_path: Path
) -> None:
    """A text that counts: what head k says is fixed by what is read, and differs by head."""
    config = replace(HEADS, positions=9600, draft_vocab_size=0, candidates=V, hard=1.0)
    run = Fit(target, config, copied(folder, tmp_path / "own"))
    hidden = mx.random.normal((8, target.config.hidden_size)).astype(mx.float16)
    tokens = np.arange(12, dtype=np.int32)[None] % 8
    batch = Batch(tokens, np.array(hidden)[tokens][:, :, None], np.ones((4, 1, 8), np.float32))
    for step in range(300):
        outcome = run._update(run._arrays(batch, step), mx.array(0.0))
        mx.eval(run.drafter.state, run.optimizer.state, outcome)
    for k, x in enumerate(run.trainee.inputs(run._arrays(batch, 0))):
        best = mx.argmax(x @ run.trainee.output_rows().T, axis=-1).tolist()
        assert best == tokens[0, k + 1 : k + 9].tolist()


@pytest.mark.bits
def test_interrupted_heads_are_the_same(folder: Path, target: Decoder, tmp_path: Path) -> None:
    whole = run_fit(target, copied(folder, tmp_path / "whole"), HEADS)
    own = copied(folder, tmp_path / "parts")

    def stop(row: dict[str, int]) -> None:
        if row["step"] == 7:
            raise Stop

    with pytest.raises(Stop):
        fit(target, HEADS, own, stop)
    parts = run_fit(target, own, HEADS)
    assert whole.keys() == parts.keys()
    assert all(mx.array_equal(value, parts[name]).item() for name, value in whole.items())


def test_a_warm_start_of_heads(
    folder: Path, target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(medusa, "deviation", lambda hidden: 3.0)
    first = trained(target, folder, tmp_path / "own")
    place = first.export(tmp_path / "drafter")
    batches = [next(first.data.batches(16, 1, 0))]
    warm = replace(HEADS, warm_start=place)
    again = Fit(target, warm, copied(folder, tmp_path / "again"))
    assert again.score(batches)["loss"] == pytest.approx(first.score(batches)["loss"], abs=0.02)
    with pytest.raises(OptionError, match="has heads 4, the configuration 3"):
        Fit(target, replace(warm, rollout=3), copied(folder, tmp_path / "other"))


# Options


def test_every_kind_has_its_trainee_and_options() -> None:
    assert KINDS.keys() == TRAINEES.keys()
    config = defaults("medusa")
    assert (config.rollout, config.num_draft_layers) == (4, 1)
    assert (TrainConfig().rollout, TrainConfig().num_draft_layers) == (3, 2)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, row in KINDS.items() for name in row.lacks]
)
def test_options_that_a_kind_lacks_are_refused_by_name(
    tmp_path: Path, kind: str, name: str
) -> None:
    value = getattr(TrainConfig(), name)
    given = {"out": tmp_path, "kind": kind, name: 64 if value is None else value}
    text = refusal(lambda: folders.settle(given))
    assert text.startswith(f"{name} was given, but a drafter of kind {kind} has none")
    assert "train a redrafter" in text
    assert folders.settle({**given, "kind": "redrafter"})


def test_a_wrong_kind_or_no_block_is_refused(tmp_path: Path) -> None:
    text = refusal(lambda: folders.settle({"out": tmp_path, "kind": "media"}))
    assert text.startswith("kind 'media' is not possible: use redrafter, medusa")
    given = {"out": tmp_path, "kind": "medusa", "num_draft_layers": 0}
    assert "num_draft_layers 0 is not possible" in refusal(lambda: folders.settle(given))


def test_a_folder_remembers_its_kind(tmp_path: Path) -> None:
    config, _ = folders.settle({"out": tmp_path, "kind": "medusa", "positions": 99, "batch": 8})
    file = folders.write(config)
    assert "cell" not in file.read_text()
    assert folders.settle({"out": tmp_path})[0] == config
    assert folders.settle({"out": tmp_path}, file)[0] == config  # its own file is no change
    # Another kind begins with its own defaults; what makes the data stays.
    other, _ = folders.settle({"out": tmp_path, "kind": "redrafter"})
    assert other == TrainConfig(out=tmp_path, batch=8)
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "checkpoint.safetensors").touch()
    text = refusal(lambda: folders.settle({"out": tmp_path, "kind": "redrafter"}))
    assert "kind 'redrafter' was given, but the fit in" in text


def test_the_command_in_the_card_names_the_kind() -> None:
    line = lines.Shown(replace(defaults("medusa"), out=Path("run"))).made_by()
    assert line == "mlx-redrafter train --model smollm2-135m --out run --kind medusa"
    assert "cell" not in lines.Shown(defaults("medusa")).values()


# All stages


@pytest.mark.slow
def test_heads_are_trained_evaluated_and_described(model: Path, tmp_path: Path) -> None:  # noqa: F811
    run = begin(tmp_path / "run", model, kind="medusa", rollout=4)
    stages.answers(run)
    stages.fit(run)
    run.evaluating = replace(run.evaluating, prompts=3, max_tokens=8)
    stages.evaluate(run)
    place = tmp_path / "run" / "drafter"
    found = json.loads((place / "evaluation.json").read_text())
    assert all(len(row["agreement"]) == 4 for row in found["teacher_forced"])
    card = (place / "README.md").read_text()
    for part in (
        "# Medusa heads for",
        "arXiv 2401.10774",
        "--kind medusa",
        "4 Medusa heads",
    ):
        assert part in card, part
    assert "ReDrafter" not in card.replace("mlx-redrafter", "")
