"""The ring of a sliding window: what a node sees of it and in which order, whatever came before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import TOLERANCE, assert_close, build, tokens_of

from mlx_redrafter.cache import ring as ring_module
from mlx_redrafter.cache.layer import Pass, bytes_of, new_caches
from mlx_redrafter.cache.packed import Packed, Packing, packed
from mlx_redrafter.cache.ring import Ring, check_nodes, ring_of, whole
from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder, load_model

WINDOW, SPARE, NODES = 9, 24, 12
KIND = Ring(2, 1, window=WINDOW)
AROUND = WINDOW + SPARE


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings that texts of a test go around several times."""
    monkeypatch.setattr(ring_module, "SPARE", SPARE)
    monkeypatch.setattr(ring_module, "NODES", NODES)


class Sequence:
    """One layer's cache, fed with rows that say who they are: a token at position p is p + 1 on
    the accepted path, and a rejected node is a negative number that nobody may see."""

    def __init__(self, kind: Any = KIND, capacity: int = 128) -> None:
        self.kind, self.kept = kind, kind.empty(capacity, mx.float32)
        self.length, self.pending = 0, ()

    def chunk(self, n: int) -> list[list[float]]:
        """n tokens that are here to stay: by token, what it sees, in the order of the slots."""
        run = Pass([self.kept], self.at(), pending=self.pending)  # type: ignore[arg-type]
        ids = np.arange(self.length, self.length + n) + 1.0
        found = self._seen(run, ids, mx.arange(self.length, self.length + n))
        self.length, self.pending = self.length + n, ()
        return found

    def tree(self, parents: list[int], accepted: list[int]) -> list[list[float]]:
        """Nodes of a tree, some of them accepted: by node, what it sees."""
        paths: list[list[int]] = []
        for node, parent in enumerate(parents):
            paths.append([*(paths[parent] if parent >= 0 else []), node])
        depths = np.array([len(path) - 1 for path in paths])
        ancestors = mx.array([[i in path for i in range(len(parents))] for path in paths])
        run = Pass([self.kept], self.at(), ancestors, self.pending)  # type: ignore[arg-type]
        kept_by = {node: self.length + depths[node] + 1.0 for node in accepted}
        ids = np.array([kept_by.get(n, -(n + 1.0)) for n in range(len(parents))])
        found = self._seen(run, ids, mx.array(self.length + depths))
        behind = self.length + len(accepted) + len(parents)
        slots = [int(kept_by[n]) - 1 if n in kept_by else behind for n in range(len(parents))]
        self.pending = (run.rows, mx.array(slots, mx.int32))  # type: ignore[assignment]
        self.length += len(accepted)
        return found

    def at(self) -> mx.array:
        return mx.array([self.length], mx.int32)

    def _seen(self, run: Pass, ids: np.ndarray, positions: mx.array) -> list[list[float]]:
        rows = mx.broadcast_to(mx.array(ids, mx.float32)[None, None, :, None], (1, 2, len(ids), 1))
        assert run.room(0, self.kind) is None
        mask = self.kind.mask(positions.astype(mx.int32), run)
        read = run.extend(0, self.kind, rows)
        self.kept = run.caches[0]
        values, shown = np.array(read)[0, 0, :, 0], np.array(mask)
        assert shown.shape == (len(ids), len(values))
        return [values[row].tolist() for row in shown]


def random_tree(rng: np.random.Generator, n: int) -> tuple[list[int], list[int]]:
    parents = [-1] + [int(rng.integers(max(0, i - 3), i)) for i in range(1, n)]
    node, path = int(rng.integers(0, n)), []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return parents, path[::-1]


def one_by_one(length: int) -> list[list[float]]:
    """What the token at every position sees in plain decoding, in the order of the slots."""
    plain = Sequence()
    return [plain.tree([-1], [0])[0] for _ in range(length)]


