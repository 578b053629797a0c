"""Configurations of tiny dense models whose norms, biases or windows are their own."""

from __future__ import annotations

from typing import Any

MIXED = ["sliding_attention", "full_attention"]
LAYER_NORM = {"layer_norm_eps": 1e-5, "norm_epsilon": 1e-5, "norm_eps": 1e-5}
GROWING = {
    "rope_theta": 1e4,
    "rope_type": "default",
    "llama_4_scaling_beta": 0.5,
    "original_max_position_embeddings": 8,
}

DENSE_CASES: dict[str, dict[str, Any]] = {
    "seed_oss": {"model_type": "seed_oss", "head_dim": 16, "attention_bias": True},
    "ministral3": {
        "model_type": "ministral3",
        "layer_types": MIXED,
        "sliding_window": 3,
        "rope_parameters": GROWING,
    },
    "olmo3": {
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "sliding_window": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "glm": {"model_type": "glm", "head_dim": 16, "attention_bias": True},
    "glm4": {
        "model_type": "glm4",
        "head_dim": 16,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    },
    "exaone4": {"model_type": "exaone4", "head_dim": 16, "rope_scaling": None,
                "sliding_window": None, "sliding_window_pattern": None,
                "layer_types": ["full_attention"] * 2},
    "exaone4-window": {"model_type": "exaone4", "head_dim": 16, "rope_scaling": None,
                       "sliding_window": 3, "sliding_window_pattern": "LG",
                       "layer_types": MIXED},
    "cohere2": {
        "model_type": "cohere2",
        "head_dim": 16,
        "sliding_window": 3,
        "sliding_window_pattern": 2,
        "logit_scale": 0.5,
        **LAYER_NORM,
    },
    "muse_glimmer": {
        "model_type": "muse_glimmer",
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 3,
        "tie_word_embeddings": False,
    },
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.5, "tie_word_embeddings": False,
            **LAYER_NORM},
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True, "partial_rotary_factor": 0.5,
                 "tie_word_embeddings": False, **LAYER_NORM},
    "stablelm-parallel": {"model_type": "stablelm", "use_qkv_bias": False,
                          "use_parallel_residual": True, "partial_rotary_factor": 0.5,
                          "tie_word_embeddings": False, **LAYER_NORM},
    "starcoder2": {"model_type": "starcoder2", **LAYER_NORM},
    "nemotron": {"model_type": "nemotron", "hidden_act": "relu2", "partial_rotary_factor": 0.5,
                 "tie_word_embeddings": False, **LAYER_NORM},
}  # fmt: skip
