"""The memory of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import pytest  # isort: skip
import tiny_chat
from tiny_chat import begin, refusal

from mlx_redrafter.models import DecoderConfig
from mlx_redrafter.training import kinds, memory, stages
from mlx_redrafter.training.config import TrainConfig

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
    # Weights and both moments, old and new, gradients and clipped ones.
    assert parts["Adam"] + parts["update"] == 7 * parts["drafter"]
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
