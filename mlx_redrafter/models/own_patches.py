"""Patches of single model types, by the file of mlx_lm.models that they belong to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlx_redrafter.models.forms import Walk
from mlx_redrafter.models.patches import (
    Patch,
    Place,
    absorbed,
    attention,
    conv1d,
    gated_delta,
    query_scales,
    rope,
    routed,
    ssm,
    stepped,
)  # fmt: skip
from mlx_redrafter.models.running import Running


class _Standing:
    """Stands for a library within one module: ``own`` goes before what the library has."""

    def __init__(self, library: Any, **own: Any) -> None:
        self.__dict__.update(own)
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)


def learned_positions(run: Running, library: Any) -> Any:
    """gpt2: `arange(L) + offset`, gpt_bigcode: `arange(offset, offset + L)`."""

    def arange(*args: Any) -> mx.array:
        if len(args) == 1:
            depths: mx.array = run.positions - run.caches.position
            return depths
        return run.positions

    return _Standing(library, arange=arange)


def chunked_positions(run: Running, library: Any) -> Any:
    """llama4: the slots that are seen, the positions, and one more than these."""

    def arange(start: Any, stop: Any) -> mx.array:
        if isinstance(start, int):
            return run.key_positions[: run.mask.shape[1]]
        return run.positions if start is run.offset else run.positions + 1

    return _Standing(library, arange=arange)


def last_positions(run: Running, library: Any) -> Any:
    """minimax_m3_vl: `arange(S - L, S)` are the queries, were the cache full."""

    def arange(*args: Any) -> mx.array:
        return run.positions if len(args) == 2 else library.arange(*args)

    return _Standing(library, arange=arange)


def seen_too(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """llama4's mask of a chunk asks for the order of slots."""

    def call(self: Any, x: mx.array, mask: mx.array, cache: Any = None) -> Any:
        return stock(self, x, mask & run.mask, cache=cache)

    return call


def unscaled_rope(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """A dynamic base changes nothing within the trained positions, where the context ends."""

    def call(self: Any, x: mx.array, offset: Any = 0) -> mx.array:
        base = getattr(self, "original_base", None) or self.base
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=base,
            scale=getattr(self, "scale", 1.0), offset=offset,
        )  # fmt: skip

    return call


