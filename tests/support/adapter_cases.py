"""Tiny random models of mlx_lm, and what a tree over them must be: single steps of mlx_lm."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.models import Decoder, Target, decoder_config
from mlx_redrafter.models.adapter import AdaptedModel
from mlx_redrafter.models.layout import arranged
from mlx_redrafter.models.loading import sanitize
from mlx_redrafter.models.weights import parameters

Raw = dict[str, Any]
PARENTS = (-1, 0, 0, 1, 1, 2, 3, 6)  # eight nodes, two branchings, five deep
NODE, PREFIX, CAPACITY = 6, 21, 40
LIMIT = 1e-5  # of the largest logit


class Figures(NamedTuple):
    """Differences from mlx_lm's single steps, as parts of the largest logit: of the prompt, of
    single steps, of a tree along every path, and of two tokens behind what was accepted of it."""

    prompt: float
    steps: float
    tree: float
    after: float


TYPES: dict[str, Raw] = json.loads(Path(__file__).with_name("adapter_types.json").read_text())
"""A tiny configuration of every type."""


def module_of(raw: Raw, seed: int = 0, lively: bool = False) -> nn.Module:
    """mlx_lm's module with random float32 weights; lively: whose text is not one word."""
    model_class, arguments = mlx_lm_utils._get_classes(raw)
    model = model_class(arguments.from_dict(copy.deepcopy(raw)))
    mx.random.seed(seed)

    def noisy(value: mx.array) -> mx.array:
        if not mx.issubdtype(value.dtype, mx.floating):
            return value
        matrix = value.ndim in (2, 3) and value.shape[-1] > 4
        scale = 2.5 / value.shape[-1] ** 0.5 if lively and matrix else 0.02
        return (mx.random.normal(value.shape) * scale + value).astype(mx.float32)

    model.update(tree_map(noisy, model.parameters()))
    model.eval()
    return model


def ancestors_of(parents: Sequence[int]) -> tuple[mx.array, mx.array]:
    """(N, N) bool and depths (N,)."""
    paths = [path_to(node, parents) for node in range(len(parents))]
    rows = [[i in path for i in range(len(parents))] for path in paths]
    return mx.array(rows), mx.array([len(path) - 1 for path in paths], mx.int32)


def path_to(node: int, parents: Sequence[int] = PARENTS) -> list[int]:
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def native_of(module: nn.Module, raw: Raw, closed: bool = False) -> Decoder:
    """Our decoder with the weights of mlx_lm's module, its projections joined."""
    weights = arranged(sanitize(parameters(module)), raw)
    model = Decoder(replace(decoder_config(raw, weights.keys()), closed=closed))
    model.load_weights(list(weights.items()))
    for block in model.model.layers:
        block.fuse()
    model.eval()
    return model


class Reader:
    """A model with its caches, run pass by pass."""

    def __init__(self, model: Target, capacity: int = CAPACITY) -> None:
        self.model, self.capacity = model, capacity
        self.caches = new_caches(model.caches, capacity, model.dtype)
        self.pending: Any = ()

    def run(
        self, tokens: Sequence[int], at: int, ancestors: mx.array | None = None,
        positions: mx.array | None = None,
    ) -> mx.array:  # fmt: skip
        """Logits (N, V)."""
        n = len(tokens)
        where = mx.arange(at, at + n, dtype=mx.int32) if positions is None else positions
        slots = mx.arange(self.capacity, dtype=mx.int32)
        mask, key_positions = slots <= where[:, None], slots
        if ancestors is not None:
            mask = mx.broadcast_to(slots < at, (n, self.capacity))
            mask = mx.slice_update(mask, ancestors, mx.array([at]), (1,))
            key_positions = mx.slice_update(slots, where, mx.array([at]), (0,))
        run = Pass(self.caches, mx.array([at], mx.int32), ancestors, self.pending)
        ids = mx.array(list(tokens), mx.int32)
        hidden, _ = self.model(ids, where, mask, key_positions, run)
        logits = self.model.logits(hidden)
        self.caches, self.rows, self.pending = run.caches, run.rows, ()
        mx.eval(logits, self.caches, self.rows)
        return logits

    def step(self, token: int, at: int) -> mx.array:
        """One node that is accepted, as plain decoding has it."""
        logits = self.run([token], at, mx.array([[True]]))
        self.pending = (self.rows, mx.array([at], mx.int32))
        return logits

    def accept(self, path: Sequence[int], at: int, nodes: int) -> None:
        slots = [at + path.index(i) if i in path else self.capacity - 1 for i in range(nodes)]
        self.pending = (self.rows, mx.array(slots, mx.int32))

    def copied(self) -> Reader:
        other = copy.copy(self)
        other.caches = [tree_map(lambda x: x + 0, kept) for kept in self.caches]
        return other


def figures(
    raw: Raw, closed: bool = False, prefix: int = PREFIX, native: bool = False, lively: bool = False
) -> Figures:
    """A model of this configuration through the adapter, or native, against mlx_lm itself."""
    module = module_of(raw, lively=lively)
    model = native_of(module, raw, closed) if native else AdaptedModel(module, raw, closed)
    top = min(100, model.config.vocab_size)
    prompt = mx.random.randint(0, top, (prefix,)).tolist()
    tokens = mx.random.randint(0, top, (len(PARENTS),)).tolist()
    stock = make_prompt_cache(module)
    whole = module(mx.array([prompt]), cache=stock)[0]
    mx.eval(whole, [c.state for c in stock])
    scale = mx.abs(whole).max().item()

    def off(ours: mx.array, theirs: mx.array) -> float:
        return float(
            mx.abs(ours.astype(mx.float32) - theirs.astype(mx.float32)).max().item() / scale
        )

    def single(ids: Sequence[int], cache: list[Any]) -> list[mx.array]:
        return [module(mx.array([[i]]), cache=cache)[0, -1] for i in ids]

    reader = Reader(model)
    prompt_error = off(reader.run(prompt, 0), whole)
    alone = reader.copied()
    steps = [alone.step(token, prefix + i)[0] for i, token in enumerate(tokens)]
    step_error = off(mx.stack(steps), mx.stack(single(tokens, copy.deepcopy(stock))))
    ancestors, depths = ancestors_of(PARENTS)
    tree = reader.run(tokens, prefix, ancestors, prefix + depths)
    tree_error, end = 0.0, stock
    for node in range(len(PARENTS)):
        cache, path = copy.deepcopy(stock), path_to(node)
        tree_error = max(tree_error, off(tree[node], single([tokens[i] for i in path], cache)[-1]))
        end = cache if node == NODE else end
    path = path_to(NODE)
    reader.accept(path, prefix, len(PARENTS))
    at = prefix + len(path)
    after = [reader.step(token, at + i)[0] for i, token in enumerate((5, 7))]
    return Figures(
        prompt_error, step_error, tree_error, off(mx.stack(after), mx.stack(single((5, 7), end)))
    )


def write_module(folder: Path, kind: str, dtype: mx.Dtype = mx.float32, **changes: Any) -> Raw:
    """A folder of a type, as mlx_lm saves it: its config.json, and lively weights."""
    raw = {**TYPES[kind], **changes}
    module = module_of(raw, lively=True)
    module.set_dtype(dtype)
    weights = dict(tree_flatten(module.parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return raw
