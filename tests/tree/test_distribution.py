"""Drafted sampling draws from the target's distribution; Apple's acceptance rule does not.

A target with five tokens and three tokens of answer: 125 answers whose probabilities are known
exactly. 100,000 draws of the production rule are made by a numpy port of it, on noise and choices
of the production functions; the engine itself agrees with the port, step for step, on 400 seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import mlx.core as mx
import numpy as np
import pytest
from conftest import Constant, asked, engine_of, hidden_states, write_target

from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.tree.nodes import DraftTree
from mlx_redrafter.tree.shape import TreeShape

V, LENGTH, DRAWS = 5, 3, 100_000
PROMPT = [2, 0, 4, 1]
TEMP = 2.0
WIDTH, DEPTH = 2, 2  # the tree: all four candidates and the root

Floats = np.ndarray
Ints = np.ndarray


class Bigram(Constant):
    """A drafter that looks at the last token only. table (V, V): logits by token."""

    def __init__(self, target: Decoder, table: Floats) -> None:
        super().__init__(target, table[0])
        self._table = mx.array(table.astype(np.float32))

    def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> tuple[mx.array, mx.array]:
        # A state of its own row per beam, as the protocol wants.
        return mx.take(self._table, tokens, axis=0), mx.broadcast_to(state[:1], (tokens.size, 1))


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("five")
    return load_model(write_target(folder, seed=3, vocab_size=V, num_hidden_layers=1))


@pytest.fixture(scope="module")
def logits(five: Decoder) -> Floats:
    """The target's logits after every answer of 0 to 3 tokens, by its number: (*, V)."""
    table = np.zeros((number([V - 1] * LENGTH) + 1, V), np.float32)
    for length in range(LENGTH + 1):
        for answer in product(range(V), repeat=length):
            hidden = hidden_states(five, [*PROMPT, *answer])[-1:]
            table[number(answer)] = np.array(five.logits(mx.array(hidden)))[0]
    return table


def number(answer: Sequence[int]) -> int:
    """Every answer, short ones too, has its own number."""
    value = 0
    for token in answer:
        value = value * (V + 1) + token + 1
    return value


def softmax(x: Floats) -> Floats:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def exact(logits: Floats) -> Floats:
    """The probability of every answer of three tokens: (125,)."""
    p = softmax(logits / TEMP)
    cells = product(range(V), repeat=LENGTH)
    return np.array([p[0, a] * p[number((a,)), b] * p[number((a, b)), c] for a, b, c in cells])


@pytest.fixture(scope="module")
def table(logits: Floats) -> Floats:
    """A middling drafter: the target's logits after one token, blurred."""
    noise = np.random.default_rng(1).standard_normal((V, V))
    return np.stack([logits[number((t,))] for t in range(V)]) + 2.5 * noise


def drawn(logits: Floats, seeds: Ints) -> tuple[Floats, Ints]:
    """The production functions' noise (S, 5, V), and their choice after every answer, by seed."""
    keys, rows = mx.array(seeds.astype(np.uint32)), mx.zeros((len(seeds),), mx.int32)
    ids = mx.arange(V, dtype=mx.int32)
    start = len(PROMPT)
    ahead = range(start, start + LENGTH + DEPTH)
    at_once = [sampling.gumbel(sampling.noise_keys(keys, rows + at), ids) for at in ahead]
    noise = np.stack([np.array(x) for x in at_once], axis=1)
    every = DraftTree(rows, rows, rows[:, None], rows[:, None])
    arrays = SamplingParams(temp=TEMP).arrays(V) | {"seed": keys}  # of every row its own
    choices = np.zeros((len(logits), len(seeds)), int)
    for length in range(LENGTH):
        for answer in product(range(V), repeat=length):
            same = mx.broadcast_to(mx.array(logits[number(answer)]), (len(seeds), V))
            root = mx.array([start + length - 1], mx.int32)
            chosen = sampling.sample(same, every, {}, arrays, root)
            choices[number(answer)] = np.array(chosen)
    return noise, choices


