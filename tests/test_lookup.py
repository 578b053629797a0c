"""Drafts from the text itself, and one tree with the beams."""

from __future__ import annotations

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from conftest import plainly, prompt_of, run

from mlx_redrafter.decoding import lookup
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.decoding.tree import Candidates, TreeShape, best_nodes
from mlx_redrafter.models import Decoder
from mlx_redrafter.stats import DraftStats


def continuation(text: list[int], length: int) -> tuple[int, list[int]]:
    """The rule in plain Python: size of the match, and what follows it."""
    last = len(text) - 1
    best = (0, -1)
    for end in range(last):
        size = 0
        while size < lookup.LONGEST and end - size >= 0 and text[end - size] == text[last - size]:
            size += 1
        best = max(best, (size, end))
    size, end = best
    if size == 0:
        return 0, [-1] * length
    return size, [text[end + 1 + i % (last - end)] for i in range(length)]


@pytest.mark.parametrize("capacity", [64, 128])
def test_matches_are_those_of_a_plain_search(capacity: int) -> None:
    random = np.random.default_rng(5)
    for turn in range(150):
        text = random.integers(0, random.integers(2, 9), random.integers(1, 40)).tolist()
        rest = random.integers(0, 9, capacity - len(text) + 1).tolist()  # must not matter
        position = mx.array([len(text) - 1], mx.int32)
        found = lookup.search(mx.array(text + rest[1:], mx.int32), position, 6)
        size, expected = continuation(text, 6)
        assert found.tokens.tolist() == expected, turn
        assert found.parents.tolist() == [-1, 0, 1, 2, 3, 4]
        assert (found.scores[0].item() == -float("inf")) == (size == 0)


def paths(candidates: Candidates) -> dict[tuple[int, ...], float]:
    tokens, parents, scores = (part.tolist() for part in candidates)
    found: dict[tuple[int, ...], float] = {}
    for i, score in enumerate(scores):
        if score == -float("inf"):
            continue
        path, at = [], i
        while at >= 0:
            path.append(tokens[at])
            at = parents[at]
        key = tuple(reversed(path))
        assert key not in found, "a path twice"
        found[key] = score
    return found


def trellis(random: np.random.Generator, width: int, depth: int) -> Candidates:
    tokens, parents, scores = [], [], []
    for level in range(depth):
        taken = set()
        while len(taken) < width:
            parent = random.integers(width) + (level - 1) * width if level else -1
            taken.add((int(parent), int(random.integers(4))))
        for parent, token in sorted(taken):
            tokens.append(token)
            parents.append(parent)
            above = scores[parent] if parent >= 0 else 0.0
            scores.append(above - float(random.exponential()))
    return Candidates(
        mx.array(tokens, mx.int32), mx.array(parents, mx.int32), mx.array(scores, mx.float32)
    )


@pytest.mark.parametrize("width, depth, length", [(3, 4, 7), (3, 4, 2), (1, 4, 6), (4, 1, 5)])
def test_merged_candidates_are_the_union_of_paths(width: int, depth: int, length: int) -> None:
    random = np.random.default_rng(width + depth)
    shared = 0
    for _ in range(60):
        beams = trellis(random, width, depth)
        chain = Candidates(
            mx.array(random.integers(0, 4, length), mx.int32),
            mx.arange(-1, length - 1, dtype=mx.int32),
            -0.3 * mx.arange(1, length + 1, dtype=mx.float32),
        )
        merged, mine, its = lookup.merge(beams, chain, width), paths(beams), paths(chain)
        shared += len(mine.keys() & its.keys())
        found = paths(merged)
        assert found.keys() == mine.keys() | its.keys()
        for path, score in found.items():
            best = max(mine.get(path, -np.inf), its.get(path, -np.inf))
            assert score == pytest.approx(best, abs=1e-5)
        tree = best_nodes(mx.array([9], mx.int32), merged, 8, max(depth, length))
        assert tree.ancestors.shape == (8, 8)
    assert shared > 10


def test_a_repetitive_text_is_drafted_without_a_drafter(target: Decoder) -> None:
    """The prompt holds the answer: lookup finds it there."""
    prompt = prompt_of(6)
    answer = plainly(target, prompt, 24)
    engine, stats = Engine(target, None), DraftStats()
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
    engine = Engine(target, None)
    bias = SamplingParams(logit_bias={7: 1000.0})
    assert run(engine, prompt_of(4), bias, shape, 64, stats=stats) == [7] * 64
    assert stats.tokens_per_step > 5
