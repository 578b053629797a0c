"""Models of mlx_lm's own modules through the real engine: what is drafted is what plain decoding
says, whatever a layer remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import pytest
from adapter_cases import TYPES, module_of
from conftest import RANKS, SHAPES, Oracle, engine_of, prompt_of, run

from mlx_redrafter.cache import lineage
from mlx_redrafter.cache.recurrent import LastRows, State, TapedState
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import running
from mlx_redrafter.models.adapter import AdaptedModel
from mlx_redrafter.stats import DraftStats

SAMPLED = SamplingParams(temp=0.9, seed=4)
# A delta rule with attention and experts, experts, sinks and a window, latents, Mamba 2, a short
# convolution.
KINDS = ("qwen3_next", "qwen3_moe", "gpt_oss", "deepseek_v3", "mamba2", "lfm2")
N = 24


@pytest.fixture(autouse=True)
def uncompiled(request: pytest.FixtureRequest) -> Iterator[None]:
    """mlx_lm's small compiled functions cost seconds of a C++ compiler for every type."""
    if "closed" not in request.node.name:
        mx.disable_compile()
    yield
    mx.enable_compile()


def adapted(kind: str, closed: bool = False) -> Any:
    raw = TYPES[kind]
    return AdaptedModel(module_of(raw, lively=True), raw, closed)


@pytest.fixture(scope="module", params=KINDS)
def target(request: pytest.FixtureRequest) -> Any:
    return adapted(str(request.param))


def plain(target: Any, prompt: list[int], n: int = N, params: SamplingParams | None = None) -> Any:
    return run(engine_of(target, None, compiled=False), prompt, params, None, n)


@pytest.mark.parametrize("shape", ["chain", "beam-3x4-8", "lookup"])
def test_drafted_text_is_plain_text(target: Any, shape: str) -> None:
    prompt = prompt_of(20)
    for params in (None, SAMPLED):
        answer, stats = plain(target, prompt, N, params), DraftStats()
        assert len(set(answer)) > 5, "a model that says one word shows nothing"
        engine = engine_of(target, Oracle(target, [prompt + answer], RANKS), compiled=False)
        assert run(engine, prompt, params, SHAPES[shape], N, stats=stats) == answer
        assert stats.accepted > 5 or shape == "lookup"


def test_a_session_is_cut_and_grows_again(target: Any) -> None:
    prompt = prompt_of(30, seed=1)
    answer = plain(target, prompt)
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS), compiled=False)
    session = Session()
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], N, session) == answer
    for again in ([*session.tokens, 7, 8], [*prompt[:29], 1, 2, 3], [*prompt, *answer[:5], 9]):
        assert run(engine, again, None, SHAPES["chain"], 9, session) == plain(target, again, 9)


@pytest.mark.parametrize("kind", ["mamba2", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_a_step_is_one_graph_in_closed_form(kind: str) -> None:
    """Compiled, it is traced once however many trees it runs over."""
    target, prompt = adapted(kind, closed=True), prompt_of(20)
    answer = plain(target, prompt, 40)
    engine = engine_of(target, Oracle(target, [prompt + answer], RANKS))
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 40) == answer
    assert engine.traces == 1


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """No state takes in what was accepted."""
    for kind in (State, TapedState, LastRows):
        patch.setattr(kind, "commit", lambda self, kept, *_: kept)


def of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    """Every node goes on from the one before it in the tree."""
    patch.setattr(lineage, "parents_of", lambda a: mx.arange(-1, len(a) - 1))


def in_a_row(patch: pytest.MonkeyPatch) -> None:
    """Nodes stand at positions one after the other."""

    def offset(self: running.KeysValues) -> mx.array:
        first: mx.array = self.run.caches.position
        return mx.arange(self.run.n) + first

    patch.setattr(running.KeysValues, "offset", property(offset))


def wider(patch: pytest.MonkeyPatch) -> None:
    """A tree's window is one token too wide; that of single tokens is not."""
    window = running.Running.window

    def other(self: running.Running, size: int) -> mx.array:
        return window(self, size + self.branching if size else 0)

    patch.setattr(running.Running, "window", other)


@pytest.mark.parametrize(
    ("mutate", "kind"),
    [
        (forgetful, "qwen3_next"), (forgetful, "mamba2"), (forgetful, "lfm2"),
        (of_the_neighbour, "qwen3_next"), (of_the_neighbour, "lfm2"),
        (in_a_row, "qwen3_moe"), (in_a_row, "deepseek_v3"), (wider, "gpt_oss"),
    ],
)  # fmt: skip
def test_mutations_are_caught(
    mutate: Callable[[pytest.MonkeyPatch], None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, prompt = adapted(kind), prompt_of(20)
    answer = plain(target, prompt, 40)
    drafter = Oracle(target, [prompt + answer], RANKS)
    mutate(monkeypatch)
    engine = engine_of(target, drafter, compiled=False)
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 40) != answer
