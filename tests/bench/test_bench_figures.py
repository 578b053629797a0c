"""Figures that the bench makes of timings, and divergences, on values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import hidden_states, prompt_of, random_drafter

from mlx_redrafter.api import Model
from mlx_redrafter.bench.speed import divergence, summary, ways
from mlx_redrafter.models import Decoder
from mlx_redrafter.tree.shape import TreeShape


def timing(way: str, prompt: int, turn: int, speed: float, **more: Any) -> dict[str, Any]:
    """100 timed tokens at so many a second, one token per step."""
    facts = {
        "shape": None, "temp": 0.0, "group": ("chat", "code")[prompt % 2], "round": 0, "nodes": 1.0,
        "tokens": 100, "steps": 100, "histogram": {"0": 101}, "same": True,
    }  # fmt: skip
    return {**facts, "way": way, "prompt": prompt, "turn": turn, "seconds": 100 / speed, **more}


def chain(prompt: int, turn: int, speed: float, **more: Any) -> dict[str, Any]:
    """A chain of 3 with 2 tokens per step."""
    facts = {"steps": 50, "nodes": 4.0, "histogram": {"0": 26, "1": 10, "3": 15}}
    shape = {"width": 1, "depth": 3, "nodes": 4, "lookup": 0}
    return timing("chain", prompt, turn, speed, **{**facts, "shape": shape, **more})


def passes(prompt: int, **seconds: float) -> list[dict[str, Any]]:
    facts = {"turn": 0, "prompt": prompt, "capacity": 128}
    return [{**facts, "nodes": int(n[1:]), "seconds": s} for n, s in seconds.items()]


def test_ratios_are_taken_within_a_turn_and_medians_over_prompts() -> None:
    rows = [
        timing("plain", 0, 0, 10), timing("mlx_lm", 0, 0, 8), chain(0, 0, 15),
        timing("plain", 0, 1, 20), timing("mlx_lm", 0, 1, 10), chain(0, 1, 34, same=False),
        timing("plain", 1, 2, 5), timing("mlx_lm", 1, 2, 5), chain(1, 2, 4),
    ]  # fmt: skip
    found = {
        (r["way"], r["group"]): r
        for r in summary.summarise(rows, passes(0, n1=1.0, n4=1.5) + passes(1, n1=1.0, n4=1.5))
    }
    row = found["chain", "all"]
    assert (row["prompts"], row["answers"]) == (2, 3)
    assert row["tokens_per_second"] == pytest.approx(15)
    assert row["lowest"] == pytest.approx(0.8)  # prompt 1
    assert row["highest"] == pytest.approx(1.6)  # prompt 0: median of 1.5 and 1.7
    assert row["times_plain"] == pytest.approx(1.2)
    assert row["worst_decile"] == pytest.approx(0.88)
    assert row["times_mlx_lm"] == pytest.approx((2.6375 + 0.8) / 2)
    assert row["tokens_per_step"] == 2
    assert row["same"] == pytest.approx(2 / 3)
    assert row["per_depth"] == pytest.approx([25 / 51, 15 / 51, 15 / 51])
    # 2 tokens per step at 1.5 times the cost allow 1.333 times plain.
    assert row["efficiency"] == pytest.approx(np.median([1.6 / (2 / 1.5), 0.8 / (2 / 1.5)]))
    assert found["chain", "code"]["times_plain"] == pytest.approx(0.8)
    assert found["plain", "all"]["efficiency"] is None


def test_a_mean_number_of_nodes_costs_what_lies_between() -> None:
    rows = [timing("plain", 0, 0, 10), chain(0, 0, 15, nodes=6.0)]
    found = summary.summarise(rows, passes(0, n1=1.0, n4=2.0, n8=4.0))
    assert found[2]["efficiency"] == pytest.approx(1.5 / (2 / 3.0))


def test_the_cost_curve_is_of_medians_in_rising_order() -> None:
    rows = passes(0, n8=3.0, n1=1.0) + passes(1, n8=5.0, n1=9.0) + passes(2, n8=4.0, n1=2.0)
    assert list(summary.cost_curve(rows).items()) == [(1, 2.0), (8, 4.0)]


@pytest.fixture(scope="module")
def model(target: Decoder, target_folder: Any) -> Model:
    drafter = random_drafter(target)
    return Model.of("tiny", target_folder, target, drafter, compiled=False)


def other(way: ways.Way, at: int, token: int) -> ways.Way:
    """A way that takes another token at one place."""

    def decode(ids: list[int], temp: float) -> ways.Answer:
        answer = way.decode(ids, temp)
        tokens = list(answer.tokens)
        tokens[at] = token
        return replace(answer, tokens=tokens)

    return ways.Way("wrong", decode, way.shapes)


def test_float32_does_not_diverge(model: Model) -> None:
    usual = ways.ours(model, TreeShape(3, 4, 8), 20, 0)
    prompts = [("chat", prompt_of(n, seed=n)) for n in (1, 6, 11)]
    found = divergence.summarise(list(divergence.compare(model, prompts, [usual], 20)))
    expected = {"way": str(usual.shapes[0]), "answers": 3, "tokens": 60, "diverged": 0, "bugs": 0}
    assert expected.items() <= found[0].items() and found[0]["per_hundred"] == 0


@pytest.mark.parametrize("at", [0, 9])
def test_a_wrong_token_is_found_measured_and_called_a_bug(model: Model, at: int) -> None:
    prompt, usual = prompt_of(8, seed=2), ways.ours(model, TreeShape.chain(3), 16, 0)
    answer = usual.decode(prompt, 0.0).tokens
    hidden = mx.array(hidden_states(model.target, prompt + answer[:at])[-1:])
    logits = np.array(model.target.logits(hidden))[0]
    order = np.argsort(-logits)
    assert order[0] == answer[at]
    wrong = other(usual, at, int(order[4]))
    (compared,) = divergence.compare(model, [("chat", prompt)], [wrong], 16)
    case = compared.case
    assert case is not None and case.bug and case.as_dict()["bug"] is True
    assert (case.position, case.plain_token, case.drafted_token) == (at, answer[at], order[4])
    assert case.margin == pytest.approx(logits[order[0]] - logits[order[1]], abs=1e-4)
    assert case.deficit == pytest.approx(logits[order[0]] - logits[order[4]], abs=1e-4)
    assert case.limit == pytest.approx(1e-4 * np.abs(logits).max())
    row = divergence.summarise([compared])[0]
    assert (row["diverged"], row["per_hundred"], row["bugs"]) == (1, 100, 1)


def test_a_near_tie_is_rounding_and_nan_is_a_bug() -> None:
    case = divergence.Case(0, "chat", "w", 3, 1, 2, margin=0.1, deficit=0.1, limit=0.5)
    assert not case.bug
    assert replace(case, deficit=0.6).bug
    assert replace(case, deficit=math.nan).bug
