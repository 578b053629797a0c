"""The memory of training, and the estimate of its time."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import pytest  # isort: skip
import tiny_chat
from tiny_chat import SMALL, begin, lines_of, refusal
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.models import DecoderConfig
from mlx_redrafter.training import estimate, kinds, memory, stages
from mlx_redrafter.training.config import Evaluating, TrainConfig, from_mapping

model = tiny_chat.model


def llama_3b() -> DecoderConfig:
    """Llama 3.2 3B: 28 layers of 3072, 8 key heads of 128, 128256 tokens."""
    return DecoderConfig(
        "llama", hidden_size=3072, intermediate_size=8192, vocab_size=128256, num_layers=28,
        num_heads=24, num_kv_heads=8, head_dim=128, max_positions=131072, norm_eps=1e-5,
        attention_scale=1.0, ropes=(), layer_ropes=(), layer_windows=(),
    )  # fmt: skip


def reckon(config: TrainConfig) -> tuple[dict[str, int], int]:
    """Memory by part of a 4-bit 3B model, and the batch that fits in 16 GB."""
    target = llama_3b()
    shape = kinds.of(config).shape_of(config, target)
    weights = memory.target_parameters(target) * 4.5 / 8
    parts = memory.memory(config, target, shape, weights=weights)
    room = memory.USABLE * 16 * 2**30
    return parts, memory.fitting_batch(config, target, shape, room, weights=weights)


def test_a_3b_model_in_4_bits_fits_in_16_gb() -> None:
    config = TrainConfig()
    parts, batch = reckon(config)
    assert memory.target_parameters(llama_3b()) == 3_212_574_720
    assert parts["target"] == round(3_212_574_720 * 4.5 / 8)
    # 192 prompts of 160 tokens take more than 64 answers of 160 + 256; 28 layers, one of them
    # twice, keys and values, 8 heads of 128, 2 bytes
    assert parts["keys and values"] == 192 * 160 * 29 * 2 * 8 * 128 * 2
    assert parts["gradients and Adam"] == 3 * parts["drafter"]
    assert memory.peak(parts) < memory.USABLE * 16 * 2**30
    assert batch == config.batch


def test_one_sequence_at_a_time_needs_the_memory_of_one() -> None:
    config, target = TrainConfig(max_tokens=4096), llama_3b()
    shape, room = kinds.of(config).shape_of(config, target), memory.USABLE * 16 * 2**30
    alone = memory.memory(config, target, shape, weights=0, together=False)
    assert alone["keys and values"] == (160 + 4096) * 29 * 2 * 8 * 128 * 2
    asked = memory.fitting_batch(config, target, shape, room, weights=0, together=False)
    assert asked == config.batch


def test_a_batch_that_does_not_fit_is_lowered() -> None:
    config = TrainConfig(max_tokens=4096)
    parts, batch = reckon(config)
    room = memory.USABLE * 16 * 2**30
    assert memory.peak(parts) > room and 1 < batch < config.batch
    writing = [
        memory.of_stage(reckon(replace(config, batch=n))[0], memory.WRITING)
        for n in (batch, batch + 1)
    ]
    assert writing[0] <= room < writing[1]


def test_the_drafter_is_counted_to_the_weight(model: Path, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", model)
    from mlx_redrafter.drafters.recurrent import ReDrafter
    from mlx_redrafter.models.weights import parameters

    count = sum(p.size for p in parameters(ReDrafter(run.trainee.shape)).values())
    parts = memory.memory(run.config, run.target.config, run.trainee.shape, weights=0)
    assert parts["drafter"] == 4 * count


def test_a_drafter_that_is_too_large_is_said(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apple = TrainConfig(
        cell="elman", initial_state="zero", context_layers="", exit_dim=6144, draft_vocab_size=0
    )
    parts, _ = reckon(apple)
    assert memory.of_stage(parts, memory.FITTING) > memory.USABLE * 16 * 2**30
    begin(tmp_path / "fits", model)
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(memory, "usable_bytes", lambda: 1.0)
    begin(tmp_path / "run", model)
    assert "lower draft_vocab_size or exit_dim" in capsys.readouterr().err


@pytest.mark.slow
def test_a_lowered_batch_is_said_and_kept(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "fitting_batch", lambda *_, **__: 3)
    out = tmp_path / "run"
    run = begin(out, model)
    assert run.config.batch == 3
    assert "batch lowered from 4 to 3" in capsys.readouterr().err
    stages.prompts(run)
    assert begin(out, model).config.batch == 3  # asked for 4 again: as then
    monkeypatch.undo()
    assert "batch 4 was given" in refusal(lambda: begin(out, model))


@pytest.mark.slow
def test_estimate_measures_every_stage_and_writes_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_SECONDS", 0.02)
    out = tmp_path / "run"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    options += ["--eval-prompts", "3", "--eval-tokens", "8"]
    arguments = ["train", "--estimate", "-m", str(model), "-o", str(out), *options]
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.stderr
    shown = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert shown[:6] == ["stage", "prompts", "answers", "fit", "evaluate", "all"]
    assert "3 prompts of 8 tokens" in result.stdout and not out.exists()
    config = from_mapping({**SMALL, "model": str(model), "out": str(out)}, "test")
    found = estimate.measure(config)
    assert all(stage.seconds > 0 for stage in found.stages) and found.batch == SMALL["batch"]


class Clock:
    """A machine where reading prompts takes 10 s, now and then more or less, and a step 0.1 s."""

    target = SimpleNamespace(config=SimpleNamespace(vocab_size=100))
    together = True

    def __init__(self, *_: Any, waver: tuple[float, ...] = (0.0, 1.0, -1.0), step: float = 0.1):
        self.now, self.step, self.waver = 0.0, step, itertools.cycle(waver)

    def perf_counter(self) -> float:
        return self.now

    def write(self, requests: Any, tokens: int, ends: Any) -> None:
        self.now += 10 + next(self.waver) + self.step * (tokens - 1)


@pytest.mark.parametrize("most", [2, 32, 256])
@pytest.mark.parametrize("step", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("waver", [(0.0,), (0.0, 1.0, -1.0), (3.0, 0.5, 0.0), (2.0, -2.0)])
def test_a_step_is_timed_without_the_reading_before_it(
    monkeypatch: pytest.MonkeyPatch, waver: tuple[float, ...], step: float, most: int
) -> None:
    clock: Any = Clock(waver=waver, step=step)
    monkeypatch.setattr(estimate, "time", clock)
    found = estimate._step_seconds(clock, [], most)
    # As many timings as there may be of so few steps cannot tell more of them.
    wrong = 1.5 * (max(waver) - min(waver)) / (most - 1)
    assert found == pytest.approx(step, rel=0.15, abs=0.01 if most > 100 else max(wrong, 0.01))


def test_evaluation_and_writing_are_measured_so(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, target = Clock(), cast(Any, Clock.target)
    monkeypatch.setattr(estimate, "time", clock)
    monkeypatch.setattr(estimate, "over", lambda *_: clock)
    config = TrainConfig(max_tokens=1000)
    assert estimate._decoding(target, config) == pytest.approx(0.1, rel=0.1)
    assert estimate._writing(cast(Any, clock), config) == pytest.approx(640, rel=0.1)
    clock.together = False  # a token a step, whatever the batch
    assert estimate._writing(cast(Any, clock), config) == pytest.approx(10, rel=0.1)


def rows(config: TrainConfig, **evaluating: int) -> dict[str, estimate.Stage]:
    speeds = estimate.Speeds(
        writing=100.0, reading=1000.0, fitting=2.0, decoding=0.1, checkpoint=10
    )
    parts = dict.fromkeys((*memory.WRITING, *memory.FITTING, "target", "drafter"), 1)
    stages = estimate._stages(config, Evaluating(**evaluating), parts, 6, speeds)
    return {stage.name: stage for stage in stages}


def test_the_estimate_is_of_the_command_that_is_given(tmp_path: Path) -> None:
    config = TrainConfig(
        out=tmp_path / "run", answer_tokens=10_000, positions=5000, batch_positions=1000
    )
    usual, small = rows(config), rows(config, prompts=3, max_tokens=8)
    assert small["evaluate"].detail == "3 prompts of 8 tokens, 100 ms per step"
    assert small["evaluate"].seconds == pytest.approx((3 * 4 / 1.6 + 3) * 2 * 8 * 0.1)
    assert usual["evaluate"].seconds == pytest.approx(
        (92 * 3 / 1.6 + 24 / 1.6 + 24) * 2 * 128 * 0.1
    )
    assert usual["answers"].seconds == pytest.approx(1.15 * 100)
    assert usual["fit"].seconds == pytest.approx(5 * 2)
    file = tmp_path / "old.jsonl"
    file.write_text(lines_of(*[{"prompt": [1], "answer": [2] * 1000}] * 4))
    some = rows(replace(config, answers=file))
    assert some["answers"].seconds == pytest.approx(0.6 * usual["answers"].seconds)
    assert some["prompts"].seconds == pytest.approx(0.6 * usual["prompts"].seconds)
    assert some["fit"].seconds == pytest.approx(5 * 2 + 4000 / 1000)  # their features are computed
    assert rows(replace(config, answers=file, answer_tokens=1000))["answers"].seconds == 0
    (tmp_path / "run" / "answers").mkdir(parents=True)
    shutil.copy(file, tmp_path / "run" / "answers" / "00000.jsonl")  # a run that goes on
    assert rows(config)["answers"].seconds == pytest.approx(0.6 * usual["answers"].seconds)
    assert rows(config)["fit"].seconds == usual["fit"].seconds
