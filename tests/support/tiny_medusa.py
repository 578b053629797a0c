"""Tiny Medusa heads in every layout, and what they say by plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from conftest import D, V
from tiny_heads import Weights, noise, write

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)
from mlx_redrafter.drafters.loading import check_folder, load_drafter
from mlx_redrafter.drafters.medusa import Medusa
from mlx_redrafter.models import Decoder

K = 3
Dialect = tuple[dict[str, Any], Weights, str]


def heads(layers: int = 1, seed: int = 0) -> dict[str, Any]:
    """W, b by head and block, U by head."""
    rng = np.random.default_rng(seed)
    return {
        "W": [[noise(rng, D, D) for _ in range(layers)] for _ in range(K)],
        "b": [[noise(rng, D, scale=1.0) for _ in range(layers)] for _ in range(K)],
        "U": [noise(rng, V, D, scale=3.0) for _ in range(K)],
    }


def reference(h: dict[str, Any], hidden: np.ndarray) -> np.ndarray:
    """Logits of all heads in float64: (K, V)."""
    rows = []
    for blocks, biases, output in zip(h["W"], h["b"], h["U"], strict=True):
        x = hidden.astype(np.float64)
        for w, b in zip(blocks, biases, strict=True):
            z = w.astype(np.float64) @ x + b
            x = x + z / (1 + np.exp(-z))
        rows.append(output.astype(np.float64) @ x)
    return np.stack(rows)


def blocks(h: dict[str, Any], form: str) -> Weights:
    return {
        form.format(k, i, part): h[key][k][i]
        for k in range(K)
        for i in range(len(h["W"][0]))
        for key, part in (("W", "weight"), ("b", "bias"))
    }


def outputs(h: dict[str, Any], form: str) -> Weights:
    return {form.format(k, len(h["W"][0])): h["U"][k] for k in range(K)}


BASE = {
    "model.embed_tokens.weight": np.ones((V, D), np.float32),
    "lm_head.weight": np.ones((V, D), np.float32),
}


def medusa_1(h: dict[str, Any]) -> Dialect:
    """The uploaded files say 2 heads, whatever they hold."""
    weights = blocks(h, "{}.{}.linear.{}") | outputs(h, "{}.{}.weight")
    return {"medusa_num_heads": 2, "medusa_num_layers": 1}, weights, "medusa_lm_head.safetensors"


def medusa_2(h: dict[str, Any]) -> Dialect:
    """A whole model."""
    form = "medusa_head.{}.{}."
    weights = blocks(h, form + "linear.{}") | outputs(h, form + "weight") | BASE
    config = {"model_type": "llama", "hidden_size": D, "vocab_size": V, "medusa_num_heads": K}
    return config, weights, "model.safetensors"


def modelopt(h: dict[str, Any]) -> Dialect:
    form = "medusa_heads.{}.{}."
    weights = blocks(h, form + "linear.{}") | outputs(h, form + "weight") | BASE
    nested = {"num_medusa_heads": K, "num_medusa_layers": 1}
    return {"model_type": "llama", "medusa": nested}, weights, "model.safetensors"


def tensorrt(h: dict[str, Any]) -> Dialect:
    weights = blocks(h, "medusa_heads.{}.medusa_layers.{}.linear.{}")
    weights |= outputs(h, "medusa_heads.{}.lm_head.weight") | BASE
    config = {"num_medusa_heads": K, "hidden_size": D, "vocab_size": V, "medusa_hidden_act": "silu"}
    return config, weights, "rank0.safetensors"


def vllm(h: dict[str, Any]) -> Dialect:
    weights = blocks(h, "blocks.{}.layers.{}.{}") | outputs(h, "lm_heads.{}.weight")
    config = {"model_type": "medusa", "hidden_size": D, "vocab_size": V, "num_heads": K}
    return config, weights, "model.safetensors"


def vllm_wrapped(h: dict[str, Any]) -> Dialect:
    config, weights, file = vllm(h)
    return config, {f"medusa_heads.{name}": value for name, value in weights.items()}, file


def by_names_alone(h: dict[str, Any]) -> Dialect:
    """Nothing but the names of the tensors says what it is."""
    return {}, medusa_1(h)[1], "model.safetensors"


DIALECTS: dict[str, Callable[[dict[str, Any]], Dialect]] = {
    f.__name__: f
    for f in (medusa_1, medusa_2, modelopt, tensorrt, vllm, vllm_wrapped, by_names_alone)
}


def loaded(folder: Path, dialect: Dialect, target: Decoder) -> Medusa:
    config, weights, file = dialect
    drafter = load_drafter(write(folder, config, weights, file), target)
    check_folder(folder, target)
    assert isinstance(drafter, Medusa)
    return drafter