def production(logits: Floats, table: Floats, seeds: Ints) -> tuple[Ints, Ints]:
    """The production rule for many seeds: answers (S, 3), and tokens per step (S, 3).

    Noise and choices are the production functions'; beam search and walk are written again.
    """
    noise, choices = drawn(logits, seeds)

    def candidates(tokens: Ints, at: Ints) -> Floats:
        perturbed = table[tokens] + TEMP * noise[np.arange(len(seeds)), at]
        return np.log(softmax(perturbed))

    def best(scores: Floats) -> Ints:
        return np.argsort(-scores, axis=-1)[:, :WIDTH]

    answers = np.zeros((len(seeds), LENGTH), int)
    steps = np.zeros((len(seeds), LENGTH), int)
    done, prefix = np.zeros(len(seeds), int), np.zeros(len(seeds), int)
    root, each = np.full(len(seeds), PROMPT[-1]), np.arange(len(seeds))
    for number_of_step in range(LENGTH):
        at = np.minimum(done, LENGTH)
        scores = candidates(root, at)
        first = best(scores)  # (S, W)
        grown = np.concatenate(
            [scores[each, f][:, None] + candidates(f, at + 1) for f in first.T], axis=-1
        )  # (S, W * V)
        parent, second = np.divmod(best(grown), V)
        active, tokens = done < LENGTH, np.zeros((len(seeds), DEPTH + 1), int)
        count = active.astype(int)
        tokens[:, 0] = choices[prefix, each]
        hit = first == tokens[:, :1]
        longer = active & hit.any(-1)
        for depth in (1, 2):
            # Choices beyond the answer's end are cut off; their place in the table is wrapped.
            prefix = np.where(active, (prefix * (V + 1) + tokens[:, depth - 1] + 1), prefix)
            place = np.where(prefix < len(logits), prefix, 0)
            tokens[:, depth] = choices[place, each]
            count += longer
            inner = (parent == hit.argmax(-1)[:, None]) & (second == tokens[:, 1:2])
            longer = longer & inner.any(-1)
        count = np.minimum(count, LENGTH - done)
        for depth in range(DEPTH + 1):
            row = depth < count
            answers[row, (done + depth)[row]] = tokens[row, depth]
        steps[:, number_of_step] = count
        done = done + count
        prefix = np.zeros(len(seeds), int)
        for i in range(LENGTH):
            prefix = np.where(i < done, prefix * (V + 1) + answers[:, i] + 1, prefix)
        root = np.where(done > 0, answers[each, done - 1], root)
    return answers, steps


def apple(logits: Floats, table: Floats, seeds: Ints) -> Ints:
    """Apple's sampled mode: beams by probability, each token accepted with min(1, P/Q), the beam
    that goes furthest wins, then a draw from P or from what is left of P - Q: answers (S, 3)."""
    rng = np.random.default_rng(5)
    p, q = softmax(logits / TEMP), softmax(table / TEMP)  # by prefix; by last token
    n = len(seeds)
    beams = np.zeros((V, WIDTH, DEPTH), int)
    for token in range(V):
        joint = q[token][:, None] * q  # (first, second)
        firsts = np.argsort(-q[token])[:WIDTH]
        order = sorted(((joint[f, s], f, s) for f in firsts for s in range(V)), reverse=True)
        beams[token] = [(f, s) for _, f, s in order[:WIDTH]]

    def draw(weights: Floats) -> Ints:
        edges = np.cumsum(weights / weights.sum(-1, keepdims=True), axis=-1)
        return np.minimum((rng.random((n, 1)) > edges).sum(-1), V - 1)

    def extend(prefix: Ints, tokens: Ints) -> Ints:
        return np.where(prefix < 36, prefix * (V + 1) + tokens + 1, 0)  # 0: past the end, cut off

    answers, done = np.zeros((n, LENGTH), int), np.zeros(n, int)
    prefix, root, each = np.zeros(n, int), np.full(n, PROMPT[-1]), np.arange(n)
    for _ in range(LENGTH):
        drafts = beams[root]  # (S, W, L)
        accepted = np.zeros((n, WIDTH), int)
        for w in range(WIDTH):
            t0, t1 = drafts[:, w, 0], drafts[:, w, 1]
            one = rng.random(n) < p[prefix, t0] / q[root, t0]
            two = one & (rng.random(n) < p[extend(prefix, t0), t1] / q[t0, t1])
            accepted[:, w] = one.astype(int) + two
        winner = drafts[each, accepted.argmax(-1)]  # (S, L)
        m = accepted.max(-1)
        places = [prefix, extend(prefix, winner[:, 0])]
        places.append(extend(places[1], winner[:, 1]))
        lasts = [root, winner[:, 0], winner[:, 1]]
        place, last = np.choose(m, places), np.choose(m, lasts)
        left = np.maximum(p[place] - q[last], 0) * (m < DEPTH)[:, None]
        left = np.where(left.sum(-1, keepdims=True) > 0, left, p[place])
        tokens = np.concatenate([winner, np.zeros((n, 1), int)], axis=-1)
        tokens[each, m] = draw(left)
        for depth in range(DEPTH + 1):
            row = (depth <= m) & (done + depth < LENGTH)
            answers[row, (done + depth)[row]] = tokens[row, depth]
        done = np.minimum(done + m + 1, LENGTH)
        prefix = np.zeros(n, int)
        for i in range(LENGTH):
            prefix = np.where((i < done), prefix * (V + 1) + answers[:, i] + 1, prefix)
        root = answers[each, done - 1]
    return answers


