"""Drafts from the text itself, and one tree with the beams."""

from __future__ import annotations

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import engine_of, plainly, prompt_of, random_drafter, run

from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import lookup
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.nodes import END, FILLER, Candidates, best_nodes, distinct, joined, prefixes
from mlx_redrafter.tree.shape import TreeShape


def continuation(text: list[int], length: int) -> tuple[int, list[int]]:
    """The rule in plain Python: size of the match, and what follows it."""
    last = len(text) - 1
    best = (0, -1)
    for end in range(last):
        size = 0
        while size < lookup.LONGEST and end - size >= 0 and text[end - size] == text[last - size]:
            size += 1
        if end >= lookup.LONGEST - 1:  # others are let go
            best = max(best, (size, end))
    size, end = best
    if size == 0:
        return 0, [FILLER] * length
    return size, [text[end + 1 + i % (last - end)] for i in range(length)]


@pytest.mark.parametrize("capacity", [64, 128])
def test_matches_are_those_of_a_plain_search(capacity: int) -> None:
    random = np.random.default_rng(5)
    for turn in range(150):
        text = random.integers(0, random.integers(2, 9), random.integers(1, 40)).tolist()
        rest = random.integers(0, 9, capacity - len(text) + 1).tolist()  # must not matter
        position = mx.array([len(text) - 1], mx.int32)
        found = lookup.search(mx.array(text + rest[1:], mx.int32), position, 6, 9)
        size, expected = continuation(text, 7)  # a column more than is drafted
        path = [text[-1], *expected]
        assert found.paths.tolist() == [path[: n + 1] + [END] * (8 - n) for n in range(8)], turn
        assert found.depths == tuple(range(8))
        finite = [cost < np.inf for cost in found.costs.tolist()]
        assert finite == [True] + [size > 0] * 6 + [False]


def paths(candidates: Candidates) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {}
    for row, cost, depth in zip(*(np.array(part).tolist() for part in candidates), strict=True):
        if cost < np.inf:
            assert row[depth + 1 :] == [END] * (len(row) - depth - 1)
            key = tuple(row[: depth + 1])
            assert key not in found, "a path twice"
            found[key] = cost
    return found


def trellis(random: np.random.Generator, width: int, depth: int, columns: int) -> Candidates:
    """Beams: distinct paths, W per level, each a beginning longer; the root is 9."""
    levels = [{(9,): 0.0}]
    for _ in range(depth):
        above, level = list(levels[-1].items()), {}
        while len(level) < width:
            path, cost = above[random.integers(len(above))]
            level[(*path, int(random.integers(4)))] = cost + float(random.exponential())
        levels.append(level)
    flat = [item for level in levels for item in level.items()]
    rows = [[*path, *[END] * (columns - len(path))] for path, _ in flat]
    costs = mx.array([cost for _, cost in flat], mx.float32)
    return Candidates(mx.array(rows, mx.int32), costs, tuple(len(path) - 1 for path, _ in flat))


@pytest.mark.parametrize("width, depth, length", [(3, 4, 7), (3, 4, 2), (1, 4, 6), (4, 1, 5)])
def test_joined_candidates_are_the_union_of_paths(width: int, depth: int, length: int) -> None:
    random = np.random.default_rng(width + depth)
    shared, columns = 0, max(depth, length) + 2
    for _ in range(60):
        beams = trellis(random, width, depth, columns)
        row = [9, *random.integers(0, 4, columns - 2).tolist(), END]
        costs = [0.3 * i if i <= length else np.inf for i in range(columns - 1)]
        path = mx.array(row, mx.int32)
        chain = Candidates(prefixes(path), mx.array(costs), tuple(range(columns - 1)))
        mine, its = paths(beams), paths(chain)
        shared += len(mine.keys() & its.keys()) - 1  # the root
        candidates = distinct(joined([chain, beams]))
        found = paths(candidates)
        assert found.keys() == mine.keys() | its.keys()
        for one, cost in found.items():
            best = min(mine.get(one, np.inf), its.get(one, np.inf))
            assert cost == pytest.approx(best, abs=1e-5)
        tree = best_nodes(candidates, 8)
        kept = {tuple(t for t in p if t >= 0) for p in tree.paths.tolist() if FILLER not in p}
        assert len(kept) == min(8, len(found)) and kept <= found.keys()
        assert all(p[:-1] in kept for p in kept if len(p) > 1), "a parent is missing"
    assert shared > 10


