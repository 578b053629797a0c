"""The ways to decode that are compared: mlx_lm's, and ours with different trees."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.sample_utils import make_sampler

from mlx_redrafter.api import Model
from mlx_redrafter.bench.exactness import in_mlx_lm
from mlx_redrafter.bench.speed.perfect import Replay
from mlx_redrafter.cache.layer import capacity_of
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.policy import Policy
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters.loading import load_drafter
from mlx_redrafter.errors import ModelError, OptionError
from mlx_redrafter.hub import resolve
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.stats import DraftStats
from mlx_redrafter.tree.shape import TreeShape

MLX_LM, MLX_LM_DRAFT, PLAIN, AUTOMATIC = "mlx_lm", "mlx_lm, draft", "plain", "automatic"
PERFECT_NAME = "perfect"
PERFECT = (4, 8, 16)
"""Nodes per pass of the perfect drafter."""


@dataclass(frozen=True)
class Answer:
    """One answer and its time from the end of the first step to the end of the last.

    Neither reading the prompt nor the first step, in which kernels may be compiled, is in it.
    """

    tokens: list[int]
    first: int  # tokens of the first step
    seconds: float
    stats: DraftStats
    capacity: int = 0  # slots of our cache at the end

    @property
    def timed(self) -> int:
        """Tokens that the seconds count for."""
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class Way:
    """A name and a function (prompt, temperature) -> Answer; ``shapes``: those that our own
    decoding may use, none for others."""

    name: str
    decode: Callable[[list[int], float], Answer]
    shapes: tuple[TreeShape, ...] = ()

    @property
    def nodes(self) -> int:
        """The most tokens of a pass."""
        return max((shape.nodes for shape in self.shapes), default=1)

    def most_used(self, stats: DraftStats) -> TreeShape | None:
        """The shape of most steps of an answer."""
        by_name = {str(shape): shape for shape in self.shapes}
        return next((by_name.get(name) for name, _ in stats.shapes.most_common(1)), None)


def automatic(model: Model, max_tokens: int, seed: int, sparse: SparsePrefill | None = None) -> Way:
    """What is drafted when nobody says how much: the policy's choice at every step."""
    shapes = {s for sampled in (False, True) for s in model.budget.policy(sampled).shapes}

    def choose(temp: float) -> Policy:
        return model.budget.policy(sampled=temp > 0)

    decode = _decoder(model.engine, choose, max_tokens, seed, sparse)
    return Way(AUTOMATIC, decode, tuple(sorted(shapes, key=lambda shape: shape.nodes)))


def parse_shape(text: str) -> TreeShape:
    """``3x4/8``: width 3, depth 4, 8 nodes (without ``/8`` all of them); ``1x4`` is a chain;
    ``3x4/8+lookup7`` drafts from the text itself besides, ``lookup7`` only from it.

    Raises:
        OptionError: another form, or a shape that is not possible.
    """
    tree = re.fullmatch(r"(\d+x\d+(?:/\d+)?)?(\+)?(?:lookup(\d+))?", text)
    if tree is None or bool(tree[2]) != bool(tree[1] and tree[3]) or not (tree[1] or tree[3]):
        raise OptionError(
            f"{text!r} is not a tree shape: give WIDTHxDEPTH/NODES as in 3x4/8, 1x4 for a chain, "
            "lookup7, or 3x4/8+lookup7"
        )
    looked = int(tree[3] or 0)
    if not tree[1]:
        return TreeShape(1, 0, looked + 1, lookup=looked)
    width, depth, *given = (int(n) for n in re.split("[x/]", tree[1]))
    nodes = given[0] if given else 1 + width * depth + looked
    return TreeShape(width, depth, nodes, lookup=looked)


def ours(
    model: Model,
    shape: TreeShape,
    max_tokens: int,
    seed: int,
    name: str = "",
    sparse: SparsePrefill | None = None,
) -> Way:
    """Our engine with one tree shape, a fresh session for every answer; ``sparse``: how it reads a
    long prompt."""
    decode = _decoder(model.engine, lambda temp: shape, max_tokens, seed, sparse)
    return Way(name or str(shape), decode, (shape,))


def with_drafter(model: Model, drafter: str) -> Model:
    """The same target with another drafter, by folder or hub id. Raises HubError, DrafterError."""
    folder = resolve(drafter)
    other = load_drafter(folder, model.target)
    compiled = model.engine.compiled
    return Model.of(model.name, model.folder, model.target, other, folder, compiled=compiled)


