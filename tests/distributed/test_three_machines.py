"""One model over three processes: the same text on all, drafted or not, and what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import random_drafter
from tiny_models import V, build

from mlx_redrafter.drafters.loading import save_drafter
from mlx_redrafter.models import load_model

SUPPORT = Path(__file__).parents[1] / "support"
LIMIT = 300
LAYERS = {"tensor": 1, "pipeline": 3}

pytestmark = pytest.mark.xdist_group("three machines")


COMPILED = pytest.param({}, marks=pytest.mark.slow, id="compiled")
UNCOMPILED = pytest.param({"MLX_DISABLE_COMPILE": "1"}, id="uncompiled")  # three compilers less


@pytest.fixture(scope="module", params=[UNCOMPILED, COMPILED])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the first machine has printed. All three check every step that they have the same."""
    folder = tmp_path_factory.mktemp("three")
    for kind, layers in LAYERS.items():
        place = folder / kind
        place.mkdir()
        build(
            place, "llama", num_hidden_layers=layers, num_attention_heads=12,
            num_key_value_heads=6, head_dim=8, hidden_size=32, intermediate_size=48,
        )  # fmt: skip
        save_drafter(place / "drafter", random_drafter(load_model(place)))
    out = subprocess.run(
        [sys.executable, SUPPORT / "cluster_program.py", folder], capture_output=True, text=True,
        timeout=LIMIT, env={**os.environ, "OMP_NUM_THREADS": "1", **request.param}, check=False,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    return json.loads(out.stdout)


@pytest.mark.bits
@pytest.mark.parametrize("split", ["tensor", "unequal", "pipeline", "unlike"])
def test_drafted_text_is_plain_text(found: dict[str, Any], split: str) -> None:
    for texts in found[split].values():
        plain = texts.pop("plain")
        assert len(plain) == 5 and all(0 <= token < V for token in plain)
        assert texts and all(drafted == plain for drafted in texts.values())


@pytest.mark.bits
def test_sessions_go_on_on_all_machines(found: dict[str, Any]) -> None:
    texts = found["sessions"]
    assert texts["kept"] == texts["afresh"]
    assert texts["forked"] == texts["forked afresh"]
    assert len(texts["one"]) == 1


def test_a_prompt_is_left_on_all_machines(found: dict[str, Any]) -> None:
    assert found["stopped"] == "stopped"


@pytest.mark.bits
def test_a_grammar_is_read_by_the_first(found: dict[str, Any]) -> None:
    plain, drafted = found["grammar"]
    assert plain == drafted and len(plain) == 4
    assert plain[2] == 8 and not any(token % 2 for token in plain)


@pytest.mark.bits
def test_answers_run_together(found: dict[str, Any]) -> None:
    assert found["batch"] == found["batch alone"]


def test_rows_do_not_change_how_often_machines_meet(found: dict[str, Any]) -> None:
    """Seen to fail: sums by all_sum."""
    for name, count in (("", 2), ("unequal ", 2), ("pipeline ", 3)):
        assert found[f"{name}collectives"] == [[count, []], [count, []]]
    assert found["unlike more"]
