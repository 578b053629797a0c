"""Candidates, tree and walk against plain Python: beam search, best-first choice, acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import mlx.core as mx
import numpy as np
import pytest
from conftest import Constant, random_drafter

from mlx_redrafter.decoding import beam, sampling
from mlx_redrafter.decoding.accept import walk
from mlx_redrafter.decoding.tree import Candidates, DraftTree, TreeShape, best_nodes, chain
from mlx_redrafter.drafters import Drafter
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder

ROOT = mx.array([77], mx.int32)
Trellis = tuple[list[int], list[int], list[float]]


def trellis(rng: np.random.Generator, width: int, depth: int, ties: bool, dead: float) -> Trellis:
    """Tokens, parents and joint scores of ``depth`` levels; some invalid with all below them."""
    tokens = rng.permutation(1000)[: width * depth].tolist()
    parents: list[int] = []
    scores: list[float] = []
    for level in range(depth):
        for _ in range(width):
            parent = -1 if level == 0 else (level - 1) * width + int(rng.integers(width))
            fall = float(rng.integers(0, 3)) if ties else float(np.float32(rng.exponential()))
            if rng.random() < dead:
                fall = np.inf
            above = 0.0 if parent < 0 else scores[parent]
            parents.append(parent)
            scores.append(float(np.float32(above - fall)))
    return tokens, parents, scores


def as_candidates(given: Trellis) -> Candidates:
    tokens, parents, scores = given
    return Candidates(
        mx.array(tokens, mx.int32), mx.array(parents, mx.int32), mx.array(scores, mx.float32)
    )


def naive_tree(tokens: Sequence[int], parents: Sequence[int]) -> DraftTree:
    """A tree from slots' tokens and parents (slot 0 the root), depths and ancestors by walking."""
    n = len(tokens)
    ancestors = np.eye(n, dtype=bool)
    for i in range(n):
        at = i
        while at:
            at = parents[at]
            ancestors[i, at] = True
    return DraftTree(
        mx.array(list(tokens), mx.int32),
        mx.array(list(parents), mx.int32),
        mx.array((ancestors.sum(-1) - 1).astype(np.int32)),
        mx.array(ancestors),
    )


def naive_best(given: Trellis, nodes: int) -> tuple[list[int], list[int]]:
    """Slots' tokens and parents: the best by (score, lower number), in candidate order."""
    tokens, parents, scores = given
    order = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))[: nodes - 1]
    slot = {number: i + 1 for i, number in enumerate(sorted(order))}
    slot_tokens, slot_parents = [ROOT.item()], [0]
    for number in sorted(order):
        valid = scores[number] > -np.inf
        slot_tokens.append(tokens[number] if valid else -1)
        slot_parents.append(slot[parents[number]] if valid and parents[number] >= 0 else 0)
    return slot_tokens, slot_parents


def assert_same(tree: DraftTree, expected: DraftTree) -> None:
    for name, mine, theirs in zip(DraftTree._fields, tree, expected, strict=True):
        assert np.array_equal(np.array(mine), np.array(theirs)), name


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("dead", [0.0, 0.3], ids=["full", "fillers"])
def test_best_nodes_against_sorting(ties: bool, dead: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        width, depth = int(rng.integers(2, 6)), int(rng.integers(1, 8))
        nodes = int(rng.integers(2, width * depth + 2))
        given = trellis(rng, width, depth, ties, dead)
        tree = best_nodes(ROOT, as_candidates(given), nodes, depth)
        assert_same(tree, naive_tree(*naive_best(given, nodes)))


def test_best_nodes_when_every_candidate_fits() -> None:
    rng = np.random.default_rng(1)
    for width, depth in product((2, 3, 5), (1, 2, 4)):
        given = trellis(rng, width, depth, ties=True, dead=0.2)
        tree = best_nodes(ROOT, as_candidates(given), width * depth + 1, depth)
        assert_same(tree, naive_tree(*naive_best(given, width * depth + 1)))


def test_best_nodes_is_the_best_of_all_closed_sets() -> None:
    """No other set of N - 1 nodes that holds its parents has more expected tokens."""
    rng = np.random.default_rng(2)
    for _ in range(12):
        tokens, parents, scores = given = trellis(rng, 3, 3, ties=False, dead=0.0)
        nodes = int(rng.integers(2, 9))
        gains = [
            sum(np.exp(scores[i]) for i in chosen)
            for chosen in combinations(range(9), nodes - 1)
            if all(parents[i] < 0 or parents[i] in chosen for i in chosen)
        ]
        tree = best_nodes(ROOT, as_candidates(given), nodes, 3)
        kept = [tokens.index(t) for t in tree.tokens.tolist()[1:]]
        assert all(parents[i] < 0 or parents[i] in kept for i in kept)
        assert np.isclose(sum(np.exp(scores[i]) for i in kept), max(gains))


def test_ancestors_of_the_deepest_chains() -> None:
    for depth in range(1, 17):
        tokens = list(range(1, depth + 1))
        given = (tokens, list(range(-1, depth - 1)), [-0.5 * i for i in range(depth)])
        expected = naive_tree([ROOT.item(), *tokens], [0, *range(depth)])
        assert_same(best_nodes(ROOT, as_candidates(given), depth + 1, depth), expected)
        assert_same(chain(ROOT, as_candidates(given)), expected)


def test_worked_example_of_the_docstring() -> None:
    given = ([5, 6, 7, 8], [-1, -1, 0, 1], [-0.4, -1.5, -0.9, -2.0])
    tree = best_nodes(ROOT, as_candidates(given), 4, 2)
    assert tree.tokens.tolist() == [77, 5, 6, 7]
    assert tree.parents.tolist() == [0, 0, 0, 1]
    assert tree.depths.tolist() == [0, 1, 1, 2]
    assert tree.ancestors.astype(mx.int32).tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1],
    ]  # fmt: skip


