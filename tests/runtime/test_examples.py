"""The examples run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import write_chat_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def example_of(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[name] = example  # dataclasses look there
    spec.loader.exec_module(example)
    return example


def test_train_tiny(tmp_path: Path) -> None:
    example = example_of("train_tiny")
    untrained, trained = example.main(tmp_path)
    assert untrained < 1.5
    assert trained > untrained + 1


@pytest.mark.slow
def test_soak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some seconds with a tiny model: every line of the verdict holds."""
    model = write_chat_model(tmp_path / "tiny", max_position_embeddings=8000)
    line = ["soak", "-m", str(model), "--minutes", "0.15", "--every", "2", "--clients", "4"]
    monkeypatch.setattr(sys, "argv", line)
    assert example_of("soak").main() == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert said.count("\nok  ") == 8 and "BAD" not in said
