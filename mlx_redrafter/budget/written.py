"""A text that a model goes on with, and passes over it: what experts cost must be timed on.

Equal tokens go to the same experts, and random ones to more of them than a text's: either would
measure another model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, Pass
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.decoding.step import verify
from mlx_redrafter.models import Target
from mlx_redrafter.models.experts import distinct
from mlx_redrafter.prefill.reading import USUAL, read
from mlx_redrafter.runtime import clock
from mlx_redrafter.tree.nodes import END, Candidates, DraftTree, best_nodes

_NODES = 16
_SIBLING = 3  # every third node stands beside the one before it


class Written:
    """What a model writes behind so many tokens of a text, and trees of what it nearly wrote.

    Args:
        target: a model with experts.
        text: real tokens, read as often as they fit; none: arbitrary ones.
        position: tokens to read, all of which stay in the cache.
        build: compiles a pass, or not.

    ``distinct`` has the experts that the passes over trees chose, by nodes, after their first run.
    """

    def __init__(
        self,
        target: Target,
        text: Sequence[int],
        position: int,
        build: Callable[[Any], Any],
    ) -> None:
        text = text or [7919 * i % target.config.vocab_size for i in range(position)]
        prompt = [text[i % len(text)] for i in range(position + 1)]
        session = Session().open(target.caches, capacity_for(position + _NODES), target.dtype)
        read(target, prompt, session, USUAL)
        self._target, self._caches, self._position = target, list(session.caches), position
        self._candidates = _tree(*self._write(prompt, session))
        self._run = build(self._pass)
        self.distinct: dict[int, int] = {}

    def timed(self, nodes: int) -> clock.Run:
        """A pass over a tree of so many nodes, behind the text. Two of three follow one another as
        the model writes them, every third is its second choice for the place of the one before."""
        tree = best_nodes(self._candidates, nodes)
        parts = tree.tokens, tree.depths, tree.ancestors
        mx.eval(parts)
        start, caches = mx.array([self._position], mx.int32), self._caches
        tokens, *others = parts
        chosen = start

        def launch() -> Any:
            nonlocal caches, chosen, tokens
            choices, chosen, caches = self._run(tokens, *others, start, caches)
            (tokens,) = mx.depends([tree.tokens], [choices])  # behind this pass
            return tokens, chosen, caches

        passes = clock.launched(launch)

        def once() -> None:
            passes()
            self.distinct[nodes] = cast(int, chosen.item())

        return once

    def _pass(
        self,
        tokens: mx.array,
        depths: mx.array,
        ancestors: mx.array,
        position: mx.array,
        caches: list[Kept],
    ) -> tuple[mx.array, mx.array, list[Kept]]:
        """The choice after every node (N,) int32, the distinct experts () int32, and the caches."""
        target, run, chosen = self._target, Pass(caches, position, ancestors), list[mx.array]()
        tree = DraftTree(tokens, depths, ancestors, tokens[:, None])
        (read,) = verify(target, [(tree, run)], (), chosen.append)
        run.settle(target.caches)
        choices = mx.argmax(target.logits(read.hidden), axis=-1).astype(mx.int32)
        return choices, distinct(chosen), run.caches

    def _write(self, prompt: list[int], session: Session) -> tuple[list[int], list[int]]:
        """The root and what the model writes behind it; and its second choices there."""
        text, second = list(prompt), list[int]()
        for _ in range(_NODES - _NODES // _SIBLING - 1):
            hidden = read(self._target, [*text, 0], session, USUAL).hidden
            logits = self._target.logits(hidden)[0]
            best = mx.argmax(logits)
            others = mx.where(mx.arange(logits.size) == best, -mx.inf, logits)
            text.append(cast(int, best.item()))
            second.append(cast(int, mx.argmax(others).item()))
        return text[len(prompt) - 1 :], second


def _tree(text: list[int], second: list[int]) -> Candidates:
    """Paths, those of smaller trees first. text: the root's token and those behind it."""
    paths, depth = [text[:1]], 0
    for node in range(1, _NODES):
        depth += node % _SIBLING != 0
        last = text[depth] if node % _SIBLING else second[depth - 1]
        paths.append([*text[:depth], last])
    rows = [path + [END] * (depth + 2 - len(path)) for path in paths]
    costs = mx.arange(_NODES, dtype=mx.float32)
    return Candidates(mx.array(rows, mx.int32), costs, tuple(len(path) - 1 for path in paths))
