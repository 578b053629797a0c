"""Tiny models of every architecture as the GGUF files that llama.cpp's converter makes of them.

The names are those of gguf-py/gguf/constants.py and the values those of modify_tensors in
conversion/*.py, written down here a second time.
"""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
from adapter_cases import TYPES
from expert_cases import MSCALED
from gguf_files import encode, permute, write
from gguf_metadata import metadata_of, rope_tensors
from tiny_gguf import I32, STRING, metadata
from tiny_models import QWEN3_TEXT, build

PRE = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.final_layernorm": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "self_attn.dense": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b", "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.embed_q": "attn_k_b",
    "self_attn.unembed_out": "attn_v_b",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}  # fmt: skip
for _hf, _gguf in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
    for _stack in ("mlp.switch_mlp", "mlp.experts", "block_sparse_moe.switch_mlp"):
        PRE[f"{_stack}.{_hf}"] = f"ffn_{_gguf}_exps"
    for _shared in ("mlp.shared_expert", "mlp.shared_experts"):
        PRE[f"{_shared}.{_hf}"] = f"ffn_{_gguf}_shexp"
_POST = {"post_attention_layernorm": "post_attention_norm"}
_BOTH = {
    **_POST,
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GEMMA4 = {
    **_BOTH, "per_layer_input_gate": "inp_gate", "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm", "router.proj": "ffn_gate_inp",
    "experts.switch_glu.gate_proj": "ffn_gate_exps", "experts.switch_glu.up_proj": "ffn_up_exps",
    "experts.switch_glu.down_proj": "ffn_down_exps",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
}  # fmt: skip
_GLM4 = {
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "post_mlp_layernorm": "post_ffw_norm",
}
_MROPE = {"type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# case of tiny_models -> architecture, changes of its configuration, names of its own.
CASES: dict[str, tuple[str, dict, dict]] = {
    "llama": ("llama", {}, {}),
    "mixtral": ("llama", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "qwen3-vl": ("qwen3vl", {}, {}),
    "qwen2_moe": ("qwen2moe", {}, {}),
    "qwen3_moe": ("qwen3moe", {"mlp_only_layers": []}, {}),
    "gemma": ("gemma", {"head_dim": 16}, {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 64}, _BOTH),
    "gemma3_text": (
        "gemma3",
        {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "sliding_window_pattern": 6},
        _BOTH,
    ),
    "gemma4_text": ("gemma4", {}, _GEMMA4),
    "gemma4_text-keys": ("gemma4", {}, _GEMMA4),
    "gemma4_text-experts": ("gemma4", {}, _GEMMA4),
    "phi": ("phi2", {}, {}),
    "phi3": ("phi3", {}, {}),
    "phi3-longrope": ("phi3", {"max_position_embeddings": 128}, {}),
    "gpt_oss": ("gpt-oss", {}, _POST),
    "starcoder2": ("starcoder2", {}, {}),
    "stablelm": ("stablelm", {}, {}),
    "stablelm-parallel": ("stablelm", {}, {}),
    "olmo2": ("olmo2", {}, _BOTH),
    "olmo3": ("olmo2", {}, _BOTH),
    "olmoe": ("olmoe", {}, {}),
    "granite": ("granite", {}, {}),
    "cohere": ("command-r", {"logit_scale": 0.0625, "layer_norm_eps": 1e-5}, {}),
    "cohere2": ("cohere2", {"num_hidden_layers": 4, "sliding_window_pattern": 4}, {}),
    "glm4": ("glm4", {}, _GLM4),
    "glm4_moe": ("glm4moe", {}, _POST),
    "minimax_m2": ("minimax-m2", {}, {}),
    "nemotron": ("nemotron", {}, {}),
    "smollm3": ("smollm3", {}, {}),
    "mistral": ("mistral3", {"sliding_window": None}, {}),
    "ministral3": ("mistral3", {"layer_types": None, "sliding_window": None}, {}),
    "exaone4": ("exaone4", {}, _BOTH),
    "exaone4-window": ("exaone4", {}, _BOTH),
    "seed_oss": ("seed_oss", {"attention_out_bias": False}, _POST),
    "deepseek_v3": ("deepseek2", {"rope_scaling": {**MSCALED, "mscale": 0.7}}, {}),
    "glm4_moe_lite": ("deepseek2", {"attention_bias": False}, {}),
    "qwen3_5": ("qwen35", {"linear_num_key_heads": 2, "rope_parameters": _MROPE}, _POST),
    "qwen3_5_moe": ("qwen35moe", {"linear_num_key_heads": 1, "rope_parameters": _MROPE}, _POST),
}
_OTHER = {
    "gemma": {"model_type": "gemma"},
    "cohere": {"model_type": "cohere"},
    "qwen3-vl": QWEN3_TEXT,
    "qwen3_5": TYPES["qwen3_5"],
    "qwen3_5_moe": TYPES["qwen3_5_moe"],
}
_WHOLE = {
    ".layer_scalar": "layer_output_scale.weight",
    ".router.scale": "ffn_gate_inp.scale",
    ".router.per_expert_scale": "ffn_down_exps.scale",
}
_PERMUTED = ("llama", "granite", "smollm3", "mistral3")
_PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}  # fmt: skip


def made(tmp_path, case, **more):
    """A tiny model of a case, in mlx-lm's layout."""
    folder = tmp_path / "model"
    folder.mkdir()
    growing = {"rope_parameters": _YARN} if case == "ministral3" else {}
    build(folder, _OTHER.get(case, case), **{**CASES[case][1], **growing, **more})
    return folder


def gguf_like(path, folder, case, kind="F32", **changed):
    """The GGUF file of a folder with mlx-lm's names; ``changed`` replaces keys (None: no such key)
    and tensors."""
    config = json.loads((folder / "config.json").read_text())
    arch, _, own = CASES[case]
    tensors = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        rows = _changed(name, np.array(value.astype(mx.float32)), arch, config)
        plain = rows.ndim < 2 or "gate_inp" in gguf_name(name, own) or "conv1d" in name
        stored = "F32" if plain else kind
        tensors[gguf_name(name, own)] = (stored, rows.shape, encode(rows, stored))
    if arch == "gemma4":
        _join(tensors, kind)
    meta = {k: v for k, v in metadata().items() if not k.startswith(("llama.", "general.arch"))}
    meta["general.architecture"] = (STRING, arch)
    meta |= _vocabulary(config["vocab_size"])
    if case == "glm4_moe_lite":
        meta["tokenizer.ggml.pre"] = (STRING, "glm4")
    meta |= {f"{arch}.{key}": value for key, value in metadata_of(arch, config).items()}
    tensors |= rope_tensors(arch, config)
    for key, value in changed.items():
        into = tensors if key in tensors or (value and not isinstance(value[0], int)) else meta
        if value is None:
            into.pop(key)
        else:
            into[key] = value
    return write(path, meta, tensors)


def _join(tensors, kind):
    """Hugging Face has gate and up of Gemma 4's experts as one, (E, 2 F, D)."""
    for name in [n for n in tensors if "ffn_gate_exps" in n]:
        both = [tensors.pop(n) for n in (name, name.replace("gate", "up"))]
        count, rows, columns = both[0][1]
        parts = [np.frombuffer(data, np.uint8).reshape(count, -1) for _, _, data in both]
        data = np.concatenate(parts, 1).tobytes()
        name = name.replace("ffn_gate_exps", "ffn_gate_up_exps")
        tensors[name] = (kind, (count, 2 * rows, columns), data)


def gguf_name(name, own):
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    names = {**PRE, **own}
    name = name.removeprefix("language_model.")
    if name.endswith("e_score_correction_bias"):
        return f"blk.{name.split('.')[2]}.exp_probs_b.bias"
    for end, short in _WHOLE.items():
        if name.endswith(end):
            return f"blk.{name.split('.')[2]}.{short}"
    if name.endswith(".A_log"):
        return f"blk.{name.split('.')[2]}.ssm_a"
    if name.endswith(".dt_bias"):
        return f"blk.{name.split('.')[2]}.ssm_dt.bias"
    if name.endswith("self_attn.sinks"):
        return f"blk.{name.split('.')[2]}.attn_sinks.weight"
    base, _, part = name.rpartition(".")
    if base.startswith("model.layers."):
        _, _, layer, rest = base.split(".", 3)
        return f"blk.{layer}.{names[rest]}.{part}"
    return f"{names[base]}.{part}"


def _changed(name, rows, arch, config):
    """What modify_tensors does."""
    if arch in _PERMUTED and ".q_proj." in name:
        return permute(rows, config["num_attention_heads"])
    if arch in _PERMUTED and ".k_proj." in name:
        return permute(rows, config["num_key_value_heads"])
    if arch in _PLUS_ONE and name.endswith("norm.weight"):
        return rows + np.float32(1)
    if name.endswith("shared_expert_gate.weight"):
        return rows.squeeze()
    return _tiled(name, rows, config) if ".linear_attn." in name else rows


def _tiled(name, rows, config):
    """_LinearAttentionVReorderBase and Qwen3NextModel; mlx-lm's norms have their 1 already."""
    keys, size = config["linear_num_key_heads"], config["linear_value_head_dim"]
    by_key = config["linear_num_value_heads"] // keys

    def reorder(tensor, axis, dim):
        shape = tensor.shape
        apart = tensor.reshape(*shape[:axis], keys, by_key, dim, *shape[axis + 1 :])
        return apart.swapaxes(axis, axis + 1).reshape(shape)

    first = 2 * keys * config["linear_key_head_dim"]
    if name.endswith("A_log"):
        return reorder(-np.exp(rows), 0, 1)
    if name.endswith(("dt_bias", "in_proj_a.weight", "in_proj_b.weight")):
        return reorder(rows, 0, 1)
    if name.endswith("in_proj_z.weight"):
        return reorder(rows, 0, size)
    if name.endswith("out_proj.weight"):
        return reorder(rows, 1, size)
    if name.endswith("conv1d.weight"):
        rows = rows.squeeze()
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        return np.concatenate([rows[:first], reorder(rows[first:], 0, size)])
    return rows


def _vocabulary(size):
    words = [f"t{i}" for i in range(1, size - 3)]
    return {
        "tokenizer.ggml.tokens": (STRING, ["t", "1", *words, "<a>", "<b>"]),
        "tokenizer.ggml.token_type": (I32, [1] * (size - 2) + [3, 3]),
        "tokenizer.ggml.merges": (STRING, ["t 1"]),
    }
