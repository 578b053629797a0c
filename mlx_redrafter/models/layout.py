"""Tensors as the decoder has them, from how Hugging Face and mlx-lm store them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.core as mx

from ..errors import ModelError
from . import layout_delta

Weights = dict[str, mx.array]
Names = Sequence[tuple[str, str]]

_SPARSE: Names = ((".block_sparse_moe.", ".mlp."),)
_ROUTED: Names = ((".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"),)
_SHARED: Names = ((".mlp.shared_expert.", ".mlp.shared_experts."),)
_GEMMA4: Names = (
    ("model.embed_tokens_per_layer.", "model.layer_inputs.embedding."),
    ("model.per_layer_model_projection.", "model.layer_inputs.projection."),
    ("model.per_layer_projection_norm.", "model.layer_inputs.norm."),
    (".per_layer_input_gate.", ".layer_input.gate."),
    (".per_layer_projection.", ".layer_input.projection."),
    (".post_per_layer_input_norm.", ".layer_input.norm."),
    (".router.proj.", ".beside.gate."),
    (".router.scale", ".beside.scale"),
    (".router.per_expert_scale", ".beside.expert_scale"),
    (".experts.switch_glu.", ".beside.switch_mlp."),
    (".pre_feedforward_layernorm_2.", ".beside.norm."),
    (".post_feedforward_layernorm_1.", ".beside.norm_dense."),
    (".post_feedforward_layernorm_2.", ".beside.norm_experts."),
)
# By model_type, what is written otherwise in a name: (mlx-lm's, ours), in this order.
_RENAMED: dict[str, Names] = {
    "deepseek_v3": _ROUTED,
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "glm4": (
        (".post_attention_layernorm", ".pre_feedforward_layernorm"),
        (".post_self_attn_layernorm", ".post_attention_layernorm"),
        (".post_mlp_layernorm", ".post_feedforward_layernorm"),
    ),
    "glm4_moe": _ROUTED,
    "glm4_moe_lite": _ROUTED,
    "gpt_oss": ((".mlp.experts.", ".mlp.switch_mlp."), (".mlp.router.", ".mlp.gate.")),
    "joyai_llm_flash": _ROUTED,
    "kimi_k2": _ROUTED,
    "minimax": _SPARSE,
    "minimax_m2": _SPARSE,
    "mixtral": _SPARSE,
    "phi": (
        (".self_attn.dense.", ".self_attn.o_proj."),
        (".mlp.fc1.", ".mlp.up_proj."),
        (".mlp.fc2.", ".mlp.down_proj."),
        ("model.final_layernorm.", "model.norm."),
    ),
    "qwen2_moe": _SHARED,
    "qwen3_5": _SHARED,
    "qwen3_5_moe": _SHARED,
    "qwen3_next": _SHARED,
    "starcoder2": ((".mlp.c_fc.", ".mlp.up_proj."), (".mlp.c_proj.", ".mlp.down_proj.")),
}
# Their tensors are cut or joined otherwise in Hugging Face's layout; mlx-lm knows how.
_BY_MLX_LM = (
    "deepseek_v3", "gemma4", "gemma4_text", "gemma4_unified", "glm4_moe_lite", "gpt_oss",
    "joyai_llm_flash", "kimi_k2",
)  # fmt: skip
_DELTA = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
RESHAPED = (*_BY_MLX_LM, *_DELTA, "qwen3_vl_moe")
# They store a drafting layer behind the others.
_MORE_LAYERS = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "joyai_llm_flash", "kimi_k2")
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.(\w+)")
_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def ours(model_type: str, name: str) -> str:
    """A tensor's name in the decoder."""
    for theirs, mine in _RENAMED.get(model_type, ()):
        name = name.replace(theirs, mine)
    return name


def stored_name(model_type: str, name: str) -> str:
    """The name that mlx-lm gives a tensor of the decoder."""
    for theirs, mine in reversed(_RENAMED.get(model_type, ())):
        name = name.replace(mine, theirs)
    return name


def exact(name: str) -> bool:
    """Does a tensor keep its type, whatever the others are stored in? mlx-lm keeps it too."""
    return name.endswith(("e_score_correction_bias", ".A_log"))


def expert_of(name: str) -> tuple[str, int] | None:
    """For one of many experts: the tensor that holds all of them, and which it is."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    before, number, matrix, part = match.groups()
    return f"{before}.switch_mlp.{_MATRICES.get(matrix, matrix)}.{part}", int(number)


def beyond(name: str, raw: Mapping[str, Any]) -> bool:
    """Is it of a layer behind the last, which a type is known to store?"""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    known = raw.get("model_type") in _MORE_LAYERS
    return known and match is not None and int(match[1]) >= int(raw["num_hidden_layers"])


def arranged(weights: Weights, raw: Mapping[str, Any]) -> Weights:
    """The text half's tensors, under their stored names -> the decoder's; nothing is evaluated."""
    kind = str(raw["model_type"])
    if kind in _BY_MLX_LM:
        weights = _as_mlx_lm(weights, raw)
    elif kind == "qwen3_vl_moe":
        weights = _apart(weights, turned=True)
    elif kind in _DELTA:
        weights = layout_delta.arranged(_apart(weights), raw)
    result: Weights = {}
    experts: dict[str, dict[int, mx.array]] = {}
    for name, value in weights.items():
        if beyond(name, raw):
            continue
        if (found := expert_of(name)) is not None:
            experts.setdefault(found[0], {})[found[1]] = value
        else:
            result[ours(kind, name)] = value
    for name, parts in experts.items():
        result[ours(kind, name)] = _stacked(name, [parts[i] for i in sorted(parts)])
    return result


def _stacked(name: str, parts: list[mx.array]) -> mx.array:
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        raise ModelError(f"the experts of {name} differ in shape or type; download the model again")
    return mx.stack(parts)


def _apart(weights: Weights, turned: bool = False) -> Weights:
    """Experts that are stored stacked, gate and up as one; turned: as (E, in, out)."""
    result: Weights = {}
    for name, value in weights.items():
        before, found, matrix = name.rpartition(".mlp.experts.")
        if not found or matrix not in ("gate_up_proj", "down_proj"):
            result[name] = value
            continue
        value, to = value.swapaxes(-1, -2) if turned else value, f"{before}.mlp.switch_mlp"
        if matrix == "down_proj":
            result[f"{to}.down_proj.weight"] = value
        else:
            parts = mx.split(value, 2, axis=-2)
            result[f"{to}.gate_proj.weight"], result[f"{to}.up_proj.weight"] = parts
    return result


def _as_mlx_lm(weights: Weights, raw: Mapping[str, Any]) -> Weights:
    """As mlx-lm's own model of this type takes them; its arrays are never evaluated."""
    from mlx_lm.utils import _get_classes

    config = {**raw, **(raw.get("text_config") or {})}
    if str(config["model_type"]).startswith("gemma4"):
        config["model_type"] = "gemma4_text"
    model_class, arguments = _get_classes(config)
    try:
        model = model_class(arguments.from_dict(config))
        return cast(Weights, model.sanitize(dict(weights)))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"the weights do not fit model_type '{raw['model_type']}' ({error!r}); "
            "download the model again"
        ) from error
