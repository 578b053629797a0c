"""Candidates, tree and walk against plain Python: beam search, best-first choice, acceptance."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import mlx.core as mx
import numpy as np
import pytest
from conftest import Constant, random_drafter

from mlx_redrafter.decoding import sampling
from mlx_redrafter.drafters import UNFITTED, Drafter, beam
from mlx_redrafter.drafters.calibration import Calibration
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import Decoder
from mlx_redrafter.tree.accept import accept
from mlx_redrafter.tree.nodes import (
    END,
    FILLER,
    Candidates,
    DraftTree,
    best_nodes,
    chain,
    joined,
    rising,
    root_only,
)
from mlx_redrafter.tree.shape import TreeShape

ROOT = 77
Path = tuple[int, ...]


def trellis(
    rng: np.random.Generator, width: int, depth: int, ties: bool, dead: float
) -> list[tuple[Path, float]]:
    """Paths behind the root and costs of ``depth`` levels; some not valid, with all below them."""
    tokens = iter(rng.permutation(1000).tolist())
    levels: list[list[tuple[Path, float]]] = [[((), 0.0)]]
    for _ in range(depth):
        level = []
        for _ in range(width):
            path, cost = levels[-1][int(rng.integers(len(levels[-1])))]
            rise = float(rng.integers(0, 3)) if ties else float(np.float32(rng.exponential()))
            rise = np.inf if rng.random() < dead else rise
            level.append(((*path, next(tokens)), float(np.float32(cost + rise))))
        levels.append(level)
    return [item for level in levels for item in level]


def as_candidates(given: list[tuple[Path, float]]) -> Candidates:
    columns = max(len(path) for path, _ in given) + 2
    rows = [[ROOT, *path, *[END] * (columns - 1 - len(path))] for path, _ in given]
    costs = mx.array([cost for _, cost in given], mx.float32)
    return Candidates(mx.array(rows, mx.int32), costs, tuple(len(path) for path, _ in given))


def naive_tree(paths: Sequence[Path | None], columns: int, depths: Sequence[int]) -> DraftTree:
    """A tree from the slots' paths behind the root; None: a filler (it sees the root and fillers,
    and nobody asks what it sees)."""
    rows, tokens = [], []
    for path in paths:
        rows.append([ROOT, *[FILLER] * (columns - 1)])
        if path is not None:
            rows[-1][1:] = [*path, *[END] * (columns - 1 - len(path))]
        tokens.append(FILLER if path is None else (ROOT, *path)[-1])
    ancestors = [
        [(a is None and b is None) or (b is not None and (a or ())[: len(b)] == b) for b in paths]
        for a in paths
    ]
    return DraftTree(
        mx.array(tokens, mx.int32), mx.array(list(depths), mx.int32), mx.array(ancestors),
        mx.array(rows, mx.int32),
    )  # fmt: skip


def naive_best(given: list[tuple[Path, float]], nodes: int) -> list[int]:
    """Numbers of the best, in the order of their cost, a shorter path first."""
    cost = np.array([cost for _, cost in given], np.float32)
    depth = np.array([len(path) for path, _ in given], np.float32)
    order = np.argsort(cost + (cost + 1) * (depth * np.float32(1 / 1024)), kind="stable")
    return order[:nodes].tolist()


def assert_same(tree: DraftTree, expected: DraftTree) -> None:
    for name, mine, theirs in zip(DraftTree._fields, tree, expected, strict=True):
        assert np.array_equal(np.array(mine), np.array(theirs)), name


def slots(given: list[tuple[Path, float]], numbers: Sequence[int], columns: int) -> DraftTree:
    chosen = [given[i] for i in numbers]
    paths = [path if cost < np.inf else None for path, cost in chosen]
    return naive_tree(paths, columns, [len(path) for path, _ in chosen])


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("dead", [0.0, 0.3], ids=["full", "fillers"])
def test_best_nodes_against_sorting(ties: bool, dead: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        width, depth = int(rng.integers(2, 6)), int(rng.integers(1, 8))
        nodes = int(rng.integers(2, width * depth + 1))
        given = trellis(rng, width, depth, ties, dead)
        tree = best_nodes(as_candidates(given), nodes)
        assert_same(tree, slots(given, naive_best(given, nodes), depth + 2))
        kept = {tuple(row) for row in tree.paths.tolist() if FILLER not in row}
        for row in kept:
            above = [t for t in row if t != END][:-1]
            assert not above or tuple(above + [END] * (len(row) - len(above))) in kept


def test_best_nodes_when_every_candidate_fits() -> None:
    rng = np.random.default_rng(1)
    for width, depth in product((2, 3, 5), (1, 2, 4)):
        given = trellis(rng, width, depth, ties=True, dead=0.2)
        tree = best_nodes(as_candidates(given), width * depth + 1)
        assert_same(tree, slots(given, range(len(given)), depth + 2))


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e6])
def test_a_child_never_goes_before_its_parent(scale: float) -> None:
    """Costs that rise by nothing at all, at every magnitude: the rising ones do."""
    for depth in range(1, 17):
        costs = mx.full((depth,), scale)
        order = rising(costs, mx.arange(1, depth + 1).astype(mx.float32))
        assert (np.diff(np.array(order)) > 0).all()


def test_best_nodes_is_the_best_of_all_closed_sets() -> None:
    """No other set of N nodes that holds its parents has more expected tokens."""
    rng = np.random.default_rng(2)
    for _ in range(12):
        given = trellis(rng, 3, 3, ties=False, dead=0.0)
        nodes, costs = int(rng.integers(2, 9)), dict(given)
        gains = [
            sum(np.exp(-costs[path]) for path in chosen)
            for chosen in combinations([path for path in costs if path], nodes - 1)
            if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
        ]
        tree = best_nodes(as_candidates(given), nodes)
        kept = [tuple(t for t in row[1:] if t != END) for row in tree.paths.tolist()[1:]]
        assert np.isclose(sum(np.exp(-costs[path]) for path in kept), max(gains), atol=3e-3)


def test_the_deepest_chains() -> None:
    for depth in range(1, 17):
        row = list(range(depth))
        paths = [tuple(row[:n]) for n in range(depth + 1)]
        expected = naive_tree(paths, depth + 2, range(depth + 1))
        given = [(path, 0.5 * len(path)) for path in paths]
        assert_same(best_nodes(as_candidates(given), depth + 1), expected)
        assert_same(chain(mx.array([ROOT, *row, END], mx.int32)), expected)


def test_worked_example_of_the_docstring() -> None:
    given = [((), 0.0), ((5,), 0.4), ((6,), 1.5), ((5, 7), 0.9), ((6, 8), 2.0)]
    tree = best_nodes(as_candidates(given), 4)
    assert tree.tokens.tolist() == [77, 5, 7, 6]
    assert tree.depths.tolist() == [0, 1, 2, 1]
    assert tree.ancestors.astype(mx.int32).tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1],
    ]  # fmt: skip


def naive_walk(paths: Sequence[Path | None], choices: Sequence[int]) -> tuple[int, list[int]]:
    last, path = 0, ()
    while (*path, choices[last]) in paths:
        path = (*path, choices[last])
        last = paths.index(path)
    return last, [*path, choices[last]]


def test_walk_against_plain_python() -> None:
    rng = np.random.default_rng(3)
    lengths = set()
    for _ in range(300):
        n, alphabet = int(rng.integers(1, 17)), 4
        paths: list[Path | None] = [()]
        depths = [0]
        for _ in range(n - 1):
            above = paths[int(rng.integers(len(paths)))]
            path = None if above is None else (*above, int(rng.integers(alphabet)))
            if path in paths or len(path or ()) > 9 or rng.random() < 0.1:
                path = None
            paths.append(path)
            depths.append(int(rng.integers(1, 10)) if path is None else len(path))
        order = [0, *(1 + rng.permutation(n - 1)).tolist()]  # parents need not come first
        paths, depths = [paths[i] for i in order], [depths[i] for i in order]
        columns = max(depths) + 2 + int(rng.integers(2))
        choices = rng.integers(0, alphabet, n).tolist()
        tree = naive_tree(paths, columns, depths) if n > 1 else root_only(mx.array([ROOT]))
        last, count, text = accept(tree, mx.array(choices, mx.int32))
        expected, tokens = naive_walk(paths, choices)
        lengths.add(len(tokens))
        assert last.tolist() == [expected] and count.tolist() == [len(tokens)]
        rest = (columns if n > 1 else 2) - 1 - len(tokens)
        assert text.tolist() == [ROOT, *tokens, *[END] * rest]
    assert lengths >= {1, 2, 3, 4}


@pytest.mark.parametrize(
    "width", [1, 2, 15, 97, 2047, 2048, 2049, 4096, 5001, 32000, 49152, 49153, 151936, 262144]
)
def test_least_equals_a_full_sort(width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((3, width)).astype(np.float32)
    order = np.argsort(x, axis=-1, kind="stable")
    for k in range(1, min(16, width) + 1):
        values, at = beam.k_smallest(mx.array(x), k)
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
            values, at = beam.k_smallest(mx.array(x), k)
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
    noise: list[np.ndarray] | None = None,
    trust: Calibration = UNFITTED,
) -> tuple[list[Path], list[float], list[bool]]:
    """Beam search one beam at a time in float64: paths with the root, scores, on a survivor."""
    state, fixed = drafter.start(context)
    beams: list[tuple[float, Path, mx.array]] = [(0.0, (root,), state)]
    paths: list[Path] = []
    scores: list[float] = []
    for level in range(depth):
        grown = []
        for score, path, state in beams:
            logits, after = drafter.step(mx.array([path[-1]], mx.int32), state, fixed)
            row = np.array(logits[0]).astype(np.float64)
            ids = np.array(drafter.token_ids(mx.arange(row.size))).tolist()
            if noise is not None:
                row = trust.sharpness * (row + trust.noise * temperature * noise[level])
            row = row - row.max()
            row = row - np.log(np.exp(row).sum())
            if noise is not None:
                row = row + np.log(trust.share)
            grown += [(score + s, (*path, t), after) for s, t in zip(row, ids, strict=True)]
        beams = sorted(grown, key=lambda b: -b[0])[:width]
        paths += [path for _, path, _ in beams]
        scores += [score for score, _, _ in beams]
    surviving = [any(last[: len(path)] == path for _, last, _ in beams) for path in paths]
    return paths, scores, surviving


SEARCHED = {
    "elman": {"cell": "elman"},
    "sum-projected": {"cell": "sum", "exit_dim": 24},
    "gru-reduced": {"cell": "gru", "draft_vocab_size": 40},
    "target-head": {"cell": "elman", "head": "target", "draft_vocab_size": 30},
}


FITTED = Calibration(sharpness=1.5, noise=0.6, share=0.8)


@pytest.mark.parametrize("mode", ["trellis", "beams"])
@pytest.mark.parametrize(
    ("noisy", "trust"),
    [(False, UNFITTED), (False, FITTED), (True, UNFITTED), (True, FITTED)],
    ids=["greedy", "greedy-fitted", "noise", "noise-fitted"],
)
@pytest.mark.parametrize("config", SEARCHED.values(), ids=SEARCHED)
def test_search_against_one_beam_at_a_time(
    target: Decoder, config: dict[str, object], noisy: bool, trust: Calibration, mode: str
) -> None:
    """Greedy drafts take no notice of what was fitted. (A search that applies it to them, that
    forgets a number of it, or that draws at the temperature, fails.)"""
    drafter = random_drafter(target, **config)
    died = 0
    for i, (width, depth) in enumerate([(1, 3), (2, 2), (3, 4), (4, 5), (16, 2), (2, 1)]):
        context = mx.random.normal((target.config.hidden_size,), key=mx.random.key(i))
        draw = None
        if noisy:
            known = {"seed": mx.array([5], mx.uint32), "temp": mx.array(0.7)}
            draw = sampling.draw(known, mx.array([i], mx.int32), depth)
        shape = TreeShape(width, depth, 1 + width * depth, mode)
        found = beam.search(drafter, context, mx.array([i], mx.int32), shape, draw, trust)
        drawn = None
        if draw is not None:
            drawn = [np.array(draw.noise(n, drafter.vocabulary)[0]) for n in range(depth)]
        paths, scores, surviving = naive_search(
            drafter, context, i, width, depth, 0.7, drawn, trust
        )
        assert [part.depths for part in found[1:]] == [(d,) * width for d in range(1, depth + 1)]
        rows = [row for part in found[1:] for row in part.paths.tolist()]
        assert rows == [[*path, *[END] * (depth + 2 - len(path))] for path in paths]
        kept = np.array(surviving) | (mode == "trellis")
        mine = np.concatenate([np.array(part.costs) for part in found[1:]])
        assert np.array_equal(mine < np.inf, kept)
        assert np.allclose(-mine[kept], np.array(scores)[kept], atol=1e-4)
        costs = dict(zip(paths, mine.tolist(), strict=True))
        assert all(cost >= costs.get(path[:-1], 0.0) for path, cost in costs.items())
        died += int((~kept).sum())
    assert died or mode == "trellis"


@pytest.mark.parametrize("mode", ["trellis", "beams"])
@pytest.mark.parametrize("noisy", [False, True], ids=["greedy", "noise"])
@pytest.mark.parametrize("config", SEARCHED.values(), ids=SEARCHED)
def test_searches_together_are_those_alone(
    target: Decoder, config: dict[str, object], noisy: bool, mode: str
) -> None:
    drafter = random_drafter(target, **config)
    contexts = mx.random.normal((3, target.config.hidden_size), key=mx.random.key(0))
    roots = mx.array([5, 1, 3], mx.int32)
    for width, depth in [(1, 3), (3, 1), (3, 4)]:
        shape, draws = TreeShape(width, depth, 1 + width * depth, mode), None
        if noisy:
            known = [
                {"seed": mx.array([i], mx.uint32), "temp": mx.array(0.7 + i)} for i in (1, 2, 3)
            ]
            draws = [d for k in known if (d := sampling.draw(k, mx.array([9], mx.int32), depth))]
        found = beam.search_all(drafter, contexts, roots, shape, draws, FITTED)
        for i, levels in enumerate(found):
            draw = None if draws is None else draws[i]
            alone = beam.search(drafter, contexts[i], roots[i : i + 1], shape, draw, FITTED)
            for mine, its in zip(levels, alone, strict=True):
                assert mine.depths == its.depths and mx.array_equal(mine.paths, its.paths)
                assert mx.allclose(mine.costs, its.costs, atol=1e-5)


def test_search_when_the_drafter_has_no_preference(target: Decoder) -> None:
    """All costs tie: still a legal trellis, without twins under one parent."""
    drafter = Constant(target, np.zeros(target.config.vocab_size))
    found = joined(beam.search(drafter, mx.zeros((4,)), mx.array([ROOT]), TreeShape(4, 3, 13)))
    assert len({tuple(row) for row in found.paths.tolist()}) == 13


def test_rounding_never_makes_a_longer_path_cheaper(target: Decoder) -> None:
    """A sure draft costs about 1e-7, which a sum with a logit of 1000 forgets."""
    logits = np.zeros(target.config.vocab_size)
    logits[5], logits[6] = 1000.0, 984.5
    drafter = Constant(target, logits)
    for width in (1, 2):
        shape = TreeShape(width, 4, 1 + 4 * width)
        found = beam.search(drafter, mx.zeros((4,)), mx.array([ROOT]), shape)
        best = [part.costs[0].item() for part in found]
        assert best == sorted(best)


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
        ({"nodes": 0}, "nodes 0"),
        ({"nodes": 14}, "14 nodes"),
        ({"width": 1, "depth": 4, "nodes": 6}, "6 nodes"),
        ({"mode": "greedy"}, "'greedy'"),
    ],
)
def test_impossible_shapes(values: dict[str, object], said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        TreeShape(**values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and "use " in str(caught.value)