def naive_walk(tokens: Sequence[int], parents: Sequence[int], choices: Sequence[int]) -> list[int]:
    path = [0]
    while True:
        step = [
            i
            for i in range(1, len(tokens))
            if parents[i] == path[-1] and tokens[i] == choices[path[-1]]
        ]
        if not step:
            return path
        path.append(step[0])


def test_walk_against_plain_python() -> None:
    rng = np.random.default_rng(3)
    lengths = set()
    for _ in range(300):
        n, alphabet = int(rng.integers(1, 17)), 4
        tokens, parents = [77], [0]
        for _ in range(n - 1):
            parent = int(rng.integers(len(tokens)))
            taken = {tokens[i] for i in range(1, len(tokens)) if parents[i] == parent}
            free = [t for t in range(alphabet) if t not in taken]
            filler = not free or tokens[parent] == -1 or rng.random() < 0.1
            tokens.append(-1 if filler else int(rng.choice(free)))
            parents.append(0 if filler else parent)
        tree = naive_tree(tokens, parents)
        choices = rng.integers(0, alphabet, n).tolist()
        depth = max(1, max(tree.depths.tolist())) + int(rng.integers(2)) if n > 1 else 0
        path, count = walk(tree, mx.array(choices, mx.int32), depth)
        expected = naive_walk(tokens, parents, choices)
        lengths.add(len(expected))
        assert path.shape == (depth + 1,) and count.shape == (1,)
        assert path.tolist()[: count.item()] == expected
        assert not any(path.tolist()[count.item() :])
    assert lengths >= {1, 2, 3, 4}


