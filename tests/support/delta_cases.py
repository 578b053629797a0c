"""Configurations of tiny models with a Gated DeltaNet, and their weights as they are published."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from adapter_cases import TYPES

Weights = dict[str, mx.array]
_LOWER = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")
DELTA_CASES: dict[str, dict[str, Any]] = {
    "qwen3_next": TYPES["qwen3_next"],
    "qwen3_5_moe": TYPES["qwen3_5_moe"],
    # Fewer heads of keys than of values, as all published models have it.
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": {
            **TYPES["qwen3_5"],
            "model_type": "qwen3_5_text",
            "linear_num_key_heads": 2,
            "linear_conv_kernel_dim": 4,
            "linear_value_head_dim": 16,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5,
                "mrope_section": [8, 4, 4],
            },
        },
    },
}  # fmt: skip


def published(weights: Weights, moe: bool) -> Weights:
    """mlx-lm's tensors of a model that sees, as Hugging Face has them: norms one lower, another
    order of axes, experts of gate and up as one, a tower, and a layer that drafts."""
    result: Weights = {"mtp.layers.0.norm.weight": mx.ones(2)}
    if any(name.startswith("language_model.") for name in weights):
        result["model.visual.a"] = mx.ones(2)
    for name, value in weights.items():
        name = name.replace("language_model.model.", "model.language_model.")
        name = name.replace("language_model.lm_head.", "lm_head.")
        if name.endswith(_LOWER) or name.endswith("language_model.norm.weight"):
            value = value - 1.0
        if name.endswith("conv1d.weight"):
            value = value.swapaxes(1, 2)
        result[name] = value
    for name in [n for n in result if moe and n.endswith("switch_mlp.gate_proj.weight")]:
        before = name.partition("switch_mlp.")[0]
        both = [result.pop(f"{before}switch_mlp.{m}_proj.weight") for m in ("gate", "up")]
        result[f"{before}experts.gate_up_proj"] = mx.concatenate(both, axis=1)
        result[f"{before}experts.down_proj"] = result.pop(f"{before}switch_mlp.down_proj.weight")
    return result
