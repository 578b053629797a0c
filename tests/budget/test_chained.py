"""Passes are timed as they run: on a GPU several launched in a row, of which one is awaited."""

from __future__ import annotations

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from conftest import engine_of, random_drafter

from mlx_redrafter.bench.counts.graph import traced
from mlx_redrafter.bench.counts.host import watched
from mlx_redrafter.budget import costs
from mlx_redrafter.models import Decoder
from mlx_redrafter.runtime import clock
from mlx_redrafter.tree.shape import TreeShape


@pytest.mark.parametrize(("gpu", "times"), [(False, 1), (True, clock.IN_A_ROW)])
def test_one_wait_for_passes_that_need_each_other(
    gpu: bool, times: int, target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails where a pass could begin before the one in front of it ended, or is awaited."""
    monkeypatch.setattr(clock, "fused_kernels", lambda: gpu)
    engine, same = engine_of(target, random_drafter(target), compiled=False), lambda f: f
    shape = TreeShape(2, 2, 5, lookup=2)
    for run in (
        costs.timed_pass(target, 3, 16, same),
        costs._draft_levels(target, engine.drafters, 2, 2, same),
        costs._whole_step(target, engine.drafters, shape, engine.step_function, []),
    ):
        with watched() as log:
            run()
        assert [name for name in log if name in ("eval", "async_eval")] == [
            *["async_eval"] * (times - 1), "eval",
        ]  # fmt: skip


def test_a_pass_is_a_share_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "fused_kernels", lambda: True)
    monkeypatch.setattr(clock, "fastest", lambda runs, rounds, warm: dict.fromkeys(runs, 8.0))
    assert clock.fastest_pass({"a": lambda: None}, 1) == {"a": 8.0 / clock.IN_A_ROW}


def test_what_comes_after_needs_what_was_before() -> None:
    def behind(x: mx.array, y: mx.array) -> list[mx.array]:
        return [costs.after(x, [(y * 2, 5)])]

    x = mx.array([1, 2])
    assert behind(x, x)[0].tolist() == [1, 2]
    assert "Multiply" in [primitive.kind for primitive in traced(behind, x, x)]


def test_more_sizes_are_measured_on_a_gpu(target: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose products have steps that a CPU's lack, and may be flat behind a steep beginning."""
    engine = engine_of(target, None, compiled=False)
    monkeypatch.setattr(clock, "fastest", lambda runs, *_, **__: dict.fromkeys(runs, 1.0))
    monkeypatch.setattr(costs, "fused_kernels", lambda: True)
    found = costs.measure(target, (), engine.step_function, compiled=False)
    assert tuple(found.verify) == costs.NODES_ON_GPU and {10, 13} <= found.verify.keys()
