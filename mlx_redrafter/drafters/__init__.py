"""Drafters: what proposes the next tokens. The decode step asks them all and joins their answers.

A kind is a file here and a line in ``loading.DRAFTERS``. Plain decoding is no drafter at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlx_redrafter.cache.layer import LayerCache, Pass
from mlx_redrafter.drafters.calibration import Calibration
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.tree.nodes import Candidates, DraftTree
from mlx_redrafter.tree.shape import TreeShape

UNFITTED = Calibration()


class Draw(Protocol):
    """How the target will choose its tokens at the positions behind the root."""

    @property
    def temperature(self) -> mx.array:
        """Scalar."""
        ...

    def noise(self, ahead: int, tokens: mx.array) -> mx.array:
        """What the choice adds to the scores of tokens (M,) so many positions on: (1, M)."""
        ...


class Ask(NamedTuple):
    """What a drafter is asked: root (1,), its position (1,), the tokens by position (C,) where some
    drafter of the model reads them, the tree's shape, and the draw (None: greedy). own: the step's
    pass over the drafter's own caches, if it has any."""

    root: mx.array
    position: mx.array
    history: mx.array | None
    shape: TreeShape
    draw: Draw | None
    own: Pass | None = None


class Verified(NamedTuple):
    """What became of a tree: the pass's features (N rows), the deepest accepted node (1,), how many
    tokens came out (1,), and these, text (L+2,), from the root's on; the target's own token after
    every node, choices (N,), and the root's position (1,). own: as in `Ask`."""

    tree: DraftTree
    read: Features
    last: mx.array
    produced: mx.array
    text: mx.array
    choices: mx.array
    position: mx.array
    own: Pass | None = None


class Drafter(Protocol):
    """What the decode step needs of a drafter. Its state is arrays, one or a tuple of them; every
    method is traced into the step's graph."""

    calibration: Calibration
    """What it proposes under a draw depends on it; set before anything is traced."""

    @property
    def part(self) -> str:
        """Which part of a tree it drafts: ``tree.shape.BEAMS`` or ``TEXT``."""
        ...

    @property
    def features(self) -> tuple[int, ...] | None:
        """Layers of the target that it reads; none: the last hidden state. None: nothing."""
        ...

    @property
    def caches(self) -> Sequence[LayerCache]:
        """What it keeps by position, layer by layer; most keep nothing. It travels with the
        target's caches: put into place along the same paths, grown and cut with them."""
        ...

    def absorb(self, chunk: Chunk, own: Pass) -> None:
        """Add a part of the prompt to its caches. Not asked of those that keep nothing."""
        ...

    def begin(self, read: Features) -> Any:
        """The state after the prompt; ``read`` has the row of its last position but one."""
        ...

    def propose(self, state: Any, ask: Ask) -> Sequence[Candidates]:
        """Candidates in parts, the root first of all. For a tree of one path that path alone."""
        ...

    def commit(self, state: Any, done: Verified) -> Any:
        """The state of the next step. What it adds to its caches waits in ``done.own``."""
        ...


class Forgetful:
    """A drafter that keeps nothing by position."""

    calibration = UNFITTED
    caches: Sequence[LayerCache] = ()

    def absorb(self, chunk: Chunk, own: Pass) -> None:
        pass


class Cell(Protocol):
    """A recurrent network that beam search asks. ``R`` rows are beams, ``Vd`` its vocabulary."""

    @property
    def vocabulary(self) -> mx.array:
        """(Vd,) int32: the target's ids of its tokens."""
        ...

    def context(self, read: mx.array) -> mx.array:
        """What it reads of positions (M, *) -> (M, Dc)."""
        ...

    def start(self, context: mx.array) -> tuple[Any, mx.array]:
        """(Dc,) -> recurrent state (1, S) or a tuple of such, and what stays the same for the whole
        draft."""
        ...

    def step(self, tokens: mx.array, state: Any, fixed: mx.array) -> tuple[mx.array, Any]:
        """Consume tokens (R,) of the target's vocabulary: logits (R, Vd), state (R, S).

        A state of one row, given or returned, is that of all beams.
        """
        ...

    def follow(self, picks: mx.array, state: Any, fixed: mx.array) -> tuple[mx.array, Any]:
        """The same for tokens (R,) of its own vocabulary."""
        ...

    def token_ids(self, picks: mx.array) -> mx.array:
        """Draft-vocabulary indices -> token ids of the target."""
        ...
