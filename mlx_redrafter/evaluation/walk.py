"""What a drafter says before every token of an answer, whatever kind of drafter it is.

The answer is decoded once more, a token a step, so that every state is one of decoding, and the
drafter is asked what every drafter can be asked: to propose. What its k-th draft is where all
earlier tokens are true, a chain tells that is led along the answer by its draw.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_redrafter.api import Model
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.sampling import Arrays, SamplingParams
from mlx_redrafter.decoding.step import State, StepFunction, StepSpec, passes
from mlx_redrafter.drafters import Ask, Drafter, Draw
from mlx_redrafter.drafters.calibration import Calibration
from mlx_redrafter.tree.nodes import END, FILLER, Candidates, integers
from mlx_redrafter.tree.shape import TreeShape

DEPTH = 5  # K, draft positions that are compared
_FAR = 1e6  # above every difference of logits


class Said(NamedTuple):
    """The first choices of n chains at their positions 1..K: token ids, their probabilities, and
    whether all earlier tokens were the answer's; (n, K) each.

    Both are those of decoding: with the noise that sampled drafts share with the target, and as
    the drafter is calibrated.
    """

    picks: np.ndarray
    probability: np.ndarray
    led: np.ndarray

    def against(self, answer: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probability, right or wrong, and to be counted or not, where n chains start before each
        of the answer's tokens.

        A token that cannot be drafted is never the choice, which counts as wrong; no chain goes
        along it, so what is said behind it does not count.
        """
        right = windows(answer, self.picks.shape[1])
        return self.probability, self.picks == right, self.led & (right != END)


def windows(answer: Sequence[int], depth: int) -> np.ndarray:
    """What is right at every position of a chain before each token of an answer: (n, K) int32, END
    behind the answer."""
    padded = np.pad(np.asarray(answer, np.int32), (0, depth), constant_values=END)
    return padded[np.arange(len(answer))[:, None] + np.arange(depth)]


class Led:
    """The draw of a chain that goes along a text (K,) and is free at one position, where it is an
    answer's own; a `drafters.Draw`. own: None for a greedy answer."""

    def __init__(self, text: mx.array, free: int, own: Draw | None) -> None:
        self.temperature = mx.array(1.0) if own is None else own.temperature
        self._text, self._free, self._own = text, free, own

    def noise(self, ahead: int, tokens: mx.array) -> mx.array:
        """(M,) -> (1, M)."""
        if ahead < self._free:
            return mx.where(tokens == self._text[ahead : ahead + 1], _FAR, 0.0)[None]
        return mx.zeros((1, 1)) if self._own is None else self._own.noise(ahead, tokens)


Propose = Callable[[TreeShape, Draw | None], Sequence[Candidates]]


def proposing(model: Model, state: State, history: mx.array | None) -> Propose:
    """What a model's drafter proposes from a state."""
    drafter, (root, position, caches, states, _, pending, _) = model.drafter, state
    assert drafter is not None, "whoever asks has one"
    which = model.engine.drafters.index(drafter)

    def propose(shape: TreeShape, draw: Draw | None) -> Sequence[Candidates]:
        # A pass is used up by whoever drafts with it.
        runs = passes([model.target, *model.engine.drafters], caches, position, pending)
        ask = Ask(root, position, history, shape, draw, runs[1 + which])
        return drafter.propose(states[which], ask)

    return propose


@contextlib.contextmanager
def trusted(drafter: Drafter, calibration: Calibration) -> Iterator[None]:
    """What is traced meanwhile, is traced with this calibration."""
    own, drafter.calibration = drafter.calibration, calibration
    try:
        yield
    finally:
        drafter.calibration = own


def led_choices(propose: Propose, text: mx.array, draw: Draw | None) -> tuple[mx.array, ...]:
    """A drafter's choice at every position of a chain along text (K,), in one graph. draw: of the
    answer, None if it is greedy.

    Returns:
        token ids, negative log-probabilities, led or not: (K,) each.
    """
    tokens, surprises, led = [], [], []
    for k in range(text.shape[0]):
        chain = propose(TreeShape.chain(k + 1), Led(text, k, draw))[0]
        path = chain.paths.reshape(-1)
        tokens.append(path[k + 1 : k + 2])
        # What it is led along is certain: the cost is the last token's alone.
        surprises.append(chain.costs.reshape(-1))
        led.append(mx.all(path[1 : k + 1] == text[:k], keepdims=True))
    return mx.concatenate(tokens), mx.concatenate(surprises), mx.concatenate(led)


class Silent:
    """A drafter that goes along as another one does, and proposes what nobody accepts. Where it
    were not asked at all, its rows would not be made."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def propose(self, state: Any, ask: Ask) -> list[Candidates]:
        path = mx.concatenate([ask.root, integers([FILLER, END])])
        return [Candidates(path[None], mx.array([0.0]), (1,))]


class Watched(Engine):
    """Runs as another engine does, a token a step, and shows every state before the step that
    starts from it."""

    def __init__(self, engine: Engine) -> None:
        silent: list[Any] = [Silent(drafter) for drafter in engine.drafters]
        super().__init__(engine.target, silent, engine.compiled)
        self.on_state: Callable[[State], None] = lambda state: None

    def step_function(self, spec: StepSpec) -> StepFunction:
        step = super().step_function(spec)

        def watched(state: State, arrays: Arrays) -> tuple[mx.array, State]:
            self.on_state(state)
            return step(state, arrays)

        return watched

    def along(
        self, prompt: Sequence[int], answer: Sequence[int], sampling: SamplingParams
    ) -> list[int]:
        """Decode an answer again; its tokens, up to where rounding made another of it."""
        request = Request(prompt, sampling, TreeShape.chain(1), len(answer))
        again = [token for step in self.generate(request) for token in step.tokens]
        same = np.array(again) == np.array(answer[: len(again)])
        return again if same.all() else again[: int(same.argmin())]
