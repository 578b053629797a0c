"""A perfect drafter that costs next to nothing: it replays an answer that is known already.

What is left between its speed and the best possible one is the loop around the passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_redrafter.budget.costs import bare_pass
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.drafters.beam import BeamDrafter
from mlx_redrafter.models import Target
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.reading import USUAL, read
from mlx_redrafter.prefill.sparse import SparseAttention

_WRONG = -1000.0  # far below the right draft, at any temperature and whatever the noise
_SIZES = 64  # the known text is padded to a multiple, so that few kernels serve all answers


class Replay(BeamDrafter):
    """Drafts what is known to follow; it recognises the place by the target's hidden state.

    Its vocabulary are the ``T`` places of the known text, so that a draft costs T values and not
    V. The real step runs around it: beam search (a chain), verify, walk and commit.

    Args:
        target: the model.
        prompt: token ids.
        answer: what the target answers.
        sparse: how the prompt is read, which its hidden states depend on; None: densely.
    """

    def __init__(
        self,
        target: Target,
        prompt: Sequence[int],
        answer: Sequence[int],
        sparse: SparsePrefill | None = None,
    ) -> None:
        text = [*prompt, *answer]
        first = max(0, len(prompt) - 2)  # the place that predicts the first root
        following = mx.array([*text[first + 1 :], 0], mx.int32)
        hidden = _hidden(target, prompt, answer, sparse).astype(mx.float32)
        more = -following.shape[0] % _SIZES
        self._tokens = mx.pad(following, (0, more))  # (T,) the token after each place
        self._hidden = mx.pad(hidden, [(0, more), (0, 0)], constant_values=1e9)  # (T, D)
        mx.eval(self._tokens, self._hidden)

    def context(self, read: mx.array) -> mx.array:
        return read

    def start(self, context: mx.array) -> tuple[mx.array, mx.array]:
        distance = mx.square(self._hidden - context[None]).sum(-1)
        return mx.argmin(distance).astype(mx.int32).reshape(1, 1), context

    def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> tuple[mx.array, mx.array]:
        state = state + 1  # (R, 1) the place of the token consumed
        places = mx.arange(self._tokens.shape[0], dtype=mx.int32)
        return mx.where(places[None] == state, 0.0, _WRONG), state

    follow = step  # the tokens do not matter

    def token_ids(self, picks: mx.array) -> mx.array:
        return mx.take(self._tokens, picks)

    @property
    def vocabulary(self) -> mx.array:
        return self._tokens


def _hidden(
    target: Target, prompt: Sequence[int], answer: Sequence[int], sparse: SparsePrefill | None
) -> mx.array:
    """The final hidden states after the last two tokens of the prompt, which is read as the engine
    reads it, and after every token of the answer: (T, D)."""
    last, capacity = len(prompt) - 1, capacity_for(len(prompt) + len(answer))
    session = Session().open(target.caches, capacity, target.dtype)
    attention = SparseAttention(sparse, target.config) if sparse is not None else None
    before = read(target, prompt, session, USUAL, sparse=attention).hidden
    ids = mx.array([prompt[last], *answer], mx.int32)
    hidden, _ = bare_pass(target)(ids, mx.array([last], mx.int32), session.caches)
    return mx.concatenate([before, hidden]) if last else hidden
