"""Configurations of tiny models with experts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

EIGHT = {"num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
ROUTED: dict[str, Any] = {
    **EIGHT,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}
EXPERT_CASES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        **EIGHT,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 8,
        "shared_expert_intermediate_size": 48,
        "tie_word_embeddings": False,
        **EIGHT,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
                "tie_word_embeddings": False},
    "olmoe": {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 3},
    "glm4_moe": {
        "model_type": "glm4_moe",
        "head_dim": 16,
        "attention_bias": True,
        "rope_scaling": None,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        **ROUTED,
    },
    "glm4_moe-groups": {
        "model_type": "glm4_moe",
        "head_dim": 16,
        "attention_bias": False,
        "rope_scaling": None,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
        **ROUTED,
        "n_group": 4,
        "topk_group": 2,
    },
    "minimax": {
        "model_type": "minimax",
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "shared_intermediate_size": 0,
        "rotary_dim": 8,
        "tie_word_embeddings": False,
    },
    "minimax_m2": {
        "model_type": "minimax_m2",
        "head_dim": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 0,
        "rotary_dim": 12,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        "tie_word_embeddings": False,
    },
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "rope_scaling": None,
    **ROUTED,
}
MSCALED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0,
           "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}  # fmt: skip
LATENT_CASES: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": {"model_type": "glm4_moe_lite", "attention_bias": True, **LATENT},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **LATENT,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": None,
        "rope_scaling": MSCALED,
    },
    "kimi_k2": {"model_type": "kimi_k2", **LATENT},
    "joyai_llm_flash": {"model_type": "joyai_llm_flash", **LATENT},
}
GEMMA4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "sliding_window": 4,
    "sliding_window_pattern": 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "rope_parameters": None,
}
LARGE: dict[str, Any] = {
    **GEMMA4,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
GEMMA4_CASES: dict[str, dict[str, Any]] = {
    "gemma4_text": {"model_type": "gemma4_text", **GEMMA4},
    "gemma4_text-keys": {"model_type": "gemma4_text", **LARGE},
    "gemma4_text-experts": {
        "model_type": "gemma4_text",
        **LARGE,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "moe_intermediate_size": 32,
    },
}


def apart(weights: dict[str, mx.array], names: dict[str, str]) -> dict[str, mx.array]:
    """Stacked experts as Hugging Face stores them: one by one."""
    result = {}
    for name, value in weights.items():
        before, found, rest = name.partition(".switch_mlp.")
        if not found:
            result[name] = value
            continue
        matrix, part = rest.split(".")
        for i in range(value.shape[0]):
            result[f"{before}.experts.{i}.{names.get(matrix, matrix)}.{part}"] = value[i]
    return result
