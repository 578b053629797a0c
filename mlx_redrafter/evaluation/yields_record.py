"""Answers with the drafts that would have been made before each of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, stream_generate
from mlx_redrafter.budget import yields
from mlx_redrafter.budget.yields import KINDS, LOOKUP, Yields, beam_of
from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.step import read_layers
from mlx_redrafter.drafters import Ask, lookup
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.models.features import Features
from mlx_redrafter.tree.nodes import END, Candidates, joined, rising
from mlx_redrafter.tree.shape import TreeShape

WIDTHS = {1: 4, 2: 4, 3: 4, 4: 5}  # beam width: deepest level that is recorded
TEMPERATURES = (0.0, 0.8)

Arrays = tuple[np.ndarray, np.ndarray]
"""Paths, without the root's token, and costs of ``Candidates``."""
Path = tuple[int, ...]


@dataclass
class Answer:
    """An answer and, for each of its tokens as the root's successor, all drafts.

    ``drafts[i][w]`` are the candidates of beam width w (0: from the text) before token i.
    """

    group: str
    sampled: bool
    tokens: list[int]
    drafts: list[dict[int, Arrays]]

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, TreeShape], int] = {}

    def yields(self, at: int, shape: TreeShape) -> int:
        """Tokens that a step of this shape produces before token ``at``."""
        if not shape.drafts:
            return 1
        if (at, shape) not in self._known:
            chosen = best(self.candidates(at, shape), shape.nodes)
            self._known[at, shape] = self.accepted(at, chosen) + 1
        return min(self._known[at, shape], len(self.tokens) - at)

    def steps(self, shape: TreeShape) -> int:
        """Steps of this shape from the beginning to the end."""
        at = count = 0
        while at < len(self.tokens):
            at, count = at + self.yields(at, shape), count + 1
        return count

    def candidates(self, at: int, shape: TreeShape) -> dict[Path, float]:
        """What beams and lookup cost, each path once (as ``tree.distinct``)."""
        found: dict[Path, float] = {}
        sources = [(0, shape.lookup)] if shape.lookup else []
        if shape.depth:
            sources.append((shape.width, shape.width * shape.depth))
        for source, count in sources:
            paths, costs = self.drafts[at][source]
            for row, cost in zip(paths[1 : count + 1], costs[1 : count + 1], strict=True):
                path = tuple(int(token) for token in row if token != END)
                if np.isfinite(cost):
                    found[path] = min(found.get(path, np.inf), float(cost))
        return found

    def accepted(self, at: int, chosen: set[Path]) -> int:
        """How many of the chosen drafts the answer goes through."""
        count = 0
        while at + count < len(self.tokens) and tuple(self.tokens[at : at + count + 1]) in chosen:
            count += 1
        return count


def best(candidates: dict[Path, float], size: int) -> set[Path]:
    """The best-first choice of ``tree.best_nodes``."""
    order = sorted(candidates, key=lambda path: rising(candidates[path], len(path)))
    return set(order[: size - 1])


def record(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    max_tokens: int,
    seed: int = 0,
) -> Iterator[Answer]:
    """Write every answer, greedy and sampled, and draft before each of its tokens."""
    for temp in TEMPERATURES:
        drafts_of = _draft_function(model, temp)
        for prompt in prompts:
            ids = list(prompt.encode(tokenizer))
            written = stream_generate(model, tokenizer, ids, max_tokens, temp=temp, seed=seed)
            answer = [response.token for response in written]
            drafts = list(_drafts(model, ids, answer, seed, drafts_of))
            yield Answer(prompt.group, temp > 0, answer, drafts)


DraftFunction = Callable[..., list[Candidates]]


def _draft_function(model: Model, temp: float) -> DraftFunction:
    drafter = model.drafter

    @mx.compile
    def drafts(
        state: Any, root: mx.array, position: mx.array, history: mx.array, seed: mx.array
    ) -> list[Candidates]:
        draw = None
        if temp:
            known = {"seed": seed, "temp": mx.array(temp)}
            draw = sampling.draw(known, position + 1, max(WIDTHS.values()))
        found = [lookup.search(history, position, LOOKUP, LOOKUP + 2)]
        for width, depth in WIDTHS.items():
            if drafter is None:
                break
            shape = TreeShape(width, depth, 1 + width * depth, lookup=1)  # of more than one path
            found.append(joined(drafter.propose(state, Ask(root, position, history, shape, draw))))
        return found

    return drafts


def _drafts(
    model: Model, ids: list[int], answer: list[int], seed: int, drafts_of: DraftFunction
) -> Iterator[dict[int, Arrays]]:
    target, drafter, text = model.target, model.drafter, [*ids, *answer]
    n = len(text)
    run = Pass(new_caches(target.caches, capacity_for(n), target.dtype), mx.array([0]))
    slots, positions = mx.arange(capacity_for(n)), mx.arange(n)
    layers = read_layers([drafter] if drafter is not None else [])
    hidden, outputs = target(
        mx.array(text), positions, slots[None] <= positions[:, None], slots, run, layers
    )
    # One capacity for all answers of a length class, or every answer would be traced again.
    history = mx.array([*text, *[0] * (-n % 1024)], mx.int32)
    key = mx.array([seed], mx.uint32)
    for root in range(len(ids) - 1, n - 1):
        row = slice(root - 1, root)
        read = Features(hidden[row], layers, tuple(x[row] for x in outputs))
        state = drafter.begin(read) if drafter is not None else ()
        found = drafts_of(state, mx.array([text[root]]), mx.array([root]), history, key)
        mx.eval(found)
        arrays = [(np.array(c.paths)[:, 1:], np.array(c.costs)) for c in found]
        yield dict(zip((0, *WIDTHS), arrays, strict=False))


def tabulate(answers: Sequence[Answer], drafter: bool) -> Yields:
    """Tokens per step of answers decoded with every shape; ``drafter``: also those with beams."""
    shapes = {*yields.shapes(drafter), *yields.shapes(drafter=False)}
    table: dict[bool, dict[tuple[int, int], dict[int, float]]] = {False: {}, True: {}}
    for shape in shapes:
        if not shape.drafts:
            continue
        for sampled in KINDS.values():
            walked = [a.steps(shape) for a in answers if a.sampled == sampled]
            tokens = sum(len(a.tokens) for a in answers if a.sampled == sampled)
            mean = tokens / sum(walked) if walked else 1.0
            table[sampled].setdefault(beam_of(shape), {})[shape.nodes] = mean
    return Yields(table)
