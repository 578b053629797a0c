"""What beams that begin alike save: nodes of a draft tree against tokens of all its candidates.

ReDrafter packs its beams into a tree in which every common beginning is checked once (arXiv
2403.09919, 3.2). A search of depth L holds those of all smaller depths, so one run of a width tells
of all: at depth d the candidates are the W beams of that level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.api import Model, stream_generate
from mlx_redrafter.evaluation.acceptance import TEMPERATURES
from mlx_redrafter.evaluation.prompts import Prompt
from mlx_redrafter.tree.shape import TreeShape
from mlx_redrafter.tree.told import ToldTree

WIDTHS, DEPTH, NODES = (2, 3, 4, 8, 16), 5, 8


@dataclass
class Shared:
    """Beams of one width, depth and temperature: drafted ``tokens`` of all of them, each as long as
    the depth, and ``nodes`` of the trees that hold them; roots not counted."""

    temp: float
    width: int
    depth: int
    tokens: int = 0
    nodes: int = 0

    @property
    def saved(self) -> float:
        """Share of the tokens that need no node of their own."""
        return 1 - self.nodes / self.tokens if self.tokens else 0.0

    def add(self, tree: ToldTree) -> None:
        """A step's beams, all candidates of a search at least so deep."""
        kept, beams = held(tree, self.depth)
        self.tokens += beams * self.depth
        self.nodes += kept

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "saved": round(self.saved, 4)}


def held(tree: ToldTree, depth: int) -> tuple[int, int]:
    """How many nodes the beams of a depth have, each once, and how many beams they are."""
    paths: list[tuple[int, ...]] = [()]  # numbers of nodes, by node; the root is on none
    for number, node in enumerate(tree.nodes[1:], 1):
        paths.append((*paths[node.parent], number))
    beams = [path for path in paths if len(path) == depth]
    return len({number for path in beams for number in path}), len(beams)


def measure(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 128,
    on_answer: Callable[[], None] = lambda: None,
) -> list[Shared]:
    """Decode every prompt with every width, greedy and sampled. ``on_answer`` is called after each.

    Eight nodes of the tree are checked, whatever the width: what is counted is drafted before that.
    """
    rows = {
        (temp, width): [Shared(temp, width, depth + 1) for depth in range(DEPTH)]
        for temp in TEMPERATURES
        for width in WIDTHS
    }
    for prompt in prompts:
        ids = prompt.encode(tokenizer)
        for (temp, width), row in rows.items():
            shape = TreeShape(width, DEPTH, NODES)
            for response in stream_generate(
                model, tokenizer, ids, max_tokens, tree=shape, temp=temp, trees=True
            ):
                if response.tree is not None:
                    for shared in row:
                        shared.add(response.tree)
            on_answer()
    return [shared for row in rows.values() for shared in row]
