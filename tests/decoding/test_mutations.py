"""The checks of the one rule can fail: a known mistake in the engine changes an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from conftest import PENALTIES, RANKS, SHAPES, Oracle, engine_of, plainly, prompt_of, run

from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding import step as step_module
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.nodes import END, DraftTree
from mlx_redrafter.tree.shape import TreeShape


def drafted_differently(target: Decoder, params: SamplingParams, shape: TreeShape) -> int:
    """How many of five answers change when they are drafted (0 is the rule)."""
    prompts = [prompt_of(4 + i, seed=50 + i) for i in range(5)]
    runs = [(prompt, plainly(target, prompt, 24, params)) for prompt in prompts]
    engine = engine_of(target, Oracle(target, [p + a for p, a in runs], RANKS), compiled=False)
    return sum(run(engine, p, params, shape, 24) != a for p, a in runs)


def eager_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepts one node more than the target's choices match."""
    walk = step_module.accept

    def mutated(tree: DraftTree, choices: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        last, count, text = walk(tree, choices)
        depth = mx.take(tree.depths, last)
        child = (tree.depths == depth + 1) & mx.take(tree.ancestors, last, axis=1).reshape(-1)
        child = child & (tree.tokens >= 0)
        deeper = mx.argmax(child, keepdims=True).astype(mx.int32)
        path = mx.take(tree.paths, deeper, axis=0).reshape(-1)
        place = mx.arange(path.shape[0])
        bonus = mx.where(place == depth + 2, mx.take(choices, deeper), END)
        longer, more = mx.where(place <= depth + 1, path, bonus), mx.any(child)
        pairs = (deeper, last), (count + 1, count), (longer, text)
        return tuple(mx.where(more, *pair) for pair in pairs)  # type: ignore[return-value]

    monkeypatch.setattr(step_module, "accept", mutated)


def penalties_without_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recent tokens are those of the root for every node."""
    recent = sampling.recent_tokens

    def mutated(tree: DraftTree, *rest: Any) -> mx.array:
        first = mx.arange(tree.paths.shape[1]) == 0
        return recent(tree._replace(paths=mx.where(first, tree.paths, -1)), *rest)

    monkeypatch.setattr(sampling, "recent_tokens", mutated)


def noise_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = sampling.sample

    def mutated(logits: mx.array, tree: DraftTree, *rest: Any) -> mx.array:
        slots = mx.arange(tree.depths.shape[0], dtype=mx.int32)
        return choose(logits, tree._replace(depths=slots), *rest)

    monkeypatch.setattr(sampling, "sample", mutated)


def verify_another_tree(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[DraftTree], DraftTree]
) -> None:
    verify = step_module.verify

    def other(target: Any, trees: Any, *rest: Any) -> Any:
        return verify(target, [(change(tree), run) for tree, run in trees], *rest)

    monkeypatch.setattr(step_module, "verify", other)


def siblings_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tree: DraftTree) -> DraftTree:
        slots = mx.arange(tree.tokens.shape[0])
        return tree._replace(ancestors=slots[:, None] >= slots[None])

    verify_another_tree(monkeypatch, change)


def ancestors_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tree: DraftTree) -> DraftTree:
        return tree._replace(ancestors=mx.eye(tree.tokens.shape[0], dtype=mx.bool_))

    verify_another_tree(monkeypatch, change)


def depth_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    verify_another_tree(monkeypatch, lambda tree: tree._replace(depths=mx.zeros_like(tree.depths)))


def slots_as_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tree: DraftTree) -> DraftTree:
        return tree._replace(depths=mx.arange(tree.tokens.shape[0], dtype=mx.int32))

    verify_another_tree(monkeypatch, change)


def rows_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Slab.commit

    def in_tree_order(
        self: Slab, kept: mx.array, pending: mx.array, slots: mx.array, position: mx.array
    ) -> mx.array:
        in_order = mx.minimum(slots[0] + mx.arange(slots.size), slots.max())
        return commit(self, kept, pending, in_order, position)

    monkeypatch.setattr(Slab, "commit", in_tree_order)


GREEDY, SAMPLED = SamplingParams(), SamplingParams(temp=1.0, seed=9)
MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], SamplingParams]] = {
    "walk-accepts-one-more": (eager_walk, GREEDY),
    "penalties-ignore-the-path": (penalties_without_path, PENALTIES),
    "noise-keyed-by-node": (noise_by_node, SAMPLED),
    "mask-shows-siblings": (siblings_visible, GREEDY),
    "mask-hides-ancestors": (ancestors_hidden, GREEDY),
    "positions-ignore-depth": (depth_ignored, GREEDY),
    "positions-are-slots": (slots_as_depths, GREEDY),
    "rows-are-not-moved": (rows_left_behind, GREEDY),
}


@pytest.mark.parametrize("shape", ["beam-3x4-8", "beam-4x5-16"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALTIES], ids=["greedy", "sampled", "all"])
def test_unchanged_nothing_is_caught(target: Decoder, params: SamplingParams, shape: str) -> None:
    assert drafted_differently(target, params, SHAPES[shape]) == 0


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("shape", ["beam-3x4-8", "beam-4x5-16"])
def test_mutations_are_caught(
    target: Decoder, monkeypatch: pytest.MonkeyPatch, name: str, shape: str
) -> None:
    mutate, params = MUTATIONS[name]
    mutate(monkeypatch)
    assert drafted_differently(target, params, SHAPES[shape]) > 0


def test_a_drafter_is_used_at_all(target: Decoder) -> None:
    """Guards the guards: the drafter's context follows the accepted path."""

    class Blind(Oracle):
        def context(self, read: mx.array) -> mx.array:
            return mx.zeros_like(read)

    prompt = prompt_of(9)
    answer = plainly(target, prompt, 30)
    steps = {}
    drafters: list[type[Drafter]] = [Oracle, Blind]
    for kind in drafters:
        stats = DraftStats()
        drafter = kind(target, [prompt + answer])  # type: ignore[call-arg]
        engine = engine_of(target, drafter, compiled=False)
        assert run(engine, prompt, None, TreeShape.chain(4), 30, stats=stats) == answer
        steps[kind] = stats.steps
    assert steps[Oracle] == 6 and steps[Blind] > 12