def chi_square(answers: Ints, exact: Floats) -> tuple[float, float]:
    """The statistic over the 125 cells (rare ones pooled), and its 1e-3 quantile under exact."""
    seen = np.bincount(answers @ [V * V, V, 1], minlength=V**3).astype(float)
    expected = exact * len(answers)
    rare = expected < 5
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] == 0:
        assert seen[-1] == 0
        seen, expected = seen[:-1], expected[:-1]
    freedom, z = len(seen) - 1, 3.0902  # Wilson and Hilferty's approximation
    spread = 2 / (9 * freedom)
    return float(((seen - expected) ** 2 / expected).sum()), freedom * (
        1 - spread + z * spread**0.5
    ) ** 3


def test_the_engine_agrees_with_the_port(five: Decoder, logits: Floats, table: Floats) -> None:
    """Tokens and steps of the real thing, on 400 seeds, with and without drafting."""
    seeds = np.arange(400)
    answers, steps = production(logits, table, seeds)
    engine = engine_of(five, Bigram(five, table), compiled=False)
    for seed in seeds.tolist():
        params = SamplingParams(temp=TEMP, seed=seed)
        for shape in (TreeShape(WIDTH, DEPTH, 1 + WIDTH * DEPTH), TreeShape.plain()):
            emitted = [e.tokens for e in engine.generate(asked(PROMPT, params, shape, LENGTH))]
            assert [t for tokens in emitted for t in tokens] == answers[seed].tolist()
            if shape.drafts:
                assert [len(tokens) for tokens in emitted] == [n for n in steps[seed] if n]
    assert all((steps[:, 0] == n).mean() > 0.05 for n in (1, 2, 3))  # drafting matters


def test_draws_follow_the_target(logits: Floats, table: Floats, exact: Floats) -> None:
    answers, _ = production(logits, table, np.arange(DRAWS) + 1000)
    statistic, limit = chi_square(answers, exact)
    assert statistic < limit


def test_apples_rule_does_not(logits: Floats, table: Floats, exact: Floats) -> None:
    statistic, limit = chi_square(apple(logits, table, np.arange(DRAWS)), exact)
    assert statistic > 20 * limit


def test_the_test_sees_small_errors(logits: Floats, table: Floats, exact: Floats) -> None:
    """A temperature that is off by 3 per cent is rejected."""
    answers, _ = production(logits * np.float32(1.03), table, np.arange(DRAWS))
    statistic, limit = chi_square(answers, exact)
    assert statistic > limit


def test_noise_that_repeats_is_seen(
    logits: Floats, table: Floats, exact: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = sampling.noise_keys

    def repeated(seed: mx.array, positions: mx.array) -> sampling.Keys:
        return keys(seed, mx.full(positions.shape, len(PROMPT), mx.int32))

    monkeypatch.setattr(sampling, "noise_keys", repeated)
    answers, _ = production(logits, table, np.arange(DRAWS))
    statistic, limit = chi_square(answers, exact)
    assert statistic > 20 * limit
