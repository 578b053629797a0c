"""The seam of everything that remembers: a recurrence in the place of the slabs.

A state per layer that every token scales and adds to. A tree of nodes, each going on from its
parent's state, must give what single steps give, to the bit; and a session can go back only to
where a snapshot was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import RANKS, SHAPES, Oracle, engine_of, prompt_of, run

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models.decoder import DECODING, Functions, Part
from mlx_redrafter.stats import DraftStats

V, D, LAYERS = 97, 16, 3
GREEDY, SAMPLED = SamplingParams(), SamplingParams(temp=0.9, seed=4)
Rows = tuple[mx.array, mx.array]


class Recurrence:
    """state = decay * state + input, scalars; a `cache.layer.LayerCache`."""

    in_place = False
    cuts_anywhere = False
    ahead = 0

    def empty(self, capacity: int, dtype: mx.Dtype, rows: int = 1) -> mx.array:
        return mx.zeros((1,), dtype)

    def grow(self, kept: mx.array, capacity: int) -> mx.array:
        return kept

    def capacity(self, kept: mx.array) -> None:
        return None

    def nothing(self, kept: mx.array, nodes: int) -> Rows:
        return mx.zeros((nodes,)), mx.zeros((nodes,))

    def commit(
        self, kept: mx.array, pending: Rows, slots: mx.array, position: mx.array
    ) -> mx.array:
        order = mx.argsort(slots)
        for i in range(slots.shape[0]):
            node = order[i : i + 1]
            on_path = mx.take(slots, node) < position
            kept = mx.where(on_path, self.after(kept, pending, node), kept)
        return kept

    def extend(self, kept: mx.array, rows: Rows, to: Pass) -> tuple[mx.array, Any, mx.array]:
        states = [kept]
        parents = parents_of(to.ancestors) if to.ancestors is not None else None
        for node in range(rows[0].shape[0]):
            before = states[-1]
            if parents is not None:
                before = mx.take(mx.concatenate(states), parents[node : node + 1] + 1)
            states.append(self.after(before, rows, mx.array([node])))
        seen = mx.concatenate(states[1:])
        return (kept, rows, seen) if to.ancestors is not None else (states[-1], (), seen)

    def after(self, state: mx.array, rows: Rows, node: mx.array) -> mx.array:
        decay, added = (mx.take(part, node) for part in rows)
        return decay * state + added


def parents_of(ancestors: mx.array) -> mx.array:
    """The slot that every node goes on from, -1 for the root."""
    depths = ancestors.sum(axis=-1)
    above = ancestors & ~mx.eye(len(ancestors), dtype=mx.bool_)
    nearest = mx.argmax(mx.where(above, depths, -1), -1).astype(mx.int32)
    return mx.where(mx.any(above, -1), nearest, mx.array(-1))


class Recurrent:
    """A model of recurrences alone; a `models.Target`."""

    dtype = mx.float32
    config = SimpleNamespace(
        vocab_size=V, hidden_size=D, num_layers=LAYERS, num_heads=1, max_positions=4096
    )

    def __init__(self) -> None:
        rng = np.random.default_rng(3)
        self.caches = [Recurrence()] * LAYERS
        self.table, self.head = (
            mx.array(rng.standard_normal((V, D)).astype(np.float32)) for _ in range(2)
        )
        self.into = mx.array(rng.standard_normal((LAYERS, 2, D)).astype(np.float32)) * 0.3
        self.out = mx.array(rng.standard_normal((LAYERS, D)).astype(np.float32))

    routes, stacks = 0, False

    def common(self, *arrays: mx.array) -> Sequence[mx.array]:
        return arrays

    def together(
        self,
        parts: Sequence[Part],
        layers: Sequence[int] = (),
        functions: Functions = DECODING,
        stacks: Sequence[Any] = (),
    ) -> list[tuple[mx.array, tuple[mx.array, ...]]]:
        return [self(*part, layers, functions) for part in parts]

    def __call__(
        self,
        tokens: mx.array,
        positions: mx.array,
        mask: mx.array,
        key_positions: mx.array,
        caches: Pass,
        layers: Sequence[int] = (),
        functions: Any = None,
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        x = mx.take(self.table, mx.maximum(tokens, 0), axis=0)
        outputs = []
        for layer, kind in enumerate(self.caches):
            decay, added = ((x * self.into[layer, i]).sum(-1) for i in range(2))
            rows = mx.sigmoid(decay + 1.0), added
            x = mx.tanh(x + caches.extend(layer, kind, rows)[:, None] * self.out[layer])
            outputs.append(x)
        return x, tuple(outputs[i] for i in layers)

    def logits(self, hidden: mx.array) -> mx.array:
        return (hidden[:, None] * self.head[None]).sum(-1) * 2.0


@pytest.fixture(scope="module")
def recurrent() -> Any:
    return Recurrent()


def plain(target: Any, prompt: list[int], n: int, params: SamplingParams | None = None) -> Any:
    return run(engine_of(target, None, compiled=False), prompt, params, None, n)


def test_a_tree_is_to_the_bit_what_single_steps_are(recurrent: Any) -> None:
    """Two branchings; then the accepted path is committed and decoding goes on behind it."""
    parents, tokens = [-1, 0, 0, 1, 1, 2, 4], mx.array([5, 8, 13, 21, 34, 55, 89], mx.int32)
    paths = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    ancestors = mx.array([[i in path for i in range(7)] for path in paths])
    nothing = mx.zeros((7,))
    start = Pass(new_caches(recurrent.caches, 8, mx.float32), mx.array([0]))
    recurrent(mx.array(prompt_of(9)), nothing, nothing, nothing, start)
    tree = Pass(start.caches, mx.array([9]), ancestors)
    hidden, _ = recurrent(tokens, nothing, nothing, nothing, tree)
    for path in paths:
        caches, rows = start.caches, []
        for node in path:
            step = Pass(caches, mx.array([9]))
            rows.append(recurrent(tokens[node : node + 1], nothing, nothing, nothing, step)[0])
            caches = step.caches
        assert np.array_equal(hidden[mx.array(path)], mx.concatenate(rows))
        slots = mx.array([9 + path.index(i) if i in path else 20 for i in range(7)])
        behind = mx.array([9 + len(path)])
        after = Pass(tree.caches, behind, mx.array([[True]]), (tree.rows, slots))
        recurrent(mx.array([3]), nothing, nothing, nothing, after)
        assert [c.item() for c in after.caches] == [c.item() for c in caches]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafted_text_is_plain_text(recurrent: Any, params: SamplingParams, shape: str) -> None:
    prompt = prompt_of(12)
    answer = plain(recurrent, prompt, 40, params)
    assert len(set(answer)) > 8, "a model that says one word shows nothing"
    drafter = Oracle(recurrent, [prompt + answer], RANKS)
    for compiled in (True, False):
        engine, stats = engine_of(recurrent, drafter, compiled), DraftStats()
        assert run(engine, prompt, params, SHAPES[shape], 40, stats=stats) == answer
        assert engine.traces == 1 or not compiled
    assert stats.accepted > 5 or shape == "lookup"


def test_a_session_is_cut_at_a_snapshot(recurrent: Any) -> None:
    """At the end of an answer or of a prompt, and every 512 tokens of one; the text is that of a
    new session, however the turns shared their beginning."""
    first = prompt_of(1300, seed=1)
    answer = plain(recurrent, first, 20)
    engine = engine_of(recurrent, Oracle(recurrent, [first + answer], RANKS), compiled=False)
    session = Session()
    assert run(engine, first, None, SHAPES["beam-3x4-8"], 20, session) == answer
    turns = {  # the next prompt: what of the session is left for it
        "all of it, and more": ([*session.tokens, 7, 8, 9], len(session.tokens)),
        "the prompt": ([*first[:1299], 1, 2, 3], 1299),
        "most of the prompt": ([*first[:1200], 1, 2, 3], 1024),
        "less than a snapshot": ([*first[:500], 1, 2, 3], 0),
    }
    for name, (prompt, kept) in turns.items():
        stats = DraftStats()
        found = run(engine, prompt, None, SHAPES["beam-4x5-16"], 12, session, stats)
        assert found == plain(recurrent, prompt, 12), name
        assert stats.prefill_tokens == len(prompt) - kept, name
        assert session.tokens == [*prompt, *found][: len(session.tokens)]
        assert max(session.snapshots) == session.stand == len(session.tokens), name


def test_an_answer_cut_anywhere_leaves_a_true_session(recurrent: Any) -> None:
    prompt = prompt_of(12)
    answer = plain(recurrent, prompt, 40)
    engine = engine_of(recurrent, Oracle(recurrent, [prompt + answer], RANKS), compiled=False)
    for n in range(1, 25):
        session = Session()
        assert run(engine, prompt, None, SHAPES["beam-3x4-8"], n, session) == answer[:n]
        again = [*prompt, *answer[: n // 2], 9]
        assert run(engine, again, None, SHAPES["chain"], 9, session) == plain(recurrent, again, 9)


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """What was accepted is never committed."""
    patch.setattr(Recurrence, "commit", lambda self, kept, *_: kept)


def eager(patch: pytest.MonkeyPatch) -> None:
    """Nodes that were not accepted are committed too."""
    commit = Recurrence.commit
    patch.setattr(
        Recurrence, "commit",
        lambda self, kept, pending, slots, position: commit(
            self, kept, pending, slots, mx.array([1 << 20])
        ),
    )  # fmt: skip


def of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    """Every node goes on from the one before it in the tree."""
    patch.setitem(globals(), "parents_of", lambda a: mx.arange(-1, len(a) - 1))


@pytest.mark.parametrize("mutate", [forgetful, eager, of_the_neighbour])
def test_mutations_are_caught(
    recurrent: Any, monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    prompt = prompt_of(12)
    answer = plain(recurrent, prompt, 40)
    drafter = Oracle(recurrent, [prompt + answer], RANKS)
    mutate(monkeypatch)
    engine = engine_of(recurrent, drafter, compiled=False)
    assert run(engine, prompt, None, SHAPES["beam-3x4-8"], 40) != answer
