"""What a GPU is asked about the kernels, what is kept of it, and what a GPU that cannot gives."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_redrafter.kernels import probe, products, verdicts
from mlx_redrafter.kernels.products import Order, Shape
from mlx_redrafter.kernels.source import Launch
from mlx_redrafter.kernels.verdicts import Verdict

SHAPE = Shape(48, 64, 4, 32, mx.float16)
OTHER = Shape(64, 512, 8, 128, mx.bfloat16)
FOUND = Verdict({5: 1.2, 8: 1.5}, Order(2, False), True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The command lines of probes, which know of one shape only and then end badly."""
    seen: list[list[str]] = []

    def ran(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        seen.append(command[3:])
        known = {"name": verdicts.named(SHAPE), **FOUND.as_dict()}
        lines = "a warning\n" + json.dumps(known) + "\n" if verdicts.named(SHAPE) in command else ""
        return subprocess.CompletedProcess(command, -6, lines, "command buffer\nerror")

    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path))
    monkeypatch.setattr(verdicts, "metal", lambda: True)
    monkeypatch.setattr(subprocess, "run", ran)
    return seen


def test_a_shape_is_asked_about_once(asked: list[list[str]]) -> None:
    said: list[str] = []
    wanted = [SHAPE, Shape(48, 64, 6, 32, mx.float16), SHAPE]
    assert verdicts.verdicts(wanted, said.append) == {SHAPE: FOUND}
    assert verdicts.verdicts([SHAPE], said.append) == {SHAPE: FOUND}
    assert asked == [["48x64-4-32-float16"]] and len(said) == 1
    found = verdicts.verdicts([SHAPE, OTHER], said.append)
    assert found[SHAPE] == FOUND and found[OTHER].rows() == frozenset()
    assert found[OTHER].error == "it ended with -6: command buffer error"
    assert asked[1:] == [["64x512-8-128-bfloat16"]]
    verdicts.verdicts([OTHER], said.append)
    assert len(asked) == 2, "what ended badly is not tried again"
    verdicts.found([verdicts.named(SHAPE)], verdicts.PROBE, said.append, again=True)
    assert len(asked) == 3


def test_another_system_or_text_is_another_machine(
    asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts.verdicts([SHAPE], lambda _: None)
    monkeypatch.setattr("platform.mac_ver", lambda: ("27.1", ("", "", ""), ""))
    verdicts.verdicts([SHAPE], lambda _: None)
    monkeypatch.setattr(verdicts, "digest", lambda *_: "another")
    verdicts.verdicts([SHAPE], lambda _: None)
    assert len(asked) == 3


def test_spoilt_files_are_asked_again(asked: list[list[str]], tmp_path: Path) -> None:
    verdicts.verdicts([SHAPE], lambda _: None)
    (file,) = (tmp_path / "costs").iterdir()
    stored = json.loads(file.read_text())
    for broken in ("", "[]", json.dumps({**stored, "shapes": {"48x64-4-32-float16": 3}})):
        file.write_text(broken)
        assert verdicts.verdicts([SHAPE], lambda _: None) == {SHAPE: FOUND}
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("gains", "rows"),
    [
        ({}, []),
        ({5: 1.0, 6: 1.2, 8: 1.0, 9: 1.2, 12: 1.0, 16: 1.2}, [6, 7, 9, 10, 11, 16]),
        ({5: 2.0, 6: 2.0, 8: 2.0, 9: 2.0, 12: 2.0, 16: 2.0}, [*range(5, 17)]),
    ],
)
def test_rows_that_gain(gains: dict[int, float], rows: list[int]) -> None:
    assert sorted(Verdict(gains).rows()) == rows


def test_possible_products() -> None:
    good = Shape(64, 64, 4, 64, mx.float16)
    assert products.possible(good) and products.possible(good._replace(dtype=mx.bfloat16))
    for change in (
        {"bits": 6}, {"group": 16}, {"inputs": 96}, {"dtype": mx.float32}, {"outputs": 7}
    ):  # fmt: skip
        assert not products.possible(good._replace(**change)), change


def test_without_metal_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "metal", lambda: False)
    assert verdicts.verdicts([SHAPE], pytest.fail) == {}


class TestProbe:
    """On a CPU, with MLX's own product where a kernel would run."""

    @staticmethod
    def run(launch: Launch) -> list[mx.array]:
        x, w, scales, biases = launch.inputs
        group = x.shape[1] // scales.shape[1]
        rows = [x[i : i + 1] for i in range(x.shape[0])]
        bits = launch.constants["BITS"]
        return [mx.concatenate([mx.quantized_matmul(r, w, scales, biases, True, group, bits)
                                for r in rows])]  # fmt: skip

    def test_right_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Launch, "run", self.run)
        monkeypatch.setattr(probe, "ROWS", (5, 9))
        monkeypatch.setattr(probe, "_BYTES", 4096)
        found = probe.examined(SHAPE)
        assert (found.error, found.order, found.single) == ("", Order(1, True), True)
        assert list(found.gains) == [5, 9] and min(found.gains.values()) > 0

    @pytest.mark.parametrize("wrong", ["a row", "all", "not a number"])
    def test_wrong_ones(self, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
        def run(launch: Launch) -> list[mx.array]:
            (y,) = self.run(launch)
            if wrong == "a row":
                return [mx.concatenate([y[1:], y[:1]])]
            return [y * (1.05 if wrong == "all" else mx.nan)]

        monkeypatch.setattr(Launch, "run", run)
        assert probe.examined(SHAPE) == Verdict()

    def test_another_order_than_mlx(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows have their own bits, but not those of MLX's single row."""
        monkeypatch.setattr(probe, "gain", lambda *_: 1.0)
        monkeypatch.setattr(Launch, "run", lambda launch: [y * 1.001 for y in self.run(launch)])
        found = probe.examined(SHAPE)
        assert (found.order, found.single) == (Order(1, True), False)

    def test_rows_that_depend_on_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probe, "gain", lambda *_: 1.0)

        def run(launch: Launch) -> list[mx.array]:
            return [y * (1.001 if y.shape[0] == 2 else 1) for y in self.run(launch)]

        monkeypatch.setattr(Launch, "run", run)
        assert probe.examined(SHAPE).order is None

    def test_what_does_not_compile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = probe.examined(SHAPE)
        if not mx.metal.is_available():
            assert "No Metal back-end" in found.error
