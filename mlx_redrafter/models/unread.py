"""Tensors of a checkpoint that its text half does not read."""

from __future__ import annotations

_PARTS = ("vision_tower.", "visual.", "multi_modal_projector.", "mm_projector.", "vision_model.",
          "vision_adapter.", "vision_projection.", "vision_embedder.", "embed_vision.",
          "audio_tower.", "embed_audio.", "medusa_head.", "medusa_heads.")  # fmt: skip


def unread(name: str) -> bool:
    """Is it of a part that sees, hears or drafts? Such are neither loaded nor missed."""
    return name.removeprefix("model.").startswith(_PARTS) or name.endswith("rotary_emb.inv_freq")
