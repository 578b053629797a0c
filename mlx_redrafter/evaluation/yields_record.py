"""Answers with the drafts that would have been made before each of their tokens, by any drafter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, stream_generate
from mlx_redrafter.budget import yields
from mlx_redrafter.budget.yields import KINDS, LOOKUP, Yields, beam_of
from mlx_redrafter.decoding import sampling
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.decoding.step import State
from mlx_redrafter.drafters import UNFITTED, lookup
from mlx_redrafter.drafters.levels import LevelDrafter
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.evaluation.walk import (
    DEPTH,
    Said,
    Watched,
    led_choices,
    proposing,
    trusted,
    windows,
)
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

    ``drafts[i][w]`` are the candidates of beam width w (0: from the text) before token i; ``said``
    has the drafter's first choices there.
    """

    group: str
    temp: float
    tokens: list[int]
    drafts: list[dict[int, Arrays]]
    said: Said

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, TreeShape], int] = {}

    @property
    def sampled(self) -> bool:
        return self.temp > 0

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
    depth: int = DEPTH,
) -> Iterator[Answer]:
    """Write every answer, greedy and sampled, and draft before each of its tokens.

    Args:
        depth: of the chains that tell the drafter's first choices, as far as its levels go.
    """
    engine = Watched(model.engine)
    if isinstance(model.drafter, LevelDrafter):
        depth = min(depth, model.drafter.levels or depth)
    for temp in TEMPERATURES:
        drafts_of, params = _draft_function(model, temp), SamplingParams(temp=temp, seed=seed)
        for prompt in prompts:
            ids = list(prompt.encode(tokenizer))
            written = stream_generate(model, tokenizer, ids, max_tokens, temp=temp, seed=seed)
            tokens = [response.token for response in written]
            found = _Drafts(drafts_of, [*ids, *tokens], windows(tokens, depth), seed)
            engine.on_state = found.add
            tokens = engine.along(ids, tokens, params)
            yield found.answer(prompt.group, temp, tokens)


Drafted = tuple[list[Candidates], tuple[mx.array, ...]]
DraftFunction = Callable[..., Drafted]


def _draft_function(model: Model, temp: float) -> DraftFunction:
    """What is drafted from a state in all widths and from the text, and the first choices."""
    drafter = model.drafter
    assert drafter is not None, "whoever records has one"

    def drafts(state: State, history: mx.array, seed: mx.array, text: mx.array) -> Drafted:
        propose, position = proposing(model, state, history), state.position
        draw = None
        if temp:
            known = {"seed": seed, "temp": mx.array(temp)}
            draw = sampling.draw(known, position + 1, max(*WIDTHS.values(), text.shape[0]))
        found = [lookup.search(history, position, LOOKUP, LOOKUP + 2)]
        for width, depth in WIDTHS.items():
            shape = TreeShape(width, depth, 1 + width * depth, lookup=1)  # of more than one path
            found.append(joined(propose(shape, draw)))
        # What a chain is led along is certain; a greedy one has a draw only to be led by.
        own = drafter.calibration if temp else UNFITTED
        with trusted(drafter, replace(own, share=1.0)):
            picks, surprise, led = led_choices(propose, text, draw)
        return found, (picks, surprise - math.log(own.share), led)

    return mx.compile(drafts) if model.engine.compiled else drafts


class _Drafts:
    """Collects what is drafted along an answer. text: with the prompt; right (n, K)."""

    def __init__(
        self, drafts_of: DraftFunction, text: list[int], right: np.ndarray, seed: int
    ) -> None:
        self._drafts_of, self._right = drafts_of, mx.array(right)
        # One capacity for all answers of a length class, or every answer would be traced again.
        self._history = mx.array([*text, *[0] * (-len(text) % 1024)], mx.int32)
        self._seed = mx.array([seed], mx.uint32)
        self._drafts: list[dict[int, Arrays]] = []
        self._said: list[list[np.ndarray]] = []

    def add(self, state: State) -> None:
        text = self._right[len(self._drafts)]
        found, said = self._drafts_of(state, self._history, self._seed, text)
        mx.eval(found, said)
        arrays = [(np.array(c.paths)[:, 1:], np.array(c.costs)) for c in found]
        self._drafts.append(dict(zip((0, *WIDTHS), arrays, strict=True)))
        self._said.append([np.array(part) for part in said])

    def answer(self, group: str, temp: float, tokens: list[int]) -> Answer:
        picks, surprise, led = (
            np.stack(rows) for rows in zip(*self._said[: len(tokens)], strict=True)
        )
        said = Said(picks, np.exp(-surprise), led)
        return Answer(group, temp, tokens, self._drafts[: len(tokens)], said)


def tabulate(answers: Sequence[Answer]) -> Yields:
    """Tokens per step of answers decoded with every shape, with beams and without."""
    shapes = {*yields.shapes(drafter=True), *yields.shapes(drafter=False)}
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
