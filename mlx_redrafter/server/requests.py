"""What the engine takes: one answer to make, without a word of HTTP in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_redrafter.decoding.grammar import Grammar
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.server.reader import Reading
from mlx_redrafter.tree.shape import TreeShape


@dataclass(frozen=True)
class Generation:
    """An answer to make; every option is its own.

    Args:
        prompt: token ids that fit the context.
        sampling: checked against the vocabulary.
        max_tokens: the longest answer, in tokens; -1: to the end of the context.
        stop: strings that end it.
        draft: None: as the model was loaded.
        tree: how much to draft; None: what pays.
        sparse_prefill: how a long prompt is read; None: densely.
        prediction: what the answer may be, token ids to draft from.
        tokens: tell where every token is from. trees: and what every step drafted.
        alone: in no company, but in turns with others that want it, and tell its own time.
        cached: go on from what a former request left, and leave something for others.
        reading: what its text means: thoughts, calls of tools.
        grammar: what it may be; None: anything.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    draft: bool | None = None
    tree: TreeShape | None = None
    sparse_prefill: SparsePrefill | None = None
    prediction: Sequence[int] = ()
    tokens: bool = False
    trees: bool = False
    alone: bool = False
    cached: bool = True
    reading: Reading = field(default_factory=Reading)
    grammar: Grammar | None = None