def test_a_repetitive_text_is_drafted_without_a_drafter(target: Decoder) -> None:
    """The prompt holds the answer: lookup finds it there."""
    prompt = prompt_of(6)
    answer = plainly(target, prompt, 24)
    engine, stats = engine_of(target, None), DraftStats()
    for params in (None, SamplingParams(temp=0.7, seed=3)):
        expected = plainly(target, prompt, 24, params)
        found = run(engine, prompt, params, TreeShape(3, 4, 8, lookup=7), 24, stats=stats)
        assert found == expected
    assert len(answer) == 24
    assert stats.drafted == stats.steps * 7


def test_a_cycle_is_accepted_whole(target: Decoder) -> None:
    """A model that repeats itself: every draft of a full match is right."""
    shape = TreeShape(1, 0, 8, lookup=7)
    stats = DraftStats()
    engine = engine_of(target, None)
    bias = SamplingParams(logit_bias={7: 1000.0})
    assert run(engine, prompt_of(4), bias, shape, 64, stats=stats) == [7] * 64
    assert stats.tokens_per_step > 5


def predicted(
    text: list[int], prompt: int, prediction: list[int], length: int
) -> tuple[int, list[int]] | None:
    """The rule for a prediction in plain Python; None where the text itself has a longer match."""
    start = max(0, prompt - lookup.LONGEST)
    there = [FILLER] * start + text[start:prompt] + prediction
    last, found = len(text) - 1, []
    for end in range(lookup.LONGEST - 1, len(there) - 1):
        size = 0
        while size < lookup.LONGEST and there[end - size] == text[max(0, last - size)]:
            size += 1
        if size:
            found.append((size, -abs(end - last), -end))
    if not found or max(found)[0] < continuation(text, 1)[0]:
        return None
    end = -max(found)[2]
    following = there[end + 1 : end + 1 + length]
    return lookup.LONGEST, following + [FILLER] * (length - len(following))


def test_a_prediction_is_searched_first() -> None:
    """Equally long matches are its own; of its own the one that stands nearest."""
    random, own = np.random.default_rng(7), 0
    for turn in range(150):
        prompt = int(random.integers(1, 12))
        letters = random.integers(2, 9)
        text = random.integers(0, letters, prompt + random.integers(0, 25)).tolist()
        prediction = random.integers(0, letters, random.integers(1, 25)).tolist()
        history = mx.array([*text, *random.integers(0, 9, 64 - len(text)).tolist()], mx.int32)
        state = lookup.foretold(text[:prompt], prediction)
        position = mx.array([len(text) - 1], mx.int32)
        path, size = lookup.follow(history, position, 9, state)
        wanted = predicted(text, prompt, prediction, 7)
        own += wanted is not None
        expected = wanted or continuation(text, 7)
        assert (size.item(), path.tolist()) == (expected[0], [text[-1], *expected[1], END]), turn
    assert 50 < own < 150


SHAPE = TreeShape(1, 0, 8, lookup=7)


@pytest.mark.parametrize("params", [None, SamplingParams(temp=1.0, seed=3)])
def test_a_prediction_changes_no_text(target: Decoder, params: SamplingParams | None) -> None:
    """All of it right: eight tokens a pass. In part, or nothing: the model's own text."""
    prompt = prompt_of(9, seed=5)
    text = plainly(target, prompt, 40, params)
    engine = engine_of(target, None)
    edited = [*text[:15], *prompt_of(6, seed=1), *text[20:]]
    for prediction, least, most in (
        (text, 35, 35), (edited, 20, 34), (prompt_of(40, seed=2), 0, 8), ([], 0, 0),
    ):  # fmt: skip
        stats = DraftStats()
        found = run(engine, prompt, params, SHAPE, 40, stats=stats, prediction=prediction)
        assert found == text
        assert least <= stats.predicted <= most, (stats.predicted, least)
        assert stats.foretold >= stats.predicted
        if prediction is text:
            assert (stats.steps, stats.foretold) == (5, 40)


def test_a_prediction_in_a_tree_with_beams(target: Decoder) -> None:
    """The answer's own beginning is skipped: it is found again."""
    drafter = random_drafter(target)
    prompt, params = prompt_of(9, seed=5), SamplingParams(temp=1.0, seed=3)
    text = plainly(target, prompt, 40, params)
    stats = DraftStats()
    found = run(
        engine_of(target, drafter, compiled=False), prompt, params, TreeShape(2, 3, 8, lookup=7),
        40, stats=stats, prediction=text[7:],
    )  # fmt: skip
    assert found == text
    assert stats.predicted >= 24 and stats.steps < 16
