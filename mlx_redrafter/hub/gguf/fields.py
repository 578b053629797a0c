"""What config.json says of a model beyond its sizes, from the metadata of a GGUF file.

Where a file is silent, what llama.cpp assumes: load_hparams of every src/models/*.cpp.
"""

from __future__ import annotations

from typing import Any

from mlx_redrafter.hub.gguf.keys import Keys
from mlx_redrafter.hub.gguf.rope import ROPE_FACTORS, factors_of

Raw = dict[str, Any]
_SOFTMAX, _SIGMOID, _CHOSEN = 1, 2, 3
# Gemma's largest models divide scores by another size than that of a head.
_GEMMA_LARGEST = (46, 62)
_LOCAL_THETA = 10000.0
MLA = ("kv_lora_rank", "q_lora_rank", "key_length_mla", "value_length_mla")


def plain(keys: Keys) -> Raw:
    return {}


def biases(keys: Keys) -> Raw:
    return {
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "mlp_bias": keys.has("blk.0.ffn_gate.bias"),
    }


def _gated(keys: Keys, function: int) -> None:
    if keys.get("expert_gating_func", function) not in (0, function):
        keys.refuse("another function of its experts' scores than the model type has")


def _experts(keys: Keys, count: str) -> Raw:
    return {
        count: keys.size("expert_count"),
        "num_experts_per_tok": keys.size("expert_used_count"),
    }


def mixtral(keys: Keys) -> Raw:
    _gated(keys, _SOFTMAX)
    return _experts(keys, "num_local_experts")