@pytest.mark.parametrize(
    "width", [1, 2, 15, 97, 2047, 2048, 2049, 4096, 5001, 32000, 49152, 49153, 151936, 262144]
)
def test_least_equals_a_full_sort(width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((3, width)).astype(np.float32)
    order = np.argsort(x, axis=-1, kind="stable")
    for k in range(1, min(16, width) + 1):
        values, at = beam.least(mx.array(x), k)
        unique = np.take_along_axis(x, order[:, :k], -1)
        assert np.array_equal(np.array(values), unique), k
        assert np.array_equal(np.take_along_axis(x, np.array(at), -1), unique), k
        assert all(len(set(row)) == k for row in at.tolist()), k


@pytest.mark.parametrize("width", [300, 5001, 49153])
def test_least_with_ties_and_infinities(width: int) -> None:
    rng = np.random.default_rng(width)
    tied = rng.integers(0, 3, (2, width)).astype(np.float32)
    sparse = np.full((2, width), np.inf, np.float32)
    sparse[:, [3, width - 1]] = [[1.0, 2.0], [2.0, 1.0]]
    for x in (tied, sparse):
        for k in (1, 2, 5, 16):
            values, at = beam.least(mx.array(x), k)
            assert np.array_equal(np.array(values), np.sort(x, axis=-1)[:, :k]), k
            assert all(0 <= i < width for row in at.tolist() for i in row), k
            assert np.array_equal(np.take_along_axis(x, np.array(at), -1), np.array(values)), k
            assert all(len(set(row)) == k for row in at.tolist()), k


def naive_search(
    drafter: Drafter,
    context: mx.array,
    root: int,
    width: int,
    depth: int,
    temperature: float = 1.0,
    noise: np.ndarray | None = None,
) -> tuple[list[int], list[int], list[float], list[bool]]:
    """Beam search one beam at a time in float64: tokens, parents, scores, on a surviving beam."""
    state, fixed = drafter.start(context)
    beams: list[tuple[float, int, mx.array, int]] = [(0.0, root, state, -1)]
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    for level in range(depth):
        grown = []
        for score, token, state, number in beams:
            logits, after = drafter.step(mx.array([token], mx.int32), state, fixed)
            row = np.array(logits[0]).astype(np.float64)
            ids = np.array(drafter.token_ids(mx.arange(row.size))).tolist()
            if noise is not None:
                row = row / temperature + np.array(drafter.select(mx.array(noise[level])))
            row = row - row.max()
            row = row - np.log(np.exp(row).sum())
            grown += [(score + s, t, after, number) for s, t in zip(row, ids, strict=True)]
        best = sorted(grown, key=lambda b: -b[0])[:width]
        beams = []
        for score, token, state, parent in best:
            beams.append((score, token, state, len(tokens)))
            tokens.append(token)
            parents.append(parent)
            scores.append(score)
    surviving = [False] * len(tokens)
    for number in range((depth - 1) * width, depth * width):
        while number >= 0:
            surviving[number] = True
            number = parents[number]
    return tokens, parents, scores, surviving


SEARCHED = {
    "elman": {"cell": "elman"},
    "sum-projected": {"cell": "sum", "exit_dim": 24},
    "gru-reduced": {"cell": "gru", "draft_vocab_size": 40},
    "target-head": {"cell": "elman", "head": "target", "draft_vocab_size": 30},
}


@pytest.mark.parametrize("mode", ["trellis", "beams"])
@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize("config", SEARCHED.values(), ids=SEARCHED)
def test_search_against_one_beam_at_a_time(
    target: Decoder, config: dict[str, object], noisy: bool, mode: str
) -> None:
    drafter = random_drafter(target, **config)
    vocab = target.config.vocab_size
    died = 0
    for i, (width, depth) in enumerate([(1, 3), (2, 2), (3, 4), (4, 5), (16, 2), (2, 1)]):
        context = mx.random.normal((target.config.hidden_size,), key=mx.random.key(i))
        temperature = mx.array(0.7) if noisy else None
        noise = (
            sampling.gumbel(mx.array([5], mx.uint32), mx.array([i]), depth, vocab)
            if noisy
            else None
        )
        shape = TreeShape(width, depth, 1 + width * depth, mode)
        found = beam.search(drafter, context, mx.array([i], mx.int32), shape, temperature, noise)
        tokens, parents, scores, surviving = naive_search(
            drafter, context, i, width, depth, 0.7, None if noise is None else np.array(noise)
        )
        assert found.tokens.tolist() == tokens
        assert found.parents.tolist() == parents
        if width == 1:
            continue  # a chain has no scores: nothing is chosen
        kept = np.array(surviving) | (mode == "trellis")
        mine = np.array(found.scores)
        assert np.array_equal(mine > -np.inf, kept)
        assert np.allclose(mine[kept], np.array(scores)[kept], atol=1e-4)
        above = [mine[p] if p >= 0 else 0.0 for p in parents]
        assert all(mine[k] <= above[k] for k in range(len(tokens)))  # closed under parents
        died += int((~kept).sum())
    assert died or mode == "trellis"


def test_search_when_the_drafter_has_no_preference(target: Decoder) -> None:
    """All scores tie: still a legal trellis, without twins under one parent."""
    drafter = Constant(target, np.zeros(target.config.vocab_size))
    found = beam.search(drafter, mx.zeros((4,)), ROOT, TreeShape(4, 3, 13))
    pairs = list(zip(found.parents.tolist(), found.tokens.tolist(), strict=True))
    assert len(set(pairs)) == 12


def test_shape_normalises() -> None:
    assert TreeShape(4, 5, 1) == TreeShape.plain() and not TreeShape.plain().drafts
    assert TreeShape.chain(4) == TreeShape(1, 4, 5) and TreeShape.chain(4).drafts
    assert TreeShape(1, 8, 3) == TreeShape.chain(2)
    assert TreeShape(3, 8, 4).depth == 3
    assert [str(s) for s in (TreeShape.plain(), TreeShape.chain(4), TreeShape())] == [
        "plain", "chain of 4", "beam 3x4, 8 nodes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"width": 0}, "beam width 0"),
        ({"width": 17}, "beam width 17"),
        ({"depth": 0}, "beam length 0"),
        ({"depth": 17}, "beam length 17"),
        ({"nodes": 0}, "0 nodes"),
        ({"nodes": 14}, "14 nodes"),
        ({"width": 1, "depth": 4, "nodes": 6}, "6 nodes"),
        ({"mode": "greedy"}, "'greedy'"),
    ],
)
def test_impossible_shapes(values: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        TreeShape(**values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and "use " in str(caught.value)
