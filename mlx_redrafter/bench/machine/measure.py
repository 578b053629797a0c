"""The parts of a machine's report: each is measured by itself, and one that fails says so."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.api import Model, stream_generate
from mlx_redrafter.bench.machine import probe
from mlx_redrafter.budget.costs import FAR, NEAR, timed_pass
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.engine import Engine
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.evaluation.prompts import read_prompts
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.weights import parameters
from mlx_redrafter.runtime import clock, metal
from mlx_redrafter.runtime.device import device, dtype_name
from mlx_redrafter.tree.shape import TreeShape

SHAPES = {"plain": TreeShape.plain(), "chain of 4": TreeShape.chain(4), "tree": TreeShape()}
GENERATIONS = {13: "M1", 14: "M2", 15: "M3", 16: "M4", 17: "M5"}
_GROUP = 64
_ROOM = {"gpu": 2**30, "cpu": 2**23}  # weights, but for the vocabulary's, that passes are timed on
_SEED = 11


@dataclass(frozen=True)
class Effort:
    """How much is measured. sizes: tokens of a pass; contexts: tokens cached; bits: of a weight,
    16: not quantised; tokens: of an answer; prompts: answers."""

    sizes: Sequence[int] = tuple(range(1, 17))
    contexts: Sequence[int] = (NEAR, FAR)
    bits: Sequence[int] = (4, 8, 16)
    tokens: int = 64
    prompts: int = 3
    rounds: int = 3


Part = tuple[str, str, Callable[[], Any]]
"""A name, what is done in a few words, and what does it."""


def parts(model: Model, tokenizer: Any, effort: Effort) -> Iterator[Part]:
    """Everything, in the order in which it is measured: what is compiled comes first, as only a
    new engine has to."""
    yield "compiling", "what is compiled first", lambda: compiling(model)
    yield "kernels", "which kernels the layers take", lambda: kernels(model.target.config)
    yield "answers", "answers, plain and drafted", lambda: answers(model, tokenizer, effort)
    yield "buffers", "command buffers of a step", lambda: buffers(model)
    for bits in effort.bits:
        said = f"passes with weights of {bits} bits"
        yield f"passes, {bits} bits", said, partial(passes, model, bits, effort)
    yield "memory", "memory", memory


def compiling(model: Model) -> dict[str, dict[str, float]]:
    """Seconds of a first short answer with each shape, all kernels and graphs included, and of
    the same again."""
    engine = Engine(model.target, model.engine.drafters, model.engine.compiled)
    found = {}
    for name, shape in SHAPES.items():
        times = []
        for _ in range(2):
            start = time.perf_counter()
            asked = Request([1, 2, 3, 4], SamplingParams(), shape, 4, Session())
            for _ in engine.generate(asked):
                pass
            times.append(round(time.perf_counter() - start, 4))
        found[name] = {"first": times[0], "again": times[1]}
    return found


def kernels(config: Any) -> dict[str, Any]:
    """By the rules of MLX: what attention takes for 1 to 16 queries and for a prompt, and what a
    4-bit product takes on each generation of chips."""
    layers = [config.layer(i) for i in range(config.num_layers)]
    shapes = {
        (layer.num_heads, layer.num_kv_heads, layer.head_dim)
        for layer in layers
        if layer.delta is None and layer.latent is None
    }
    attention = {
        f"{heads}/{kv} x {size}": {
            "queries": _runs([_attention(n, heads, kv, size) for n in range(1, 17)]),
            "prompt": metal.attention_kernel(512, heads, kv, size),
        }
        for heads, kv, size in sorted(shapes)
    }
    wide, inner = config.hidden_size, config.widest_row
    sizes = {(wide, wide), (wide, inner), (inner, wide), (wide, config.vocab_size)}
    products = {
        f"{inputs} to {outputs}": {
            name: _runs([metal.product_kernel(n, inputs, outputs, chip) for n in range(1, 17)])
            for chip, name in GENERATIONS.items()
        }
        for inputs, outputs in sorted(sizes)
    }
    return {"attention": attention, "products": products}


def _attention(n: int, heads: int, kv: int, size: int) -> str:
    calls = metal.attention_calls(n, heads, kv, size)
    kernel = metal.attention_kernel(calls[0] if calls else n, heads, kv, size)
    return f"{kernel}, {len(calls)} calls" if len(calls) > 1 else kernel


def _runs(names: Sequence[str]) -> str:
    """a, a, b -> "1-2 a, 3 b"."""
    done, shown = 1, []
    for name, those in itertools.groupby(names):
        count = len(list(those))
        shown.append(f"{done}-{done + count - 1} {name}" if count > 1 else f"{done} {name}")
        done += count
    return ", ".join(shown)


def answers(model: Model, tokenizer: Any, effort: Effort) -> list[dict[str, Any]]:
    """Every prompt plainly and drafted, each once before the clock; greedy."""
    found = []
    for prompt in read_prompts(count=effort.prompts):
        ids = prompt.encode(tokenizer)
        row: dict[str, Any] = {"group": prompt.group}
        texts: dict[str, list[int]] = {}
        for name, draft in (("plain", False), ("drafted", True)):
            for clocked in (False, True):
                tokens = effort.tokens if clocked else 8
                heard = list(
                    stream_generate(
                        model, tokenizer, ids, tokens, draft=draft, session=Session(),
                        margins=clocked,
                    )
                )  # fmt: skip
            last, texts[name] = heard[-1], [one.token for one in heard]
            row[name] = {
                "tokens_per_second": round(last.generation_tps, 2),
                "prompt_tokens_per_second": round(last.prompt_tps, 2),
                "stats": last.stats.as_dict(),
            }
        pairs = zip(texts["plain"], texts["drafted"], strict=False)
        parted = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        found.append({**row, "prompt_tokens": len(ids), "parted_at": parted})
    return found


def buffers(model: Model) -> dict[str, Any]:
    """The limit of launches in a command buffer; on a GPU a plain step with it and without."""
    weights = sum(value.nbytes for value in parameters(model.target).values())
    advised = metal.ops_per_buffer(model.target.config.num_layers, weights)
    known = {"limit": metal.limit(), "advised": advised}
    return {**known, **probe.both(model.folder)} if device() == "gpu" and advised else known


def passes(model: Model, bits: int, effort: Effort) -> dict[str, Any]:
    """Milliseconds of passes over so many tokens, of a model of the same sizes with random weights
    of so many bits; of as many layers as have room."""
    few = _random(model, bits)
    build: Any = mx.compile if model.engine.compiled else lambda f: f
    found: dict[str, dict[str, float]] = {}
    longest = few.config.max_positions - max(effort.sizes)
    for context in sorted({min(context, longest) for context in effort.contexts}):
        runs = {n: timed_pass(few, n, context, build) for n in effort.sizes}
        seconds = clock.fastest_pass(runs, effort.rounds, warm=True)
        found[str(context)] = {str(n): round(1e3 * t, 3) for n, t in seconds.items()}
    return {
        "layers": few.config.num_layers,
        "of_layers": model.target.config.num_layers,
        "dtype": dtype_name(few.dtype),
        "milliseconds": found,
    }


def _random(model: Model, bits: int) -> Decoder:
    """Sizes as the model's; on a CPU float32 stands for what is not quantised."""
    config = model.target.config
    whole = Decoder(config)
    blocks = sum(value.size for value in parameters(whole.model.layers[0]).values())
    fits = max(1, _ROOM[device()] // blocks)
    few = Decoder(replace(config, num_layers=min(config.num_layers, fits)))
    mx.random.seed(_SEED)
    few.set_dtype(mx.float16 if device() == "gpu" else mx.float32)
    if bits < 16:
        nn.quantize(
            few, _GROUP, bits,
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized") and m.weight.shape[-1] % _GROUP == 0
            ),
        )  # fmt: skip
    for block in few.model.layers:
        block.fuse()
        mx.eval(block.parameters())
    mx.eval(few.parameters())
    return few


def memory() -> dict[str, float]:
    """GB of MLX: the most at a time, what is in use, and what is kept for reuse."""
    found = {"peak": mx.get_peak_memory(), "active": mx.get_active_memory()}
    return {
        name: round(size / 1e9, 3)
        for name, size in {**found, "kept": mx.get_cache_memory()}.items()
    }
