"""Trained drafters are found again by the weights of their model."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from datetime import datetime
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from conftest import random_drafter, write_target
from edits import edit_config, edit_weights
from tiny_chat import write_chat_model
from tiny_medusa import K, blocks, heads
from typer.testing import CliRunner

from mlx_redrafter.api import load
from mlx_redrafter.cli import info
from mlx_redrafter.cli import main as cli
from mlx_redrafter.drafters.loading import save_drafter
from mlx_redrafter.drafters.medusa import Medusa
from mlx_redrafter.errors import HubError
from mlx_redrafter.hub import find_drafter, kept
from mlx_redrafter.models import Decoder
from mlx_redrafter.runtime import paths
from mlx_redrafter.runtime.paths import BUILTIN, data_dir, shipped_drafter

BEGAN = datetime(2025, 3, 9, 23, 58, 7)


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_REDRAFTER_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def model(tmp_path: Path, target_folder: Path) -> Path:
    return shutil.copytree(target_folder, tmp_path / "model")


def trained(folder: Path, target: Decoder, live: float | None = None, seed: int = 1) -> Path:
    """The drafter's folder of a run, with an evaluation if it was measured."""
    save_drafter(folder / "drafter", random_drafter(target, seed))
    if live is not None:
        rows = [{"group": g, "tokens_per_step": n} for g, n in (("all", live), ("chat", 9.0))]
        (folder / "drafter" / "evaluation.json").write_text(json.dumps({"live": rows}))
    return folder


def keep(run: Path, model: Path, name: str = "org/name", began: datetime = BEGAN) -> Path:
    return kept.keep(run / "drafter", name, kept.fingerprint(model), run, began)


