"""Real attention of the built-in model and what each sparse prefill keeps of it: one picture.

    python examples/draw_attention.py --patterns docs/smollm2-135m-patterns.json --out FILE

Grey is the attention mass of one head, on a logarithmic scale, by cells of 32 queries and 32 keys;
orange is where a pattern looks, per block of 128 queries, stronger where it keeps more of the keys.
Needs matplotlib, which brings Pillow.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_redrafter import load
from mlx_redrafter.budget.chunks import USUAL as STEP
from mlx_redrafter.evaluation import figures
from mlx_redrafter.evaluation.prompts import long_text

import mlx.core as mx  # isort: skip  (after the package, which chooses the BLAS)
import numpy as np
from PIL import Image

from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.prefill.config import SparsePrefill, read_patterns
from mlx_redrafter.prefill.minference import probabilities
from mlx_redrafter.prefill.reading import read
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Selection
from mlx_redrafter.prefill.sparse import SELECTORS, SparseAttention
from mlx_redrafter.prefill.xattention import everything

CELL = 32
HEADS = ["19.4", "12.4", "10.3", "28.3", "24.3", "20.5"]


@dataclass
class Panel:
    """One head: its attention (n, n) in cells, and the share of keys that is looked at."""

    title: str
    layer: int
    head: int
    options: SparsePrefill
    cells: int
    mass: np.ndarray = field(init=False)
    seen: np.ndarray = field(init=False)
    kept: float = 0.0  # of the mass, of the queries so far
    pairs: float = 0.0  # looked at

    def __post_init__(self) -> None:
        self.mass = np.zeros((self.cells, self.cells))
        self.seen = np.zeros((self.cells, self.cells))

    def take(self, chunk: Chunk) -> None:
        """A chunk of its layer."""
        first, stop = chunk.offset // CELL, chunk.length // CELL
        dense = self._dense(chunk)
        mass = dense.reshape(stop - first, CELL, stop, CELL).sum(axis=(1, 3))
        self.mass[first:stop, :stop] = np.array(mass)
        chosen = SELECTORS[self.options.mode](self.options)(self.layer, chunk)
        for j, number in enumerate(chunk.past_blocks):
            past, end = number * chunk.block, (number + 1) * chunk.block
            keys = np.ones(end)  # the own block is always looked at
            keys[:past] = self._keys(chosen, chunk, j, past)
            self.seen[past // CELL : end // CELL, : end // CELL] = keys.reshape(-1, CELL).mean(
                axis=1
            )
            rows = np.array(dense[j * chunk.block : (j + 1) * chunk.block, :end].sum(axis=0))
            self.kept += float(rows @ keys)
            self.pairs += chunk.block * keys[:past].sum() + chunk.block * (chunk.block + 1) / 2

    def _dense(self, chunk: Chunk) -> mx.array:
        """All attention of the head's queries in a chunk: (n, length)."""
        kv = self.head * chunk.kv_heads // chunk.heads
        slab = chunk.slab[:, mx.array([kv, chunk.kv_heads + kv])]
        q = chunk.q[self.head : self.head + 1]
        alone = Chunk(q, slab, chunk.offset, chunk.block, chunk.scale, chunk.softcap)
        return probabilities(alone, mx.arange(q.shape[1]))[0]

    def _keys(self, chosen: Selection, chunk: Chunk, j: int, past: int) -> np.ndarray:
        """(past,) bool: which keys before query block j are looked at."""
        if not isinstance(chosen, Blocks):
            return np.array(chosen.seen[j][self.head])
        numbers = np.array(chosen.ids[j][self.head * chunk.kv_heads // chunk.heads])
        return np.repeat(np.isin(np.arange(past // chunk.block), numbers), chunk.block)


def capture(panels: Sequence[Panel], length: int) -> None:
    """Read so many tokens of Python's help densely, and show the panels their layers."""
    model, tokenizer = load(drafter=None)
    config = model.target.config

    def select(layer: int, chunk: Chunk) -> Selection:
        for panel in panels:
            if panel.layer == layer:
                panel.take(chunk)
        return everything(chunk)

    tokens = tokenizer.encode(long_text(None))[: length + 1]
    session = Session().open(model.target.caches, capacity_for(length), model.target.dtype)
    options = SparsePrefill("minference", min_context=0, dense_tail=0)
    read(model.target, tokens, session, STEP, sparse=SparseAttention(options, config, None, select))


def draw(panels: Sequence[Panel], length: int, file: Path) -> None:
    """All panels in two rows."""
    figure = figures.new(9.6, 6.9)
    for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
        shown = np.log10(np.maximum(panel.mass / CELL, 1e-5))
        future = np.triu(np.ones_like(shown), 1) > 0
        extent = (0, length, length, 0)
        axes.imshow(np.where(future, np.nan, shown), "Greys", vmin=-4, vmax=0, extent=extent)
        veil = np.zeros((*shown.shape, 4))
        veil[..., :3] = (0.84, 0.37, 0.0)
        veil[..., 3] = np.where((panel.seen > 0) & ~future, 0.1 + 0.45 * panel.seen, 0)
        axes.imshow(veil, extent=extent)
        share = panel.pairs / (length * (length + 1) / 2)
        axes.set_title(
            f"{panel.title}\nlayer {panel.layer}, head {panel.head}: "
            f"{share:.0%} of pairs, {panel.kept / length:.1%} of mass",
            fontsize=7,
        )  # fmt: skip
        axes.tick_params(labelsize=7)
        axes.set_xlabel("key", fontsize=7)
        axes.set_ylabel("query", fontsize=7)
    figures.save(figure, file)
    Image.open(file).convert("RGB").quantize(40, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", type=Path, required=True, help="as bench patterns writes it")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", nargs=6, default=HEADS, help="layer.head of each panel")
    parser.add_argument("--out", type=Path, default=Path("sparse_heads.png"))
    given = parser.parse_args()
    searched = SparsePrefill("minference", patterns=read_patterns(given.patterns))
    kinds = [
        ("MInference, A-shape", searched),
        ("MInference, vertical-slash, more slashes", searched),
        ("MInference, vertical-slash, more columns", searched),
        ("MInference, block-sparse", searched),
        ("XAttention, tau 0.9", SparsePrefill("xattention")),
        ("TriangleMix (upper half of the layers)", SparsePrefill("trianglemix")),
    ]
    places = [place.split(".") for place in given.heads]
    panels = [
        Panel(title, int(layer), int(head), options, given.length // CELL)
        for (title, options), (layer, head) in zip(kinds, places, strict=True)
    ]
    capture(panels, given.length)
    draw(panels, given.length, given.out)


if __name__ == "__main__":
    main()
