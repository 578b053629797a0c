"""How many launches MLX is told to put into a command buffer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_redrafter.runtime import metal

GB = 10**9


@pytest.mark.parametrize(
    ("layers", "weights", "ops"),
    [
        (30, GB // 10, 25), (28, GB // 2, 24), (16, GB, 13), (36, 2 * GB, 30), (48, 2 * GB, 40),
        (4, GB // 10, 8), (64, GB, None), (32, 5 * GB, None),
    ],
)  # fmt: skip
def test_a_step_has_enough_buffers(layers: int, weights: int, ops: int | None) -> None:
    """SmolLM2-135M, Qwen3-0.6B, Llama-3.2-1B, Qwen3-4B, ... Llama-3.1-8B in 4 bits."""
    assert metal.ops_per_buffer(layers, weights) == ops
    if ops is not None and ops > 8:
        assert layers * metal.LAUNCHES / ops >= metal.BUFFERS


@pytest.mark.parametrize("config", [{"num_hidden_layers": 30},
                                    {"text_config": {"num_hidden_layers": 30}}])  # fmt: skip
def test_the_limit_is_set_on_a_mac_alone(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never over what the user has set, or by a folder that is no model's."""
    monkeypatch.setenv(metal.OPS, "1")  # so that it is put back
    monkeypatch.delenv(metal.OPS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for platform, expected in (("linux", None), ("darwin", "25")):
        monkeypatch.setattr(sys, "platform", platform)
        metal.prepare(tmp_path)
        assert os.environ.get(metal.OPS) == expected
    monkeypatch.setenv(metal.OPS, "100")
    metal.prepare(tmp_path)
    assert os.environ[metal.OPS] == "100"
    monkeypatch.delenv(metal.OPS)
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "cache"))
    metal.keep(tmp_path, metal.MLX)
    metal.prepare(tmp_path)
    assert metal.OPS not in os.environ, "MLX's own was measured to be better"
    metal.keep(tmp_path, metal.OWN)
    metal._file().write_text("[")
    for text in ("{}", "[]", "{"):
        (tmp_path / "config.json").write_text(text)
        metal.prepare(tmp_path)
    metal.prepare(tmp_path / "nowhere")
    assert metal.OPS not in os.environ
