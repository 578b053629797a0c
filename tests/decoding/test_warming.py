"""What a GPU has to compile is met before the answer begins, and while the prompt is read."""

from __future__ import annotations

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from conftest import SHAPES, asked, engine_of, prompt_of, random_drafter, run

from mlx_redrafter.bench.counts.host import watched
from mlx_redrafter.decoding import warming
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import Decoder
from mlx_redrafter.tree.shape import TreeShape

OFFERED = (TreeShape.plain(), SHAPES["chain"], SHAPES["beam-and-lookup"])


class Offers:
    """Plain decoding, though others were on offer."""

    shapes = OFFERED

    def choose(self, position: int) -> TreeShape:
        return self.shapes[0]

    def record(self, *_: object) -> None: ...


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


def answer(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[list[int], int]:
    """Its tokens, and the steps that were traced before the first of them."""
    before, request = engine.traces, asked(prompt, params, Offers(), 12)
    steps = engine.generate(request)
    first = next(steps).tokens
    traced = engine.traces - before
    return first + [token for step in steps for token in step.tokens], traced


@pytest.mark.usefixtures("on_gpu")
def test_every_shape_is_met_once_before_the_answer(target: Decoder) -> None:
    """Uncompiled, a step is traced whenever it runs: the first one and the one ahead too."""
    engine = engine_of(target, random_drafter(target), compiled=False)
    params, prompt = SamplingParams(temp=0.8, top_p=0.9, seed=3), prompt_of(20)
    plain = run(engine_of(target, None, compiled=False), prompt, params, None, 12)
    assert answer(engine, prompt, params) == (plain, len(OFFERED) + 2)
    assert answer(engine, prompt, params) == (plain, 2), "nothing is new"
    assert answer(engine, prompt, SamplingParams())[1] == len(OFFERED) + 2, (
        "greedy is another graph"
    )


def test_a_cpu_is_not_warmed(target: Decoder) -> None:
    engine = engine_of(target, random_drafter(target), compiled=False)
    assert answer(engine, prompt_of(20), SamplingParams())[1] == 2 and not engine.warm


@pytest.mark.usefixtures("on_gpu")
def test_the_host_compiles_while_a_part_of_the_prompt_is_read(target: Decoder) -> None:
    """Launch a part, launch a shape, wait: one shape with each part, and the rest behind them."""
    engine = engine_of(target, random_drafter(target), compiled=False)
    request = asked(prompt_of(25), None, Offers(), 4, step_size=16)
    opening = engine.opening(engine.answering(request))
    with watched() as log:
        next(opening)
    assert [name for name in log if "eval" in name] == ["async_eval", "async_eval", "eval"]
    assert len(engine.warm) == 1
    list(opening)
    assert len(engine.warm) == len(OFFERED)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("patience", [-1.0, 60.0])
def test_it_is_said_where_it_takes_long(
    patience: float, target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warming, "PATIENCE", patience)
    engine, said = engine_of(target, random_drafter(target), compiled=False), list[str]()
    engine.say = said.append
    answer(engine, prompt_of(20), SamplingParams())
    assert len(said) == (patience < 0)
