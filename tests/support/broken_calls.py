"""Arguments of the Python API that are not what it takes."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter import generate, load, stream_generate

THINGS: list[Any] = [
    None, True, -1, 0, 1, 3.5, 2**63, 10**40, float("nan"), float("inf"), "", "text", "\0",
    "\ud800", b"bytes", [], [1, 2], ["a"], [None], [-1], [10**9], [1.5], [[1, 2], [3]], (), (1,),
    {}, {"a": 1}, {1: 2.0}, {1: "x"}, {"1": float("nan")}, {-1: 1.0}, {10**9: 1.0}, {None: 1},
    set(), object(), Path("nowhere"), Path("."), np.int64(3), np.float32(0.5), np.array([1, 2]),
    np.array([[1.5]]), mx.array([1, 2, 3]), mx.array([[1, 2]]), mx.array([0.5]), mx.array(3),
    range(3), iter([1]), [{"role": "user", "content": "hi"}], [{"role": 3}], 1j,
    {"role": "user", "content": "hi"},
]  # fmt: skip
OPTIONS = [
    "max_tokens", "temp", "top_p", "top_k", "min_p", "repetition_penalty",
    "repetition_context_size", "presence_penalty", "presence_context_size", "frequency_penalty",
    "frequency_context_size", "logit_bias", "seed", "stop", "prefill_step_size", "tree", "session",
    "sparse_prefill", "prompt_progress_callback", "unheard_of", "sampler", "logits_processors",
    "verbose", "prompt_cache", "draft_model", "kv_bits", "max_kv_size", "formatter", "temperature",
]  # fmt: skip


@functools.cache
def loaded(world: Path) -> tuple[Any, Any]:
    return load(str(world / "model"), str(world / "drafter"))


def broken_call(random: random.Random, world: Path, number: int) -> tuple[str, Callable[[], Any]]:
    """What is wrong, and a call with it."""
    way = number % 6
    thing = random.choice(THINGS)
    if way == 0:
        name = random.choice([n for n in signature(load).parameters if n != "lazy"])
        given = {"drafter": None, name: thing}
        first = next(iter(signature(load).parameters))
        given.setdefault(first, str(world / "model"))
        return f"load({given})", lambda: load(**given)
    model, tokenizer = loaded(world)
    if way == 1:
        return f"prompt {thing!r}", lambda: generate(model, tokenizer, thing, max_tokens=2)
    if way == 2:
        pair = random.choice([(thing, tokenizer), (model, thing), (tokenizer, model)])
        return f"for {pair}", lambda: generate(*pair, "hi", max_tokens=2)
    names = random.sample(OPTIONS, random.choice([1, 1, 2]))
    given = {"max_tokens": 2, **{name: random.choice(THINGS) for name in names}}
    huge = given["max_tokens"]
    if isinstance(huge, (int, float)) and not isinstance(huge, bool) and not -1 < huge < 100:
        given["stop"] = [chr(c) for c in range(256)]  # else it writes to the end of the context
    if way == 3:
        return f"generate {given}", lambda: generate(model, tokenizer, "hi", **given)
    return f"stream {given}", lambda: list(stream_generate(model, tokenizer, "hi", **given))
