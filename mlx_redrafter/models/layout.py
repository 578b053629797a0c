"""Tensor names as the decoder has them, and as mlx-lm has them, for the families that differ."""

from __future__ import annotations

from collections.abc import Sequence

# By model_type, what is written otherwise in a name: (mlx-lm's, ours), in this order.
_RENAMED: dict[str, Sequence[tuple[str, str]]] = {
    "glm4": (
        (".post_attention_layernorm", ".pre_feedforward_layernorm"),
        (".post_self_attn_layernorm", ".post_attention_layernorm"),
        (".post_mlp_layernorm", ".post_feedforward_layernorm"),
    ),
    "phi": (
        (".self_attn.dense.", ".self_attn.o_proj."),
        (".mlp.fc1.", ".mlp.up_proj."),
        (".mlp.fc2.", ".mlp.down_proj."),
        ("model.final_layernorm.", "model.norm."),
    ),
    "starcoder2": ((".mlp.c_fc.", ".mlp.up_proj."), (".mlp.c_proj.", ".mlp.down_proj.")),
}


def ours(model_type: str, name: str) -> str:
    """A tensor's name in the decoder."""
    for theirs, mine in _RENAMED.get(model_type, ()):
        name = name.replace(theirs, mine)
    return name


def theirs(model_type: str, name: str) -> str:
    """The name that mlx-lm gives a tensor of the decoder."""
    for stored, mine in reversed(_RENAMED.get(model_type, ())):
        name = name.replace(mine, stored)
    return name