def reusing(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """afm7's layers without keys place their queries at the end of those they read."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        rope = self.rope
        self.rope = lambda x, offset: rope(x, offset=run.offset)
        try:
            return stock(self, *args, **options)
        finally:
            del self.rope
            self.rope = rope

    return call


def mamba(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba, which the module walks through itself, a step at a time."""
    at: list[Any] = [None, 0]  # the walk, and how many steps it took

    def call(self: Any, x: mx.array, A: mx.array, state: mx.array) -> Any:
        if any(held is state for _, held in run.read):
            at[:] = [Walk(run.lineage, state) if run.lineage else state, 0]
        before = at[0].before() if run.tree else state
        y, after = stock(self, x, A, before)
        at[1] += 1
        if run.tree:
            if at[0].after(after):
                run.state(at[0].start, at[0].states)
        elif at[1] == run.n:
            run.state(at[0], after)
        return y, after

    return call


def jamba(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba, all steps at once."""

    def call(self: Any, x: mx.array, A: mx.array, state: mx.array) -> Any:
        if not run.tree:
            y, after = stock(self, x, A, state)
            run.state(state, after)
            return y, after
        step = lambda i, before: stock(self, x[:, i : i + 1], A, before)  # noqa: E731
        return stepped(run, state, step), state

    return call


def rnn_scan(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Griffin. The module does not scale the first token of a text, which it tells by a state that
    is not there."""

    def call(x: mx.array, a: mx.array, h0: mx.array) -> Any:
        whole = x / mx.sqrt(1 - a * a).astype(x.dtype)
        x = mx.where((run.positions == 0)[None, :, None], whole, x)
        if not run.tree:
            y, after = stock(x=x, a=a, h0=h0)
            run.state(h0, after)
            return y, after
        step = lambda i, before: stock(x=x[:, i : i + 1], a=a[:, i : i + 1], h0=before)  # noqa: E731
        return stepped(run, h0, step), h0

    return call


def griffin_conv(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, x: mx.array, cache: mx.array) -> Any:
        windows = run.last_rows(run.slot_of(cache), x)  # (N, K, C)
        if not run.tree:
            return stock(self, x=x, cache=cache)
        return stock(self, x=windows[:, -1:], cache=windows[:, :-1])[0].transpose(1, 0, 2), cache

    return call


def lightning(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """Lightning attention."""

    def call(
        q: mx.array, k: mx.array, v: mx.array, g: mx.array, scale: float, h: mx.array,
        mask: Any = None,
    ) -> Any:  # fmt: skip
        if not run.tree:
            y, after = stock(q=q, k=k, v=v, g=g, scale=scale, h=h)
            run.state(h, after)
            return y, after
        step = lambda i, before: stock(  # noqa: E731
            **{n: x[:, :, i : i + 1] for n, x in (("q", q), ("k", k), ("v", v))},
            g=g, scale=scale, h=before,
        )  # fmt: skip
        return stepped(run, h, step, axis=2), h

    return call


def wkv7(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """RWKV 7."""

    def call(self: Any, *args: mx.array) -> Any:
        *rows, state = args
        if not run.tree:
            y, after = stock(self, *args)
            run.state(state, after)
            return y, after
        step = lambda i, before: stock(self, *(x[:, i : i + 1] for x in rows), before)  # noqa: E731
        return stepped(run, state, step), state

    return call


def token_shift(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """The row before a node's own."""

    def call(self: Any, x: mx.array, state: mx.array) -> mx.array:
        every = run.last_rows(run.slot_of(state), x)
        return every[:, :1].transpose(1, 0, 2) if run.tree else every[:, :-1]

    return call


def _flat(x: mx.array) -> mx.array:
    """(1, H, N, D) -> (1, N, H*D)."""
    return x.transpose(0, 2, 1, 3).flatten(2)


def shifted_keys(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """baichuan_m1 mixes keys and values (1, H, N, D) with those of the token before."""

    def call(self: Any, u: mx.array, weights: mx.array, state: mx.array) -> mx.array:
        heads, size = u.shape[1], u.shape[3]
        every = run.last_rows(run.slot_of(state), _flat(u))
        rows = every[:, 0] if run.tree else every[0, :-1]
        before = rows.reshape(1, run.n, heads, size).transpose(0, 2, 1, 3)
        w = weights.reshape(1, heads, 2, 1, 1)
        return before * w[:, :, 0] + u * w[:, :, 1]

    return call


def ngrams(run: Running, stock: Callable[..., Any]) -> Callable[..., Any]:
    """longcat_flash_ngram's embedding reads the tokens before its own."""

    def call(self: Any, tokens: mx.array, cache: Any = None) -> mx.array:
        state = cache[0]
        every = run.last_rows(run.slot_of(state), tokens[..., None])
        if not run.tree:
            return stock(self, every[..., 0])[:, state.shape[1] :]
        return stock(self, every[..., 0])[:, -1:].transpose(1, 0, 2)

    return call


EVERYWHERE: dict[str, Patch] = {
    "scaled_dot_product_attention": attention,
    "gated_delta_update": gated_delta,
    "ssm_update": ssm,
    "_get_llama_4_attn_scale": query_scales,
}
FUNCTIONS: dict[str, dict[str, Patch]] = {
    "gpt2": {"mx": learned_positions},
    "gpt_bigcode": {"np": learned_positions},
    "llama4": {"mx": chunked_positions},
    "minimax_m3_vl": {"mx": last_positions},
    "recurrent_gemma": {"rnn_scan": rnn_scan},
    "bailing_moe_linear": {"recurrent_gla": lightning},
    "bailing_hybrid": {"recurrent_gla": lightning},
}
METHODS: dict[str, dict[str, Patch]] = {
    "llama4.TransformerBlock": {"__call__": seen_too},
    "internlm3.DynamicNTKScalingRoPE": {"__call__": unscaled_rope},
    "rope_utils.DynamicNTKScalingRoPE": {"__call__": unscaled_rope},
    "afm7.KVReuseAttention": {"__call__": reusing},
    "mamba.MambaBlock": {"ssm_step": mamba},
    "jamba.JambaMambaMixer": {"ssm_step": jamba},
    "recurrent_gemma.Conv1d": {"__call__": griffin_conv},
    "rwkv7.Rwkv7TimeMixing": {"_wkv7": wkv7},
    "rwkv7.TokenShift": {"__call__": token_shift},
    "baichuan_m1.Attention": {"_custom_convolution": shifted_keys},
    "longcat_flash_ngram.NgramEmbedding": {"__call__": ngrams},
}
ROWS: dict[str, Callable[[mx.array], mx.array]] = {
    "baichuan_m1": _flat,
    "longcat_flash_ngram": lambda tokens: tokens[..., None],
}
"""How last rows become (1, K-1, C) where a type keeps them otherwise."""
SCALAR = frozenset({"gpt2"})
"""Types that are given one position, as they add the others themselves."""


def places(model: nn.Module) -> list[Place]:
    """The patch points that a model has."""
    classes = {type(module) for module in model.modules()}
    names = {cls.__module__ for cls in classes if cls.__module__.startswith("mlx_lm.")}
    found = [Place(mx.fast, "rope", rope)]
    for name in sorted(names):
        module = sys.modules[name]
        functions = {**EVERYWHERE, **FUNCTIONS.get(name.rpartition(".")[2], {})}
        found += [Place(module, n, patch) for n, patch in functions.items() if hasattr(module, n)]
    if nn.Conv1d in classes:
        found.append(Place(nn.Conv1d, "__call__", conv1d))
    found += [Place(cls, "__call__", routed) for cls in (SwitchGLU, SwitchMLP) if cls in classes]
    latent = {
        type(m) for m in model.modules()
        if "embed_q" in m and "unembed_out" in m and "indexer" not in m
    }  # fmt: skip
    found += [Place(cls, "__call__", absorbed) for cls in sorted(latent, key=lambda c: c.__name__)]
    for cls in sorted(classes, key=lambda c: c.__name__):
        key = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
        found += [Place(cls, n, p) for n, p in METHODS.get(key, {}).items()]
    return found
