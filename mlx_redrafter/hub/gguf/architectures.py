"""Architectures of GGUF files: what Hugging Face calls them and their tensors.

Names: gguf-py/gguf/constants.py and tensor_mapping.py of https://github.com/ggml-org/llama.cpp;
what was done to values: its conversion/*.py (before: convert_hf_to_gguf.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mlx_redrafter.errors import ConvertError
from mlx_redrafter.hub.gguf import fields
from mlx_redrafter.hub.gguf.keys import Keys

# The names are those of our decoder, where they differ from Hugging Face's.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_k_b": "self_attn.embed_q",
    "attn_v_b": "self_attn.unembed_out",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
# Parameters that are no part of a layer.
_WHOLE_NAMES = {
    "attn_sinks.weight": "self_attn.sinks",
    "exp_probs_b.bias": "mlp.e_score_correction_bias",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "beside.scale",
    "ffn_down_exps.scale": "beside.expert_scale",
}
_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "per_layer_token_embd": "model.layer_inputs.embedding",
    "per_layer_model_proj": "model.layer_inputs.projection",
    "per_layer_proj_norm": "model.layer_inputs.norm",
}
# What some files store as one: the rows of the first, then those of the second.
_TWO = {"ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps")}
_AROUND = {"ffn_norm": "pre_feedforward_layernorm"}  # norms before and behind both parts
_JOINED = {"ffn_up": "mlp.gate_up_proj"}
_GEMMA4 = {
    **_AROUND,
    "inp_gate": "layer_input.gate",
    "proj": "layer_input.projection",
    "post_norm": "layer_input.norm",
    "ffn_gate_inp": "beside.gate",
    "ffn_gate_exps": "beside.switch_mlp.gate_proj",
    "ffn_up_exps": "beside.switch_mlp.up_proj",
    "ffn_down_exps": "beside.switch_mlp.down_proj",
    "pre_ffw_norm_2": "beside.norm",
    "post_ffw_norm_1": "beside.norm_dense",
    "post_ffw_norm_2": "beside.norm_experts",
}
# Of models with a Gated DeltaNet, in mlx-lm's names: our decoder cuts these tensors otherwise.
_DELTA = {
    "attn_qkv": "linear_attn.in_proj_qkv",
    "attn_gate": "linear_attn.in_proj_z",
    "ssm_alpha": "linear_attn.in_proj_a",
    "ssm_beta": "linear_attn.in_proj_b",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


class Architecture(NamedTuple):
    """One kind of model, and what llama.cpp made of its tensors.

    Args:
        model_type, heading: of config.json: the type, and what `architectures` begins with.
        fields: what config.json says beyond the sizes.
        names: tensors of a layer that are another's name elsewhere.
        permuted: the rows of q and k are in rotary order.
        offset: what was added to the weights of norms.
        eps: the key of config.json for the epsilon of norms; layer norms have another name for it.
        partial: may turn a part of a head only.
        rope: keys of positions that only these models have.
        own_positions: `fields` says all of them.
        recurrent: most layers are Gated DeltaNets, and names are mlx-lm's.
    """

    model_type: str
    heading: str
    fields: Callable[[Keys], dict[str, Any]] = fields.plain
    names: Mapping[str, str] = {}
    permuted: bool = False
    offset: float = 0.0
    eps: str = "rms_norm_eps"
    partial: bool = False
    rope: tuple[str, ...] = ()
    own_positions: bool = False
    recurrent: bool = False


_LLAMA = Architecture("llama", "Llama", fields.biases, permuted=True)
_QWEN3 = Architecture("qwen3", "Qwen3", rope=("dimension_sections",))
_QWEN3_MOE = Architecture("qwen3_moe", "Qwen3Moe", fields.qwen_moe, rope=_QWEN3.rope)
_QWEN35 = Architecture(
    "qwen3_5", "Qwen3_5", fields.qwen35, _DELTA, partial=True, rope=_QWEN3.rope, recurrent=True
)
_LATENT = Architecture(
    "deepseek_v3", "DeepseekV3", fields.deepseek_v3, partial=True,
    rope=("scaling.yarn_log_multiplier",),
)  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "cohere2": Architecture("cohere2", "Cohere2", fields.cohere2, eps="layer_norm_eps"),
    "command-r": Architecture("cohere", "Cohere", fields.cohere, eps="layer_norm_eps"),
    "deepseek2": _LATENT,
    "exaone4": Architecture("exaone4", "Exaone4", fields.exaone4),
    "gemma": Architecture("gemma", "Gemma", fields.gemma, offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2", fields.gemma2, _AROUND, offset=1.0),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3", fields.gemma3, _AROUND, offset=1.0, rope=("freq_base_swa",)
    ),
    "gemma4": Architecture("gemma4_text", "Gemma4", fields.gemma4, _GEMMA4, own_positions=True),
    "glm4": Architecture("glm4", "Glm4", fields.glm4, {**_AROUND, **_JOINED}, partial=True),
    "glm4moe": Architecture("glm4_moe", "Glm4Moe", fields.glm4_moe, partial=True),
    "gpt-oss": Architecture("gpt_oss", "GptOss", fields.gpt_oss),
    "granite": Architecture("granite", "Granite", fields.granite, permuted=True),
    "llama": _LLAMA,
    "minimax-m2": Architecture("minimax_m2", "MiniMaxM2", fields.minimax, partial=True),
    "mistral3": _LLAMA._replace(model_type="mistral", heading="Mistral"),
    "nemotron": Architecture(
        "nemotron", "Nemotron", fields.nemotron, offset=1.0, eps="norm_eps", partial=True
    ),
    "olmo2": Architecture("olmo2", "Olmo2", fields.biases),
    "olmoe": Architecture("olmoe", "Olmoe", fields.olmoe),
    "phi2": Architecture("phi", "Phi", eps="layer_norm_eps", partial=True),
    "phi3": Architecture("phi3", "Phi3", fields.phi3, _JOINED, partial=True),
    "qwen2": Architecture("qwen2", "Qwen2"),
    "qwen2moe": Architecture("qwen2_moe", "Qwen2Moe", fields.qwen_moe),
    "qwen3": _QWEN3,
    "qwen35": _QWEN35,
    "qwen35moe": _QWEN35._replace(model_type="qwen3_5_moe", heading="Qwen3_5Moe"),
    "qwen3moe": _QWEN3_MOE,
    "qwen3vl": _QWEN3,
    "qwen3vlmoe": _QWEN3_MOE,
    "seed_oss": Architecture("seed_oss", "SeedOss", fields.seed_oss),
    "smollm3": Architecture("smollm3", "SmolLM3", fields.smollm3, permuted=True),
    "stablelm": Architecture(
        "stablelm", "StableLm", fields.stablelm, eps="layer_norm_eps", partial=True
    ),
    "starcoder2": Architecture("starcoder2", "Starcoder2", eps="norm_epsilon"),
}
_NEAREST = 3


def architecture_of(keys: Keys) -> Architecture:
    """What a file holds; some names stand for two models. Raises ConvertError."""
    name = keys.architecture
    found = ARCHITECTURES.get(name)
    if found is None:
        near = difflib.get_close_matches(name, ARCHITECTURES, _NEAREST, 0.5)
        nearest = f"nearest: {', '.join(near)}; " if near else ""
        raise ConvertError(
            f"{keys.file.path} holds the architecture {name!r}, which is not read here; {nearest}"
            f"needed: one of {', '.join(ARCHITECTURES)}"
        )
    if name == "llama" and keys.get("expert_count", 0):
        return Architecture("mixtral", "Mixtral", fields.mixtral, permuted=True)
    if name == "olmo2" and keys.get("attention.sliding_window"):
        return Architecture("olmo3", "Olmo3", fields.olmo3)
    if name == "mistral3" and keys.get("attention.temperature_scale"):
        return Architecture(
            "ministral3", "Ministral3", fields.ministral3, permuted=True, rope=_LATENT.rope
        )
    if name == "deepseek2" and keys.file.get("tokenizer.ggml.pre") in ("glm4", "chatglm-bpe"):
        return _LATENT._replace(model_type="glm4_moe_lite", heading="Glm4MoeLite")
    return found


def target_names(name: str, architecture: Architecture) -> list[str]:
    """The names of what a tensor holds: of itself, or of two that lie one after the other."""
    short = name.split(".")[2] if layer_of(name) is not None else ""
    names = [name.replace(short, one) for one in _TWO[short]] if short in _TWO else [name]
    return [target_name(one, architecture) for one in names]


def target_name(name: str, architecture: Architecture) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`, in our decoder's names.

    Raises ConvertError for a tensor that no model read here has.
    """
    base, _, part = name.rpartition(".")
    if base in _OUTER_NAMES:
        return f"{_OUTER_NAMES[base]}.{part}"
    if layer_of(name) is not None:
        _, number, rest = name.split(".", 2)
        short, _, part = rest.rpartition(".")
        inner = architecture.names.get(short, _BLOCK_NAMES.get(short))
        if found := _WHOLE_NAMES.get(rest, inner and f"{inner}.{part}"):
            return f"model.layers.{number}.{found}"
    raise ConvertError(
        f"the GGUF file holds an unknown tensor {base or name!r}, which no model of type "
        f"{architecture.model_type} has here; convert the model's Hugging Face version"
    )


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor is of."""
    parts = name.split(".")
    return int(parts[1]) if len(parts) > 2 and parts[0] == "blk" and parts[1].isdecimal() else None
