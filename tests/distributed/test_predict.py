"""The model of a step over several machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import build
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.distributed.predict import BANDWIDTH, RISES, Sizes, sizes_of, table

MODELS = {
    "M4 Pro": Sizes(14.5e9, 0.72e9, 64, 5120),
    "M4 Max": Sizes(39.1e9, 0.59e9, 80, 8192),
    "M3 Ultra": Sizes(68.7e9, 0.23e9, 88, 12288),
}


def test_the_table_of_the_documents() -> None:
    """docs/several_machines.md: plain tokens a second, and 8 rows that give 3 tokens."""
    expected = {
        "M4 Pro": [(14.3, 1.36), (16.4, 1.72), (12.6, 1.89), (14.2, 1.36), (22.5, 1.91)],
        "M4 Max": [(11.0, 1.36), (13.0, 1.71), (10.0, 1.87), (10.9, 1.36), (18.3, 1.90)],
        "M3 Ultra": [(9.5, 1.36), (11.5, 1.68), (8.9, 1.83), (9.4, 1.36), (16.5, 1.87)],
    }
    wanted = [
        (1, "one machine"), (2, "tensor, RDMA, default"), (2, "tensor, Thunderbolt"),
        (2, "pipeline, Thunderbolt"), (4, "tensor, RDMA, default"),
    ]  # fmt: skip
    for chip, sizes in MODELS.items():
        rows = table(sizes, BANDWIDTH[chip], [2, 4], RISES["stock 4-bit kernels"])
        found = [
            next(r for r in rows if r.size == size and r.setup.startswith(name))
            for size, name in wanted
        ]
        for row, (plain, gain) in zip(found, expected[chip], strict=True):
            assert row.plain == pytest.approx(plain, abs=0.06)
            assert row.gains[2] == pytest.approx(gain, abs=0.015)


def test_of_experts_only_the_chosen_are_read(tmp_path: Path) -> None:
    build(tmp_path, "mixtral")
    read = sizes_of(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < read.body < 0.9 * (stored - read.head)


def test_it_says_that_it_is_a_prediction(tmp_path: Path) -> None:
    build(tmp_path, "llama")
    line = ["bench", "hosts", "-m", str(tmp_path), "--chip", "100", "--sizes", "2"]
    found = CliRunner().invoke(cli.app, line)
    assert found.exit_code == 0 and found.stdout.count("Predicted, not measured") == len(RISES)
    found = CliRunner().invoke(cli.app, [*line, "--json"])
    assert json.loads(found.stdout)["predicted"] is True
    for more in (["--chip", "x"], ["--chip", "-1"], ["--sizes", "1"], ["--sizes", "x"]):
        found = CliRunner().invoke(cli.app, [*line, *more])
        assert found.exit_code == 1 and found.stderr.startswith("error: --")