def test_data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert data_dir() == tmp_path / "data"
    monkeypatch.delenv("MLX_REDRAFTER_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert data_dir() == tmp_path / "xdg" / "mlx-redrafter"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert data_dir() == tmp_path / ".local" / "share" / "mlx-redrafter"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data_dir() == tmp_path / "Library" / "Application Support" / "mlx-redrafter"


def test_the_fingerprint_is_of_the_weights_alone(tmp_path: Path, model: Path) -> None:
    known = kept.fingerprint(model)
    (model / "config.json").write_text("{}")
    weights = mx.load(str(model / "model.safetensors"))
    assert isinstance(weights, dict)
    names = sorted(weights)
    parts = tmp_path / "parts"
    parts.mkdir()
    for i, some in enumerate((names[:5], names[5:])):
        mx.save_safetensors(
            str(parts / f"model-{i}.safetensors"), {name: weights[name] for name in some}
        )
    assert kept.fingerprint(model) == known == kept.fingerprint(parts)
    for change in (
        {names[0]: weights[names[0]] * 1.001},  # a fine-tune
        {names[0]: weights[names[0]].astype(mx.float16)},
        {"more": mx.zeros(1)},
    ):
        mx.save_safetensors(str(model / "model.safetensors"), {**weights, **change})
        assert kept.fingerprint(model) != known


def test_a_kept_drafter_is_found_wherever_the_model_is(
    tmp_path: Path, model: Path, target: Decoder, data: Path
) -> None:
    assert find_drafter("org/name", model) is None
    place = keep(trained(tmp_path / "my run", target), model)
    assert place == data / "drafters" / f"org--name-{kept.fingerprint(model)[:16]}" / (
        "20250309-235807-my--run"
    )
    shutil.rmtree(tmp_path / "my run")  # the run is not needed any more
    assert find_drafter("org/name", model) == place
    moved = model.rename(tmp_path / "moved")
    assert find_drafter(str(moved), moved) == place
    assert find_drafter("other", write_target(tmp_path / "other", seed=8)) is None
    beside = shutil.copytree(place, moved / "drafter")
    assert find_drafter(str(moved), moved) == beside


def test_the_newest_is_found_and_a_run_has_one(
    tmp_path: Path, model: Path, target: Decoder
) -> None:
    first, second = trained(tmp_path / "a", target), trained(tmp_path / "b", target, seed=2)
    early = keep(first, model)
    late = keep(second, model, name="other name", began=datetime(2024, 1, 1))
    assert find_drafter("m", model) == late
    assert kept.origin(late, model).endswith(f"; 1 other for this model, in {late.parent.parent}")
    (first / "drafter" / "evaluation.json").write_text("{}")
    assert keep(first, model) == early == find_drafter("m", model)
    assert (early / "evaluation.json").is_file() and len(kept.all_of(model)) == 2
    assert [p.name for p in early.parent.iterdir()] == [early.name]


def test_what_no_longer_fits_is_left_out_with_a_line(
    tmp_path: Path, model: Path, target: Decoder
) -> None:
    places = [
        keep(trained(tmp_path / name, target), model)
        for name in ("good", "size", "tensor", "short", "text")
    ]
    good, size, tensor, short, text = places
    config = json.loads((size / "config.json").read_text())
    (size / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    weights = mx.load(str(tensor / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.save_safetensors(str(tensor / "model.safetensors"), dict(list(weights.items())[1:]))
    (short / "model.safetensors").write_bytes((short / "model.safetensors").read_bytes()[:-8])
    (text / "config.json").write_text("<html>")
    with pytest.warns(UserWarning) as said:
        assert find_drafter("m", model) == good
    lines = [str(w.message) for w in said]
    for line, place, problem in zip(
        lines, (text, short, tensor, size),
        ("is a web page", "truncated", "lacks", "hidden size 64"), strict=True,
    ):  # fmt: skip
        assert line.startswith("a drafter is left out: ") and problem in line
        assert str(place) in line and "\n" not in line


def test_a_misfit_beside_the_model_does_not_keep_it_from_loading(
    tmp_path: Path, target: Decoder
) -> None:
    model = write_chat_model(tmp_path / "chat")
    trained(model, target)  # for another vocabulary
    with pytest.warns(UserWarning, match="a drafter is left out: .*vocabulary size"):
        loaded, _ = load(str(model))
    assert loaded.drafter is None
    result = CliRunner().invoke(cli.app, ["info", str(model)], env={"COLUMNS": "300"})
    assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
    assert result.stderr.startswith("warning: a drafter is left out: ")


def test_heads_among_the_models_own_tensors_are_its_drafter(tmp_path: Path) -> None:
    """Medusa-2: `--drafter auto` finds them, after what was trained or lies beside the model."""
    model = write_chat_model(tmp_path / "chat")
    assert find_drafter("m", model) is None
    more = blocks(heads(), "medusa_head.{}.{}.linear.{}")
    edit_weights(lambda w: w.update({name: mx.array(value) for name, value in more.items()}))(model)
    edit_config(medusa_num_heads=K)(model)
    loaded, _ = load(str(model))
    assert isinstance(loaded.drafter, Medusa) and loaded.drafter_folder == model
    assert loaded.drafter.levels == K
    facts = info.collect(str(model))["drafter"]
    assert (facts["fits"], facts["origin"]) == (True, "in the model's own files")
    place = keep(trained(tmp_path / "run", loaded.target), model)
    assert find_drafter("m", model) == place
    trained(model, loaded.target)
    assert find_drafter("m", model) == model / "drafter"


def test_a_word_of_heads_without_their_tensors_finds_none(model: Path) -> None:
    """As other programs leave it that convert such a model."""
    edit_config(medusa_num_heads=K)(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_drafter("m", model) is None
    (model / "model.safetensors").write_bytes(b"broken")
    assert find_drafter("m", model) is None


@pytest.mark.parametrize(("live", "wins"), [(None, False), (1.2, False), (2.5, True)])
def test_the_shipped_drafter_gives_way_to_a_better_one(
    tmp_path: Path,
    target: Decoder,
    model: Path,
    live: float | None,
    wins: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paths, "ASSETS", tmp_path / "package" / "assets")
    trained(tmp_path / "shipped", target, 1.9)
    shutil.copytree(tmp_path / "shipped" / "drafter", shipped_drafter())
    place = keep(trained(tmp_path / "run", target, live), model)
    found = find_drafter(BUILTIN, model)
    assert found == (place if wins else shipped_drafter())
    assert kept.origin(shipped_drafter(), model) == "shipped with mlx-redrafter"


def test_a_data_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path,
    model: Path,
    target: Decoder,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data.write_text("a file")
    for place in (data, data / "below", Path("~no-such-user/data")):
        monkeypatch.setenv("MLX_REDRAFTER_DATA", str(place))
        with pytest.raises(HubError, match="the data folder cannot be written") as caught:
            keep(trained(tmp_path / "run", target), model)
        assert "\n" not in str(caught.value)
        assert find_drafter("m", model) is None


def test_info_says_where_a_drafter_came_from(tmp_path: Path, model: Path, target: Decoder) -> None:
    run = trained(tmp_path / "run", target)
    place = keep(run, model)
    facts = info.collect(str(model))["drafter"]
    day = datetime.now().date().isoformat()
    assert facts["folder"] == str(place) and facts["fits"]
    assert facts["origin"] == f"trained on {day} in {run}, kept by train"
    assert info.collect(str(model), str(run / "drafter"))["drafter"]["origin"] == "given"
    shutil.copytree(run / "drafter", model / "drafter")
    result = CliRunner().invoke(cli.app, ["info", str(model)], env={"COLUMNS": "300"})
    rows = [" ".join(row.split()) for row in result.stdout.splitlines()]
    assert "from beside the model" in rows