def test_every_node_sees_what_single_steps_see_in_their_order() -> None:
    """Random trees over several rounds, many of them across the ring's end; accepted nodes are
    then those of plain decoding, slot by slot."""
    plain, rng = one_by_one(220), np.random.default_rng(0)
    for position, seen in enumerate(plain):
        least = max(1, position + 2 - WINDOW)
        assert sorted(seen) == list(range(least, position + 2))
    for _ in range(4):
        sequence = Sequence()
        while sequence.length < 190:
            start = sequence.length
            parents, path = random_tree(rng, int(rng.integers(1, NODES + 1)))
            found = sequence.tree(parents, path)
            assert [found[node] for node in path] == plain[start : sequence.length]
            for node, parent in enumerate(parents):  # whoever was rejected sees itself, at the end
                if parent >= 0 and node not in path:
                    assert -(node + 1.0) in found[node] and len(found[node]) <= WINDOW


@pytest.mark.parametrize("sizes", [(50, 30, 13), (12, 12, 40, 5), (1, 13, 100, 3)])
def test_chunks_of_a_prompt_see_their_windows(sizes: tuple[int, ...]) -> None:
    """Long ones read the window before them and themselves, in order; trees go on behind them."""
    plain, sequence = one_by_one(200), Sequence()
    for n in sizes:
        start = sequence.length
        found = sequence.chunk(n)
        assert [sorted(row) for row in found] == [sorted(row) for row in plain[start : start + n]]
        if n <= NODES:
            assert found == plain[start : start + n]
    for _ in range(8):
        start = sequence.length
        found = sequence.tree([-1, 0, 0, 2, 3], [0, 2, 3])
        assert [found[node] for node in (0, 2, 3)] == plain[start : start + 3]


def shorter(patch: pytest.MonkeyPatch) -> None:
    """A window of one token less."""
    mask = Ring.mask
    patch.setattr(Ring, "mask", lambda self, at, to: mask(Ring(2, 1, window=WINDOW - 1), at, to))


def stale(patch: pytest.MonkeyPatch) -> None:
    """What was accepted stays where the tree had it."""
    patch.setattr(Ring, "commit", lambda self, kept, *_: kept)


def one_further(patch: pytest.MonkeyPatch) -> None:
    """Accepted rows go to the slot behind their own."""
    commit = Ring.commit
    patch.setattr(
        Ring, "commit",
        lambda self, kept, rows, slots, at: commit(self, kept, rows, slots + 1, at + 1),
    )  # fmt: skip


def by_number(patch: pytest.MonkeyPatch) -> None:
    """A node goes round the ring by its number and not by its depth."""

    def slots(self: Ring, n: int, to: Pass) -> mx.array:
        return (to.position + mx.arange(n, dtype=mx.int32)) % self.around

    patch.setattr(Ring, "_own_slots", slots)


def anywhere(patch: pytest.MonkeyPatch) -> None:
    """Rejected rows go to the slot of the position that they are given."""
    commit = Slab.commit
    patch.setattr(
        Ring, "commit",
        lambda self, kept, rows, slots, at: commit(self, kept, rows, slots % AROUND - 20, at),
    )  # fmt: skip


