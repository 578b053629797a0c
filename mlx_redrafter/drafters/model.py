"""A small language model drafts for a large one of the same tokenizer.

It reads the text as the target does, a token at a time (Leviathan et al., arXiv 2211.17192), but
drafts a tree: beam search over its next-token distributions, with the noise of the target's choice.
At the start of a step it reads what the step before gave out, the new root last: a chain, which
stands where it belongs as it is written. The rows of beams live as long as the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, LayerCache, Pass
from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.drafters import UNFITTED, Ask, Verified, files
from mlx_redrafter.drafters.beam import lineage, search
from mlx_redrafter.errors import DrafterError, ModelError
from mlx_redrafter.models import AdaptedModel, Loaded, Target, load_model, registry
from mlx_redrafter.models.attention import attend_branches
from mlx_redrafter.models.decoder import Functions
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.models.loading import read_model
from mlx_redrafter.tree.nodes import Candidates, integers
from mlx_redrafter.tree.shape import BEAMS

Text = tuple[mx.array, mx.array] | tuple[()]
"""Tokens (M,) that it has yet to read, and how many there are (1,); () before the first step, where
the root is all."""


@dataclass(frozen=True)
class _Chain(Slab):
    """A slab whose rows are always in place."""

    def nothing(self, kept: mx.array, nodes: int) -> Any:
        return ()


class DraftModel:
    """A model that drafts; a ``drafters.Drafter`` with a cache for each of its layers.

    Args:
        model: the small one.
        vocab_size: ``V`` of the target. Tokens that only one of both has are not drafted.
    """

    part = BEAMS
    calibration = UNFITTED
    features = None

    def __init__(self, model: Loaded, vocab_size: int) -> None:
        self.model = model
        self._size = min(vocab_size, model.config.vocab_size)
        self._kinds = [
            _Chain(kind.heads, kind.size, dtype=model.dtype)
            for kind in cast(Sequence[Slab], model.caches)
        ]
        self.vocabulary = integers(range(self._size))

    @property
    def caches(self) -> Sequence[LayerCache]:
        return self._kinds

    def begin(self, read: Features) -> Text:
        return ()

    def absorb(self, chunk: Chunk, own: Pass) -> None:
        stop = cast(int, chunk.positions[-1].item()) + 1
        slots = mx.arange(stop, dtype=mx.int32)
        mask = slots[None] <= chunk.positions[:, None]
        self.model(self._known(chunk.tokens), chunk.positions, mask, slots, _Own(own, self._kinds))

    def propose(self, state: Text, ask: Ask) -> list[Candidates]:
        assert ask.own is not None
        tokens, count = state or (ask.root, integers([1]))
        hidden = self._read(tokens, count, ask.position, ask.own)
        last = mx.take(hidden, count - 1, axis=0) if hidden.shape[0] > 1 else hidden
        slabs = [ask.own.settled(i, kind) for i, kind in enumerate(self._kinds)]
        cell = Branches(self, slabs, ask.position)
        levels = search(cell, last[0], ask.root, ask.shape, ask.draw, self.calibration)
        return levels[-1:] if ask.shape.one_path else levels

    def commit(self, state: Text, done: Verified) -> Text:
        """What the step gave out is read by the next one; what nobody asked for is read now."""
        assert done.own is not None
        if done.own.fresh:
            tokens, count = state or (done.text[:1], integers([1]))
            self._read(tokens, count, done.position, done.own)
        return done.text[1:], done.produced

    def _read(self, tokens: mx.array, count: mx.array, position: mx.array, own: Pass) -> mx.array:
        """Read tokens (M,), of which so many are text and the last of these is at ``position``;
        what is behind it is written over later. Hidden states (M, D)."""
        rows = tokens.shape[0]
        own.position = position - count + 1
        positions = own.position + integers(range(rows))
        slots = integers(range(own.capacity(self._kinds) or 0))
        mask = slots <= positions.reshape(-1, 1)
        hidden, _ = self.model(self._known(tokens), positions, mask, slots, _Own(own, self._kinds))
        return hidden

    def _known(self, tokens: mx.array) -> mx.array:
        """Tokens that it has; END, and what only the target has, become some token."""
        return mx.clip(tokens, 0, self.model.config.vocab_size - 1)

    def logits(self, hidden: mx.array) -> mx.array:
        """(R, D) -> (R, Vd)."""
        return self.model.logits(hidden)[:, : self._size]


class _Own(Pass):
    """A pass over the small model's own caches, whose rows never wait."""

    def __init__(self, own: Pass, kinds: Sequence[LayerCache]) -> None:
        super().__init__((), own.position)
        self._own, self._kinds = own, kinds

    def extend(self, layer: int, kind: LayerCache, rows: Any) -> Any:
        seen = self._own.extend(layer, self._kinds[layer], rows)
        self._own.leave(layer, ())
        return seen

    def room(self, layer: int, kind: LayerCache) -> int | None:
        return self._own.room(layer, self._kinds[layer])