def named_after(model: Model, *found: Way) -> list[Way]:
    """The ways, named after the folder of the model's drafter besides."""
    assert model.drafter_folder is not None
    return [replace(way, name=f"{way.name}, {model.drafter_folder.name}") for way in found]


def perfect(
    model: Model,
    prompt: Sequence[int],
    answer: Sequence[int],
    max_tokens: int,
    seed: int,
    sparse: SparsePrefill | None = None,
) -> list[Way]:
    """Drafters that know this one answer, for every size of ``PERFECT`` that it fills twice."""
    replay = Replay(model.target, prompt, answer, sparse)
    own = replace(model, engine=Engine(model.target, [replay], model.engine.compiled))
    return [
        ours(own, TreeShape.chain(n - 1), max_tokens, seed, f"{PERFECT_NAME}, {n} nodes", sparse)
        for n in PERFECT
        if 2 * n <= len(answer)
    ]


def mlx_lm(reference: nn.Module, max_tokens: int, seed: int) -> Way:
    """mlx_lm's own plain decoding."""

    def decode(ids: list[int], temp: float) -> Answer:
        mx.random.seed(seed)
        steps = generate_step(
            mx.array(ids), reference, max_tokens=max_tokens, sampler=make_sampler(temp=temp)
        )
        return _timed(([int(token)] for token, _ in steps), 0)

    return Way(MLX_LM, decode)


def mlx_lm_draft(
    reference: nn.Module, draft: nn.Module, num_draft_tokens: int, max_tokens: int, seed: int
) -> Way:
    """mlx_lm's speculative decoding with a small model of the same family."""

    def steps(ids: list[int], temp: float) -> Iterable[list[int]]:
        emitted: list[int] = []
        for token, _, from_draft in speculative_generate_step(
            mx.array(ids), reference, draft, num_draft_tokens=num_draft_tokens,
            max_tokens=max_tokens, sampler=make_sampler(temp=temp),
        ):  # fmt: skip
            emitted.append(int(token))
            if not from_draft:  # the target's own token ends a step
                yield emitted
                emitted = []
        if emitted:
            yield emitted

    def decode(ids: list[int], temp: float) -> Answer:
        mx.random.seed(seed)
        return _timed(steps(ids, temp), num_draft_tokens)

    return Way(MLX_LM_DRAFT, decode)


def load_reference(model: Model) -> nn.Module:
    """The same weights in mlx_lm, computing in the same dtype as ours."""
    return in_mlx_lm(model.folder, model.target.dtype)[0]


def load_draft(name: str, model: Model) -> nn.Module:
    """A draft model for mlx_lm, by folder or hub id, in the target's dtype.

    Raises:
        HubError, ModelError: not found, not readable, or with another vocabulary.
    """
    draft, config = in_mlx_lm(resolve(name), model.target.dtype)
    theirs, needed = config.get("vocab_size"), model.target.config.vocab_size
    if theirs != needed:
        raise ModelError(
            f"{name} has a vocabulary of {theirs} tokens and {model.name} one of {needed}: "
            "a draft model must share the target's tokenizer"
        )
    return draft


def _decoder(
    engine: Engine,
    choose: Callable[[float], TreeShape | Policy],
    max_tokens: int,
    seed: int,
    sparse: SparsePrefill | None,
) -> Callable[[list[int], float], Answer]:
    def decode(ids: list[int], temp: float) -> Answer:
        params, session = SamplingParams(temp=temp, seed=seed), Session()
        stats = DraftStats()
        shape = choose(temp)
        request = Request(ids, params, shape, max_tokens, session, stats, sparse_prefill=sparse)
        steps = engine.generate(request)
        found = _timed((emitted.tokens for emitted in steps), 0)
        capacity = capacity_of(session.kinds, session.caches) or 0
        return Answer(found.tokens, found.first, found.seconds, stats, capacity)

    return decode


def _timed(steps: Iterable[list[int]], drafted: int) -> Answer:
    """Run the steps to their end against the clock; ``drafted`` tokens are checked in each."""
    tokens: list[int] = []
    stats, start, first = DraftStats(), 0.0, 0
    for emitted in steps:
        if not start:
            start, first = time.perf_counter(), len(emitted)
        tokens += emitted
        stats.record(len(emitted), drafted)
    return Answer(tokens, first, time.perf_counter() - start, stats)


def describe(shape: TreeShape | None) -> dict[str, Any] | None:
    """A shape as plain values."""
    if shape is None:
        return None
    return {name: getattr(shape, name) for name in ("width", "depth", "nodes", "lookup")}