def qwen_moe(keys: Keys) -> Raw:
    _gated(keys, _SOFTMAX)
    size, shared = keys.get("expert_feed_forward_length"), {}
    if keys.has("blk.0.ffn_up_shexp.weight"):
        rows = keys.file.tensors["blk.0.ffn_up_shexp.weight"].shape[0]
        inner = keys.size("expert_shared_feed_forward_length", rows)
        shared = {"shared_expert_intermediate_size": inner}
    experts = keys.file.tensors.get("blk.0.ffn_up_exps.weight")
    if size is None and experts is not None:
        size = experts.shape[-2]
    return {
        **_experts(keys, "num_experts"),
        **shared,
        "moe_intermediate_size": size,
        # llama.cpp: of Qwen 3, not of Qwen 2.
        "norm_topk_prob": not shared,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def olmoe(keys: Keys) -> Raw:
    _gated(keys, _SOFTMAX)
    return {**_experts(keys, "num_experts"), "norm_topk_prob": False, "attention_bias": False}


def _routed(keys: Keys) -> Raw:
    """Sigmoid experts behind dense first layers."""
    _gated(keys, _SIGMOID)
    return {
        **_experts(keys, "n_routed_experts"),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
        "n_shared_experts": keys.get("expert_shared_count", 0),
        "routed_scaling_factor": keys.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(keys.get("expert_weights_norm", False)),
        "n_group": keys.get("expert_group_count") or 1,
        "topk_group": keys.get("expert_group_used_count") or 1,
        "first_k_dense_replace": keys.get("leading_dense_block_count", 0),
    }


def glm4_moe(keys: Keys) -> Raw:
    return {
        **_routed(keys),
        "attention_bias": keys.has("blk.0.attn_q.bias"),
        "use_qk_norm": keys.has("blk.0.attn_q_norm.weight"),
    }


def deepseek_v3(keys: Keys) -> Raw:
    """Latent attention; the file counts one head of keys and values, which is the latent."""
    if keys.get("expert_gating_func") != _SIGMOID:
        keys.refuse("experts that are not DeepSeek V3's")
    rank, query_rank, full, value = (keys.get(f"attention.{key}") for key in MLA)
    if not (rank and full and value):
        keys.refuse("attention whose keys and values are stored as one, as files before 2025 do")
    rope = keys.size("rope.dimension_count")
    return {
        **_routed(keys),
        "kv_lora_rank": rank,
        "q_lora_rank": query_rank,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": full - rope,
        "v_head_dim": value,
        "head_dim": rope,
        "num_key_value_heads": keys.heads,
        "attention_bias": False,
        "topk_method": "noaux_tc",
    }


def minimax(keys: Keys) -> Raw:
    _gated(keys, _SIGMOID)
    return {
        **_experts(keys, "num_local_experts"),
        "intermediate_size": keys.size("expert_feed_forward_length"),
        "rotary_dim": keys.rotated,
        "shared_intermediate_size": 0,
        "use_qk_norm": True,
    }


def gpt_oss(keys: Keys) -> Raw:
    _gated(keys, _CHOSEN)
    windowed = keys.windowed(2)
    return {
        **_experts(keys, "num_local_experts"),
        "intermediate_size": keys.size("expert_feed_forward_length"),
        "sliding_window": keys.need("attention.sliding_window"),
        "layer_types": _layer_types(windowed),
    }


def _period(keys: Keys, usual: int) -> int:
    """Every how many layers one sees everything."""
    windowed = keys.windowed(usual)
    period = windowed.index(False) + 1 if False in windowed else keys.layers + 1
    if windowed != [(i + 1) % period != 0 for i in range(keys.layers)]:
        keys.refuse("windows in no fixed order of layers")
    return period


def _layer_types(windowed: list[bool]) -> list[str]:
    return ["sliding_attention" if one else "full_attention" for one in windowed]


def gemma(keys: Keys) -> Raw:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _divisor(keys: Keys) -> Raw:
    largest = keys.layers in _GEMMA_LARGEST
    shared = keys.size("embedding_length") // keys.heads
    return {**gemma(keys), "query_pre_attn_scalar": shared if largest else keys.head_dim}


def gemma2(keys: Keys) -> Raw:
    return {
        **_divisor(keys),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
        "sliding_window": keys.get("attention.sliding_window", 4096),
    }


def gemma3(keys: Keys) -> Raw:
    """Without a window all layers see everything."""
    window = keys.get("attention.sliding_window", 0)
    return {
        **_divisor(keys),
        "rope_local_base_freq": keys.get("rope.freq_base_swa", _LOCAL_THETA),
        "sliding_window": window or 512,
        "sliding_window_pattern": _period(keys, 6) if window else 1,
    }


def phi3(keys: Keys) -> Raw:
    first = keys.get("rope.scaling.original_context_length")
    return {
        "sliding_window": keys.get("attention.sliding_window") or None,
        "original_max_position_embeddings": first or int(keys.get("context_length", 4096)),
    }


def stablelm(keys: Keys) -> Raw:
    keys.get("use_parallel_residual")  # true in old files of all kinds: the tensors decide
    return {
        "use_qkv_bias": keys.has("blk.0.attn_q.bias"),
        "use_parallel_residual": not keys.has("blk.0.ffn_norm.weight"),
    }


def olmo3(keys: Keys) -> Raw:
    return {
        "sliding_window": keys.need("attention.sliding_window"),
        "layer_types": _layer_types(keys.windowed(4)),
        "attention_bias": False,
    }


def exaone4(keys: Keys) -> Raw:
    """Layers without a window have no positions, where there are windows."""
    window = keys.get("attention.sliding_window") or None
    windowed = keys.windowed(4) if window else [False] * keys.layers
    letters = "".join("L" if one else "G" for one in windowed)
    return {
        "layer_types": _layer_types(windowed),
        "sliding_window": window,
        "sliding_window_pattern": letters if window else None,
    }


def granite(keys: Keys) -> Raw:
    size = keys.size("embedding_length") // keys.heads
    return {
        **biases(keys),
        "attention_multiplier": keys.get("attention.scale") or size**-0.5,
        "embedding_multiplier": keys.get("embedding_scale") or 1.0,
        "residual_multiplier": keys.get("residual_scale") or 1.0,
        "logits_scaling": keys.get("logit_scale") or 1.0,
    }


def cohere(keys: Keys) -> Raw:
    return {
        "logit_scale": keys.need("logit_scale"),
        "attention_bias": False,
        "use_qk_norm": keys.has("blk.0.attn_q_norm.weight"),
    }


def cohere2(keys: Keys) -> Raw:
    return {
        "logit_scale": keys.need("logit_scale"),
        "attention_bias": False,
        "sliding_window": keys.need("attention.sliding_window"),
        "sliding_window_pattern": _period(keys, 4),
    }


def glm4(keys: Keys) -> Raw:
    return {"attention_bias": keys.has("blk.0.attn_q.bias")}


def smollm3(keys: Keys) -> Raw:
    return {**biases(keys), "no_rope_layer_interval": 4}


def seed_oss(keys: Keys) -> Raw:
    return {**biases(keys), "attention_out_bias": keys.has("blk.0.attn_output.bias")}


def nemotron(keys: Keys) -> Raw:
    return {**glm4(keys), "hidden_act": "relu2", "mlp_bias": keys.has("blk.0.ffn_up.bias")}


def ministral3(keys: Keys) -> Raw:
    """Its queries grow with the position, in steps of the length before the stretching."""
    keys.need("rope.scaling.original_context_length")
    return {"rope_parameters": {"llama_4_scaling_beta": keys.need("attention.temperature_scale")}}


def qwen35(keys: Keys) -> Raw:
    """Gated DeltaNets, and in every n-th layer attention whose output has a gate."""
    heads, groups = keys.size("ssm.time_step_rank"), keys.size("ssm.group_count")
    values = keys.size("ssm.inner_size")
    # Packed columns are moved head by head, in groups of 32.
    if heads % groups or values % (32 * heads):
        keys.refuse(f"a recurrence of {groups} and {heads} heads, and values of {values}")
    experts = qwen_moe(keys) if keys.get("expert_count", 0) else {}
    return {
        **experts,
        **({"norm_topk_prob": True} if experts else {}),
        "full_attention_interval": keys.get("full_attention_interval", 4),
        "linear_conv_kernel_dim": keys.size("ssm.conv_kernel"),
        "linear_key_head_dim": keys.size("ssm.state_size"),
        "linear_num_key_heads": groups,
        "linear_num_value_heads": heads,
        "linear_value_head_dim": values // heads,
        "rope_parameters": {"partial_rotary_factor": keys.rotated / keys.head_dim},
    }


def gemma4(keys: Keys) -> Raw:
    """Full layers have larger heads; the last layers read the keys and values of earlier ones."""
    windowed = keys.windowed(5)
    if len(set(windowed)) < 2:
        keys.refuse("windows in all layers, or in none")
    local, full = windowed.index(True), windowed.index(False)
    shared = int(keys.get("attention.shared_kv_layers", 0))
    heads, sizes = (_by_layer(keys, k) for k in ("attention.head_count_kv", "feed_forward_length"))
    same = not keys.has(f"blk.{full}.attn_v.weight")
    first, size = len(windowed) - shared, keys.need("attention.key_length_swa")
    wide = shared > 0 and sizes[-1] == 2 * sizes[0]
    expected = [sizes[0] * (2 if wide and i >= first else 1) for i in range(len(windowed))]
    if sizes != expected or heads != [heads[local if one else full] for one in windowed]:
        keys.refuse("heads or inner sizes in no known order of layers")
    if heads[local] != heads[full] and not same:
        keys.refuse(f"full layers of {heads[full]} heads of keys, others of {heads[local]}")
    values = (keys.get("attention.value_length"), keys.get("attention.value_length_swa", size))
    if values != (keys.head_dim, size):
        keys.refuse("values of another size than keys")
    return {
        **gemma(keys),
        **_experts_beside(keys),
        "attention_k_eq_v": same,
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
        "global_head_dim": keys.head_dim,
        "head_dim": size,
        "hidden_size_per_layer_input": int(keys.get("embedding_length_per_layer_input", 0)),
        "intermediate_size": sizes[0],
        "layer_types": _layer_types(windowed),
        "num_global_key_value_heads": heads[full] if same else None,
        "num_key_value_heads": heads[local],
        "num_kv_shared_layers": shared,
        "rope_parameters": _proportional(keys, size),
        "sliding_window": keys.need("attention.sliding_window"),
        "use_double_wide_mlp": wide,
        "vocab_size_per_layer_input": keys.file.tensors["token_embd.weight"].shape[0],
    }


def _by_layer(keys: Keys, key: str) -> list[int]:
    given = keys.need(key)
    return [int(one) for one in given] if isinstance(given, list) else [given] * keys.layers


def _experts_beside(keys: Keys) -> Raw:
    if not keys.get("expert_count", 0):
        return {"enable_moe_block": False}
    return {
        "enable_moe_block": True,
        "num_experts": keys.size("expert_count"),
        "top_k_experts": keys.size("expert_used_count"),
        "moe_intermediate_size": keys.size("expert_feed_forward_length"),
    }


def _proportional(keys: Keys, size: int) -> Raw:
    """Of full layers only the first entries turn: others are divided by 1e30 in the file."""
    known = ("freq_base", "freq_base_swa", "dimension_count", "dimension_count_swa")
    start = f"{keys.architecture}.rope."
    for key in keys.file.metadata:
        if key.startswith(start) and key[len(start) :] not in known:
            keys.refuse(f"{key} is not read here")
    turned = keys.get("rope.dimension_count_swa", size), keys.rotated
    factors = factors_of(keys.file, ROPE_FACTORS)
    half = keys.head_dim // 2
    ones = 0 if factors is None else int((factors == 1).sum())
    if turned != (size, keys.head_dim) or factors is None or len(factors) != half:
        keys.refuse("positions that turn other parts of a head")
    if not (factors[:ones] == 1).all() or not (factors[ones:] > 1e20).all() or not ones:
        keys.refuse(f"factors of its own ({ROPE_FACTORS})")
    return {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": ones / half,
            "rope_theta": keys.get("rope.freq_base", 1e6),
        },
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": keys.get("rope.freq_base_swa", _LOCAL_THETA),
        },
    }
