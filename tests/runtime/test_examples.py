"""The examples run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_train_tiny(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("train_tiny", EXAMPLES / "train_tiny.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    untrained, trained = example.main(tmp_path)
    assert untrained < 1.5
    assert trained > untrained + 1
