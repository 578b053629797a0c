"""`doctor --report`: what a Mac can tell, in two files; a part that breaks is a line in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import write_chat_model
from typer.testing import CliRunner

from mlx_redrafter.api import load
from mlx_redrafter.bench.machine import measure, page, probe, report
from mlx_redrafter.bench.machine.measure import Effort
from mlx_redrafter.cli import doctor
from mlx_redrafter.cli import main as cli
from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation.model_checks import Check
from mlx_redrafter.runtime import clock, metal

QUICK = Effort(sizes=(1, 2), contexts=(16, 10**6), bits=(4, 16), tokens=6, prompts=2, rounds=1)
CHECKS = [Check("versions", "ok", "mlx 1 | 2"), Check("KV cache", "warn", "copied")]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_redrafter.api.parts._compiler_present", lambda: False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # Rows of 64 numbers can be quantised.
    return write_chat_model(tmp_path / "tiny", hidden_size=64, intermediate_size=64, head_dim=64)


@pytest.mark.usefixtures("uncompiled")
def test_a_report_has_every_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "IN_A_ROW", 2)
    said: list[str] = []
    found = report.measured(*load(folder), lambda: CHECKS, QUICK, said.append)
    names = ["compiling", "kernels", "answers", "buffers", "passes, 4 bits", "passes, 16 bits",
             "memory"]  # fmt: skip
    assert list(found["parts"]) == names and len(said) == len(names)
    parts = found["parts"]
    assert not [part for part in parts.values() if "error" in part]
    assert parts["compiling"].keys() == measure.SHAPES.keys()
    assert parts["kernels"]["attention"]["4/2 x 64"]["queries"] == "1-8 vector, 9-16 full"
    assert [row["parted_at"] for row in parts["answers"]] == [None, None]
    times = parts["passes, 4 bits"]["milliseconds"]
    assert times.keys() == {"16", "2046"} and times["16"].keys() == {"1", "2"}
    report.write(found, report.files(tmp_path / "mine"))
    assert json.loads((tmp_path / "mine.json").read_text()) == json.loads(json.dumps(found))
    text = (tmp_path / "mine.md").read_text()
    for line in ("| versions | ok | mlx 1 \\| 2 |", "#### passes, 4 bits", "#### memory"):
        assert line in text.splitlines()


def test_a_part_that_breaks_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("kernel\nlost")

    each = [("compiling", "a", dict), ("kernels", "b", broken), ("memory", "c", lambda: {"x": 1})]
    monkeypatch.setattr(report, "parts", lambda *_: iter(each))
    monkeypatch.setattr(report, "machine", lambda: {"chip": "M9", "mlx_redrafter": "1"})
    target = type("Target", (), {"dtype": "float16"})()
    model: Any = type("M", (), {"name": "m", "target": target, "drafter_folder": None})()
    found = report.measured(model, None, lambda: CHECKS, QUICK, lambda _: None)
    assert found["parts"]["kernels"] == {"error": "RuntimeError: kernel lost"}
    text = page.markdown(found)
    assert "failed: RuntimeError: kernel lost" in text and "x 1" in text and "M9" in text


@pytest.mark.usefixtures("uncompiled")
def test_the_command_writes_what_it_is_told_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "parts", lambda *_: iter([("kernels", "that", lambda: {
        "attention": {}, "products": {"1 to 2": {"M1": "1-16 qmv"}}})]))  # fmt: skip
    monkeypatch.setattr(doctor, "_all", lambda given: iter(CHECKS if given else []))
    line = ["doctor", "-m", str(folder), "--report", str(tmp_path / "mine.md")]
    result = CliRunner().invoke(cli.app, line)
    assert result.exit_code == 0, result.output
    assert "written:" in result.stderr and "KV cache" in result.stdout
    assert (
        not (tmp_path / "mine.json").exists() and "1-16 qmv" in (tmp_path / "mine.md").read_text()
    )
    line[-1] = str(tmp_path / "nowhere" / "mine")
    result = CliRunner().invoke(cli.app, line)
    assert result.exit_code == 1 and "does not exist" in result.stderr


def test_files_are_both_or_the_one_that_is_named(tmp_path: Path) -> None:
    names = {
        "a": ["a.json", "a.md"],
        "a.json": ["a.json"],
        "a.md": ["a.md"],
        "a.b": ["a.b.json", "a.b.md"],
    }
    for given, expected in names.items():
        assert [file.name for file in report.files(tmp_path / given)] == expected
    with pytest.raises(OptionError, match="cannot be written"):
        report.write({}, [tmp_path / ("x" * 400 + ".json")])


def test_whose_buffers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's limit is kept where it is clearly faster, and loading listens to that."""
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    for mlx, kept in ((9.0, metal.MLX), (9.9, metal.OWN), (12.0, metal.OWN)):
        times = {metal.OWN: 10.0, metal.MLX: mlx}
        monkeypatch.setattr(probe, "_alone", lambda _, __, who, t=times: {"milliseconds": t[who]})
        assert probe.both(tmp_path)["kept"] == kept == metal._kept()[str(tmp_path.resolve())]


@pytest.mark.slow
def test_a_process_of_its_own_times_a_step(folder: Path) -> None:
    found = probe._alone(folder, 32, metal.MLX)
    assert found["limit"] == "MLX's own" and found["milliseconds"] > 0
    with pytest.raises(RuntimeError, match="nowhere"):
        probe._alone(folder / "nowhere", 32, metal.MLX)


@pytest.mark.parametrize(
    ("chip", "ultra", "inputs", "expected"),
    [
        (13, False, 2048, "1-13 qmv, 14-16 tile"), (14, False, 14336, "1-5 qmv, 6-16 tile"),
        (16, False, 14336, "1 qmv, 2-12 qmv_wide, 13-16 tile"),
        (17, False, 2048, "1 qmv, 2-16 qmv_wide"), (14, True, 14336, "1-11 qmv, 12-16 tile"),
        (15, True, 4096, "1 qmv, 2-16 qmv_wide"),
    ],
)  # fmt: skip
def test_products_by_mlx_s_rules(chip: int, ultra: bool, inputs: int, expected: str) -> None:
    names = [metal.product_kernel(n, inputs, 2048, chip, ultra) for n in range(1, 17)]
    assert measure._runs(names) == expected


def test_the_built_in_model_is_tested_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX reads its limit when the GPU is first used, and doctor uses it before it loads."""
    done: list[str] = []

    def checks(given: Any) -> Any:
        done.append("checks")
        yield from CHECKS

    monkeypatch.setattr(metal, "prepare", lambda folder: done.append(folder.name))
    monkeypatch.setattr(doctor, "_all", checks)
    given: Any = (None, None)
    assert doctor.examine() == doctor.examine(given=given) == CHECKS
    assert done[0].startswith("smollm2-135m") and done[1:] == ["checks", "checks"]
