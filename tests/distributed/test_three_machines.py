"""One model over three processes: the same text on all, drafted or not, what it takes, and how all
end when one is lost. All of it on the same three: it is their start that takes the time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import random_drafter
from fake_ssh import Machines, one_error
from tiny_models import V, build

from mlx_redrafter.drafters.loading import save_drafter
from mlx_redrafter.models import load_model

SUPPORT = Path(__file__).parents[1] / "support"
LIMIT, SOON = 300, 15.0  # seconds
LAYERS = {"tensor": 1, "pipeline": 3}

pytestmark = pytest.mark.xdist_group("three machines")


FULL = pytest.param(
    True, marks=pytest.mark.slow, id="full"
)  # compiled, which takes three compilers
ONLY_FULL = pytest.mark.parametrize("found", [FULL], indirect=True)


@pytest.fixture(scope="module", params=[pytest.param(False, id="quick"), FULL])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the first machine has printed, and how all ended. All three check every step that they
    have the same."""
    folder = tmp_path_factory.mktemp("three")
    for kind, layers in LAYERS.items():
        place = folder / kind
        place.mkdir()
        build(
            place, "llama", num_hidden_layers=layers, num_attention_heads=12,
            num_key_value_heads=6, head_dim=8, hidden_size=32, intermediate_size=48,
        )  # fmt: skip
        save_drafter(place / "drafter", random_drafter(load_model(place)))
    machines = Machines(folder)
    program = (SUPPORT / "cluster_program.py", folder, machines.hostfile, folder / "two.pid")
    first = machines.start(*program, *["full"] * request.param, compiled=request.param)
    try:
        out, err = first.communicate(timeout=LIMIT)
    finally:
        first.kill()
    assert out, err
    ends = {"one": (first.returncode, err.splitlines()), "three": machines.ended("three", SOON)}
    return {**json.loads(out), "ends": ends}


@pytest.mark.bits
@pytest.mark.parametrize("split", ["tensor", "unequal", "pipeline"])
def test_drafted_text_is_plain_text(found: dict[str, Any], split: str) -> None:
    all_alike(found, split)


@pytest.mark.bits
@ONLY_FULL
def test_drafted_text_is_plain_text_on_unlike_machines(found: dict[str, Any]) -> None:
    all_alike(found, "unlike")


def all_alike(found: dict[str, Any], split: str) -> None:
    for texts in found[split].values():
        plain = texts["plain"]
        assert len(plain) == 5 and all(0 <= token < V for token in plain)
        assert len(texts) > 1 and all(drafted == plain for drafted in texts.values())


@pytest.mark.bits
def test_sessions_go_on_on_all_machines(found: dict[str, Any]) -> None:
    texts = found["sessions"]
    assert texts["kept"] == texts["afresh"]
    assert texts["forked"] == texts["forked afresh"]
    assert len(texts["one"]) == 1


def test_a_prompt_is_left_on_all_machines(found: dict[str, Any]) -> None:
    assert found["stopped"] == "stopped"


@pytest.mark.bits
@ONLY_FULL
def test_a_grammar_is_read_by_the_first(found: dict[str, Any]) -> None:
    plain, drafted = found["grammar"]
    assert plain == drafted and len(plain) == 4
    assert plain[2] == 8 and not any(token % 2 for token in plain)


@pytest.mark.bits
def test_answers_run_together(found: dict[str, Any]) -> None:
    texts = found["tensor"]
    assert found["batch"] == [texts["greedy"]["plain"][:4], texts["sampled"]["plain"][:3]]


def test_rows_do_not_change_how_often_machines_meet(found: dict[str, Any]) -> None:
    """Seen to fail: sums by all_sum."""
    for name, count in (("", 2), ("unequal ", 2), ("pipeline ", 3)):
        assert found[f"{name}collectives"] == [[count, []], [count, []]]
    assert found.get("unlike more", True)


def test_one_is_killed_and_all_end_with_one_line(found: dict[str, Any]) -> None:
    """Seen to fail: what a wire notices is told to nobody."""
    for name, (code, lines) in found["ends"].items():
        assert code == 1
        assert name != "one" or "two, rank 1 is lost" in one_error(lines)
        one_error(lines)
