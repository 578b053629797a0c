"""Graphs have a budget: a server that runs for weeks traces for ever new sizes."""

from __future__ import annotations

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
from collections.abc import Callable
from typing import Any

from conftest import engine_of, plainly, prompt_of, run

from mlx_redrafter.decoding.graphs import Graphs
from mlx_redrafter.models import Decoder
from mlx_redrafter.tree.shape import TreeShape


def test_those_used_longest_ago_are_let_go() -> None:
    graphs, made = Graphs(most=4), list[str]()

    def use(key: str, size: int) -> None:
        def make(on_trace: Callable[[], None]) -> Any:
            made.append(key)

            def double(x: mx.array) -> mx.array:
                on_trace()
                return x + x

            return mx.compile(double)

        mx.eval(graphs.get(key, make)(mx.zeros((size,))))

    for key, size in (("a", 1), ("b", 1), ("a", 1), ("a", 2), ("c", 1)):
        use(key, size)
    assert made == ["a", "b", "c"] and len(graphs) == 3
    use("c", 2)  # the fifth trace
    use("c", 2)
    assert len(graphs) == 2
    use("a", 1)
    assert made == ["a", "b", "c"], "what was used last is there"
    use("b", 1)
    assert made == ["a", "b", "c", "b"]


def test_a_text_does_not_depend_on_them(target: Decoder) -> None:
    engine, prompt = engine_of(target, None), prompt_of(6)
    engine._graphs = Graphs(most=1)
    shapes = [TreeShape(1, 0, 4, lookup=3), TreeShape(1, 0, 3, lookup=2)]
    for shape in shapes * 2:
        assert run(engine, prompt, None, shape, 12) == plainly(target, prompt, 12)
        assert len(engine._graphs) <= 2
    assert engine.traces >= 4
