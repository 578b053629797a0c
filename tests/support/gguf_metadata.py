"""What llama.cpp's converter writes of a model into a GGUF file's metadata: set_gguf_parameters of
the classes in conversion/*.py, by architecture."""

from __future__ import annotations

import numpy as np
from tiny_gguf import BOOL, F32, STRING, U32


def metadata_of(arch, config):
    """Every key of the architecture, without its name, with its type."""
    found = {**_common(config), **SPECIAL.get(arch, lambda config: {})(config)}
    return {key: _typed(value) for key, value in found.items() if value is not None}


def rope_tensors(arch, config):
    """generate_extra_tensors: factors of frequencies."""
    rope = _rope(config)
    if arch == "gemma4":
        return {"rope_freqs.weight": _floats([1.0] * 4 + [1e30] * 12)}
    if not rope.get("long_factor"):
        return {}
    kinds = ("long", "short")
    return {f"rope_factors_{k}.weight": _floats(rope[f"{k}_factor"]) for k in kinds}


def _floats(values):
    return "F32", (len(values),), np.array(values, np.float32).tobytes()


def _typed(value):
    first = value[0] if isinstance(value, list) else value
    return {bool: BOOL, int: U32, float: F32, str: STRING}[type(first)], value


def _rope(config):
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("full_attention", rope)


def _head(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _part(config):
    part = int(_head(config) * config.get("partial_rotary_factor", 1.0))
    return {"rope.dimension_count": part}


def _window(config):
    return {"attention.sliding_window": config["sliding_window"]}


def _common(config):
    """TextModel.set_gguf_parameters of conversion/base.py."""
    rope = _rope(config)
    kind = rope.get("rope_type") or rope.get("type")
    scaling = {}
    if kind in ("linear", "yarn"):
        scaling = {"type": kind, "factor": float(rope["factor"])}
    if kind == "yarn":
        scaling["original_context_length"] = rope["original_max_position_embeddings"]
        if "beta_fast" in rope:
            scaling["yarn_beta_fast"] = float(rope["beta_fast"])
            scaling["yarn_beta_slow"] = float(rope["beta_slow"])
    layer_eps = config.get("layer_norm_eps", config.get("norm_epsilon"))
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.layer_norm_epsilon": layer_eps,
        "rope.freq_base": float(rope.get("rope_theta", config["rope_theta"])),
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "expert_count": config.get("num_local_experts", config.get("num_experts")),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_group_count": config.get("n_group"),
        "expert_group_used_count": config.get("topk_group"),
        **{f"rope.scaling.{key}": value for key, value in scaling.items()},
    }


def _llama(config):
    return {"vocab_size": config["vocab_size"], "rope.dimension_count": _head(config)}


def _experts(config):
    return {
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }


def _routed(config):
    return {
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": 2,
        "leading_dense_block_count": config["first_k_dense_replace"],
    }


def _glm4_moe(config):
    return {**_routed(config), **_part(config), "nextn_predict_layers": 0}


def _qwen3_vl(config):
    return {"rope.dimension_sections": [4, 2, 2, 0], "n_deepstack_layers": 3}


def _gemma2(config):
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {**_window(config), **caps}


def _phi3(config):
    longest = config["max_position_embeddings"]
    first = config.get("original_max_position_embeddings", longest)
    found = {**_part(config), "attention.sliding_window": 0}
    found["rope.scaling.original_context_length"] = first
    if _rope(config).get("long_factor"):
        factor = np.sqrt(1 + np.log(longest / first) / np.log(first))
        found["rope.scaling.attn_factor"] = float(factor)
    return found


def _gpt_oss(config):
    return {**_window(config), "expert_feed_forward_length": config["intermediate_size"]}


def _stablelm(config):
    return {**_part(config), "use_parallel_residual": True}


def _windows(config):
    """Olmo2Model, Exaone4Model."""
    if not config.get("sliding_window"):
        return {}
    kinds = [t == "sliding_attention" for t in config.get("layer_types") or []]
    kinds = kinds or [(i + 1) % 4 != 0 for i in range(config["num_hidden_layers"])]
    return {**_window(config), "attention.sliding_window_pattern": kinds}


def _granite(config):
    return {
        "attention.scale": config["attention_multiplier"],
        "embedding_scale": config["embedding_multiplier"],
        "residual_scale": config["residual_multiplier"],
        "logit_scale": config["logits_scaling"],
    }


def _cohere(config):
    return {"logit_scale": config["logit_scale"], "rope.scaling.type": "none"}


def _cohere2(config):
    return {**_cohere(config), **_window(config), "rope.dimension_count": _head(config)}


def _minimax(config):
    return {
        "expert_feed_forward_length": config["intermediate_size"],
        "expert_gating_func": 2,
        "rope.dimension_count": config["rotary_dim"],
    }


def _nemotron(config):
    return {**_part(config), "attention.layer_norm_epsilon": 1e-5}


def _mistral3(config):
    return {
        "rope.scaling.yarn_log_multiplier": _rope(config).get("mscale_all_dim"),
        "attention.temperature_scale": _rope(config).get("llama_4_scaling_beta"),
    }


def _deepseek2(config):
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    log = _rope(config).get("mscale_all_dim")
    return {
        **_routed(config),
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": config["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": turned,
        "rope.scaling.yarn_log_multiplier": 0.1 * log if log else None,
    }


def _qwen35(config):
    values = config["linear_num_value_heads"]
    return {
        **_experts(config),
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": values,
        "ssm.inner_size": config["linear_value_head_dim"] * values,
        "full_attention_interval": config.get("full_attention_interval", 4),
        "rope.dimension_count": int(_head(config) * _rope(config)["partial_rotary_factor"]),
        "rope.dimension_sections": [11, 11, 10, 0],
    }


def _gemma4(config):
    count, shared = config["num_hidden_layers"], config["num_kv_shared_layers"]
    local = [(i + 1) % config["sliding_window_pattern"] != 0 for i in range(count)]
    inner, heads = config["intermediate_size"], config["num_key_value_heads"]
    full = config.get("num_global_key_value_heads")
    large, size = config["global_head_dim"], config["head_dim"]
    return {
        "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": config["hidden_size_per_layer_input"],
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": local,
        "attention.key_length": large,
        "attention.value_length": large,
        "attention.key_length_swa": size,
        "attention.value_length_swa": size,
        "attention.head_count_kv": [heads if one else full for one in local] if full else heads,
        "feed_forward_length": [inner * (1 if i < count - shared else 2) for i in range(count)],
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_used_count": config.get("top_k_experts"),
        "final_logit_softcapping": 30.0,
        "rope.dimension_count": large,
        "rope.dimension_count_swa": size,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
    }


SPECIAL = {
    "cohere2": _cohere2,
    "command-r": _cohere,
    "deepseek2": _deepseek2,
    "exaone4": _windows,
    "gemma2": _gemma2,
    "gemma3": _window,
    "gemma4": _gemma4,
    "glm4": _part,
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
    "granite": _granite,
    "llama": _llama,
    "minimax-m2": _minimax,
    "mistral3": _mistral3,
    "nemotron": _nemotron,
    "olmo2": _windows,
    "phi2": _part,
    "phi3": _phi3,
    "qwen2moe": _experts,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "qwen3moe": _experts,
    "qwen3vl": _qwen3_vl,
    "stablelm": _stablelm,
}