class _Beside(Pass):
    """A pass of one level: its rows are kept beside the slabs.

    Args:
        beams, position: how many nodes the level has, and where (1,).
        joined: layers read one array, and not two beside each other.
    """

    def __init__(
        self, slabs: Sequence[Kept], rows: dict[int, mx.array], beams: int, position: mx.array,
        joined: bool,
    ) -> None:  # fmt: skip
        super().__init__((), position, mx.eye(beams, dtype=mx.bool_))
        self._slabs, self._branches, self._joined = slabs, rows, joined

    def extend(self, layer: int, kind: LayerCache, rows: mx.array) -> Any:
        before = self._branches.get(layer)
        rows = rows if before is None else mx.concatenate([before, rows], axis=2)
        self._branches[layer] = rows
        slab = self._slabs[layer]
        return mx.concatenate([slab, rows], axis=2) if self._joined else (slab, rows)

    def room(self, layer: int, kind: LayerCache) -> int | None:
        return cast(int, self._slabs[layer].shape[2])


class Branches:
    """The cell of one search, a `drafters.Cell`.

    Args:
        slabs: by layer (1, 2*Hkv, C, Dh), all positions up to the root's.
        position: (1,) int32, the root's.
    """

    def __init__(self, drafter: DraftModel, slabs: Sequence[Kept], position: mx.array) -> None:
        self._drafter, self._slabs, self._position = drafter, slabs, position
        self._slots = integers(range(slabs[0].shape[2]))
        self._rows: dict[int, mx.array] = {}
        self._levels: list[int] = []  # beams of each
        self.vocabulary = drafter.vocabulary

    def context(self, read: mx.array) -> mx.array:
        return read

    def start(self, context: mx.array) -> tuple[mx.array, mx.array]:
        """Hidden state of the root (D,) -> the same (1, D), and nothing else."""
        return context[None], context

    def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> tuple[mx.array, mx.array]:
        """The root was read already. Every other level's state is which rows are above (R, M)."""
        if not self._levels:
            self._levels.append(0)
            return self._drafter.logits(state), mx.zeros((1, 0), mx.bool_)
        beams, depth = tokens.shape[0], len(self._levels)
        above = lineage(state if depth > 1 else None, beams)
        self._levels.append(beams)
        positions = self._position + integers([depth] * beams)
        behind = integers([i for i, n in enumerate(self._levels) for _ in range(n)])
        capacity = self._slots.shape[0]
        seen = mx.broadcast_to(self._slots <= self._position, (beams, capacity))
        # A module of mlx_lm's attends in its own way: it gets the slabs with the rows behind them.
        joined = isinstance(self._drafter.model, AdaptedModel)
        hidden, _ = self._drafter.model(
            self._drafter._known(tokens), positions, mx.concatenate([seen, above], axis=1),
            mx.concatenate([self._slots, self._position + behind]),
            _Beside(self._slabs, self._rows, beams, positions[:1], joined),
            (), Functions() if joined else Functions(_attend(capacity)),
        )  # fmt: skip
        return self._drafter.logits(hidden), above

    def follow(
        self, picks: mx.array, state: mx.array, fixed: mx.array
    ) -> tuple[mx.array, mx.array]:
        return self.step(picks, state, fixed)

    def token_ids(self, picks: mx.array) -> mx.array:
        return picks


def _attend(capacity: int) -> Any:
    """How every layer of a level attends: to so many slots, and to the rows beside them."""

    def attend(q: mx.array, seen: Any, mask: mx.array, scale: float, softcap: float) -> mx.array:
        slab, rows = seen
        return attend_branches(
            q, slab, mask[:, :capacity], rows, mask[:, capacity:], scale, softcap
        )

    return lambda layer: attend


# Files


def is_one(folder: Path, raw: Any, names: Any) -> bool:
    """Is a folder's model a whole language model?"""
    if names and not any("layers.0." in name for name in names):
        return False
    try:
        registry.way(raw)
    except ModelError:
        return False
    return True


def load(folder: Path, target: Target) -> DraftModel:
    """The model in a folder, as a drafter for the target.

    Raises:
        DrafterError: what is wrong with its files, or with its vocabulary.
    """
    try:
        model = load_model(folder)
    except ModelError as error:
        raise DrafterError(str(error)) from None
    _check(model, target, folder)
    return DraftModel(model, target.config.vocab_size)


def check(folder: Path, target: Target) -> None:
    """Configuration and tensors. Raises DrafterError."""
    try:
        model, _ = read_model(folder)
    except ModelError as error:
        raise DrafterError(str(error)) from None
    _check(model, target, folder)


def _check(model: Loaded, target: Target, folder: Path) -> None:
    """Sizes of one family differ by padding only. Raises DrafterError."""
    config, reason = model.config, model.config.not_attention
    if not reason and not all(isinstance(kind, Slab) for kind in model.caches):
        reason = "recurrences or short convolutions, which read one text at a time"
    if reason:
        raise DrafterError(
            f"the model in {folder} has {reason}, and cannot draft: use a small model without, or "
            "no drafter"
        )
    size, theirs = config.vocab_size, target.config.vocab_size
    if abs(size - theirs) > max(size, theirs) // 50:
        raise DrafterError(
            f"the model in {folder} has {size} tokens, but this model has {theirs}: a drafting "
            "model must have the same tokenizer; use a small one of the same family"
        )


def describe(folder: Path) -> files.Description:
    """What the files say of the model. Raises DrafterError."""
    try:
        model, given = read_model(folder)
    except ModelError as error:
        raise DrafterError(str(error)) from None
    config = model.config
    per_level = {name: value for name, value in given.items() if config.tied or "embed" not in name}
    facts = {
        "architecture": f"{config.model_type} of {config.num_layers} layers",
        "head": "own",
        "draft_vocabulary": config.vocab_size,
    }
    return files.Description(facts, given, per_level, config.hidden_size)