@pytest.mark.parametrize("mutate", [shorter, stale, one_further, by_number, anywhere])
def test_mutations_are_caught(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test_every_node_sees_what_single_steps_see_in_their_order()


def test_it_is_a_slab_until_it_is_full() -> None:
    """Then it has room for any text; what it held keeps its slots."""
    open_, same = KIND.empty(20, mx.float32), Slab(2, 1)
    assert KIND.capacity(open_) == 20 and open_.shape == (1, 2, 20, 1)
    rows = mx.random.normal((1, 2, 7, 1))
    ours, theirs = Pass([open_], mx.array([3])), Pass([same.empty(20, mx.float32)], mx.array([3]))
    assert mx.array_equal(ours.extend(0, KIND, rows), theirs.extend(0, same, rows))
    closed = KIND.grow(ours.caches[0], 999)
    assert KIND.capacity(closed) is None and closed.shape[2] == AROUND + NODES
    assert mx.array_equal(closed[:, :, :20], ours.caches[0]) and KIND.grow(closed, 5000) is closed
    assert bytes_of([KIND], 10**6, mx.float32) == 2 * 4 * (AROUND + NODES)


def test_who_has_a_ring() -> None:
    kinds = [KIND, Slab(2, 32)]
    assert [ring_of(kind) for kind in kinds] == [KIND, None]
    assert whole(kinds) == [Slab(2, 1), Slab(2, 32)]
    check_nodes([Slab(2, 32)], NODES + 1)
    with pytest.raises(OptionError, match="windows: use 1 to 12"):
        check_nodes(kinds, NODES + 1)
    (quantised,) = packed([Ring(2, 32, window=WINDOW)], Packing(8, 32))
    assert ring_of(quantised) == Ring(2, 32, window=WINDOW)
    kept = quantised.empty(500, mx.float32)
    assert quantised.capacity(kept) is None
    seen = Pass([kept], mx.array([77])).extend(0, quantised, mx.ones((1, 2, 40, 32)))
    assert isinstance(seen, Packed) and seen.shape == (1, 2, WINDOW + 40, 32)


class Reader:
    """A Decoder whose text goes on for longer than the windows' rings, drafted or plain."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.used = model, 0
        self.kept = new_caches(model.caches, 256, model.dtype)

    def __call__(self, tokens: mx.array, parents: list[int] | None = None) -> mx.array:
        n, slots = tokens.size, mx.arange(256, dtype=mx.int32)
        depths, above = mx.arange(n, dtype=mx.int32), mx.array(np.tri(n, dtype=bool))
        if parents is not None:
            paths: list[list[int]] = []
            for node, parent in enumerate(parents):
                paths.append([*(paths[parent] if parent >= 0 else []), node])
            depths = mx.array([len(path) - 1 for path in paths], mx.int32)
            above = mx.array([[i in path for i in range(n)] for path in paths])
        at = mx.array([self.used], mx.int32)
        run = Pass(self.kept, at, above if n <= NODES else None)
        mask = mx.slice_update(mx.broadcast_to(slots < at, (n, 256)), above, at, (1,))
        places = mx.slice_update(slots, self.used + depths, at, (0,))
        hidden, _ = self.model(tokens, self.used + depths, mask, places, run)
        if parents is None:
            self.kept, self.used = run.caches, self.used + n
        return self.model.logits(hidden)


CASES = ("gemma3_text", "gpt_oss", "gemma4_text", "ministral3", "cohere2", "olmo3")


@pytest.mark.parametrize("case", CASES)
def test_a_tree_over_rings_is_single_steps_and_mlx_lm(tmp_path: Path, case: str) -> None:
    """Behind several rounds of the ring, across its end."""
    build(tmp_path, case)
    model, (reference, _) = load_model(tmp_path), mlx_lm_utils.load_model(tmp_path)
    windows = [window for window in model.config.layer_windows if window]
    assert windows and sum(map(bool, map(ring_of, model.caches))) >= 1
    around = windows[0] + SPARE
    length = 3 * around - 3
    tokens = tokens_of(length + 6)
    reader, single = Reader(model), Reader(model)
    for one in (reader, single):
        one(tokens[:40])
        for i in range(40, length):
            one(tokens[i : i + 1])
    parents = [-1, 0, 0, 2, 2, 3, 5, 6]  # 0, 2, 3, 5, 6, 7 is a path, across the ring's end
    path = [0, 2, 3, 5, 6, 7]
    nodes = mx.zeros((8,), mx.int32)
    nodes[mx.array(path)] = tokens[length:]
    tree = reader(nodes, parents)
    expected = mx.concatenate([single(token[None]) for token in tokens[length:]])
    assert_close(tree[mx.array(path)], expected, TOLERANCE)
    theirs = reference(tokens[None], cache=make_prompt_cache(reference))[0]
    # Of Gemma 4 mlx_lm's own steps and chunks are as far apart.
    limit = 1e-4 if case == "gemma4_text" else 1e-5
    assert_close(tree[mx.array(path)], theirs[length:], limit)
