"""Tiny random models of every supported family, and a plain causal loop over a Decoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
from dense_cases import DENSE_CASES
from expert_cases import EXPERT_CASES, GEMMA4, GEMMA4_CASES, LATENT_CASES
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.models import Decoder
from mlx_redrafter.runtime import blas

Config = dict[str, Any]
V, C, PREFIX = 97, 64, 37
# Bits are equal on a BLAS whose rows do not depend on their number; others only nearly.
TOLERANCE = 0.0 if blas.rows_alone() else 2e-4

BASE: Config = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 1.5, 2.0, 4.0]}
MIXED = ["sliding_attention", "full_attention"]
GRANITE: Config = {
    "logits_scaling": 3.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 5.0,
    "residual_multiplier": 0.3,
    "attention_bias": False,
    "mlp_bias": False,
}
GEMMA3: Config = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "sliding_window": 3,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 24,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
TEXT: Config = {**BASE, **GEMMA3, "model_type": "gemma3_text"}
GEMMA4_TEXT: Config = {**BASE, **GEMMA4, "model_type": "gemma4_text"}
MROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
QWEN3_TEXT: Config = {**BASE, "model_type": "qwen3", "head_dim": 16, "rope_scaling": MROPE}
QWEN3_MOE_TEXT: Config = {
    **BASE,
    **EXPERT_CASES["qwen3_moe"],
    "rope_scaling": MROPE,
    "tie_word_embeddings": False,
}
CASES: dict[str, Config] = {
    "llama": {"model_type": "llama"},
    "llama-untied-biases": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-head_dim": {"model_type": "llama", "head_dim": 24, "num_key_value_heads": 1},
    "llama-llama3": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama-yarn": {"model_type": "llama", "rope_scaling": YARN},
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama-dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "llama-traditional": {"model_type": "llama", "rope_traditional": True},
    "llama-window": {"model_type": "llama", "layer_types": MIXED, "sliding_window": 3},
    "mistral": {"model_type": "mistral", "sliding_window": 8, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 24},
    "gemma3_text": {"model_type": "gemma3_text", **GEMMA3},
    "gemma3": {"model_type": "gemma3", "vocab_size": V, "text_config": TEXT},
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    "phi3-longrope": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "rope_scaling": LONG,
        "original_max_position_embeddings": 32,
    },
    "granite": {"model_type": "granite", **GRANITE},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4},
    "olmo2": {"model_type": "olmo2"},
    **DENSE_CASES,
    **EXPERT_CASES,
    **LATENT_CASES,
    **GEMMA4_CASES,
    "mistral3": {"model_type": "mistral3", "text_config": {**BASE, **DENSE_CASES["ministral3"]}},
    "qwen3_vl": {"model_type": "qwen3_vl", "text_config": QWEN3_TEXT},
    "qwen3_vl_moe": {"model_type": "qwen3_vl_moe", "text_config": QWEN3_MOE_TEXT},
    "gemma4": {"model_type": "gemma4", "vocab_size": V, "text_config": GEMMA4_TEXT},
    "gemma4_unified": {
        "model_type": "gemma4_unified",
        "vocab_size": V,
        "text_config": GEMMA4_TEXT,
    },
}


def build(folder: Path, case: str | Config, dtype: mx.Dtype = mx.float32, **more: Any) -> Config:
    """Write config.json and random weights, in mlx-lm's names, and return the config."""
    config = {**BASE, **(CASES[case] if isinstance(case, str) else case), **more}
    model_class, args_class = mlx_lm_utils._get_classes(config)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    mx.random.seed(7)
    zero_based = config["model_type"].startswith(("gemma2", "gemma3", "muse", "nemotron"))
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        if config["model_type"].startswith("gemma3") and name.endswith("lm_head.weight"):
            continue  # tied
        noise = mx.random.normal(value.shape)
        if name.endswith("norm.weight"):
            weights[name] = 0.3 * noise + (0.0 if zero_based else 1.0)
        else:
            weights[name] = noise * (0.3 if value.ndim == 1 else 1.5 / value.shape[-1] ** 0.5)
    save(folder, config, {name: value.astype(dtype) for name, value in weights.items()})
    return config


def save(folder: Path, config: Config, weights: dict[str, mx.array]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


class Runner:
    """A Decoder with its slabs; positions, masks and slots default to plain causal decoding."""

    def __init__(self, model: Decoder, step: Callable[..., Any] | None = None):
        self.model, self.kv, self.used = model, new_caches(model.caches, C, model.dtype), 0
        self.step = step or (lambda *a: self.forward(*a))

    def forward(self, tokens, positions, mask, key_positions, kv, offset):  # type: ignore[no-untyped-def]
        run = Pass(kv, offset)
        hidden, _ = self.model(tokens, positions, mask, key_positions, run)
        return self.model.logits(hidden), run.caches

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits (N, V) of the next tokens."""
        slots = mx.arange(C)
        positions = self.used + mx.arange(tokens.size)
        mask = slots <= positions[:, None]
        offset = mx.array([self.used])
        logits, self.kv = self.step(tokens, positions, mask, slots, self.kv, offset)
        mx.eval(logits, self.kv)
        self.used += tokens.size
        return logits

    def copy(self) -> Runner:
        other = Runner(self.model, self.step)
        other.kv, other.used = [slab + 0 for slab in self.kv], self.used
        return other


def assert_close(ours: mx.array, theirs: mx.array, tolerance: float = TOLERANCE) -> None:
    assert ours.shape == theirs.shape
    assert mx.abs(theirs).max() > 0.1, "a test on zeros shows nothing"
    error = mx.abs(ours.astype(mx.float32) - theirs.astype(mx.float32)).max().item()
    assert error <= tolerance, error


def tokens_of(n: int, seed: int = 1) -> mx.array:
    return mx.random.randint(0, V, (n,), key=mx.random.key(seed))
