"""What a decoder needs to know: sizes, and which of the families' small differences apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding: `dims` leading entries of each head are rotated."""

    dims: int
    base: float = 10000.0
    traditional: bool = False
    scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    max_positions: int = 4096

    @property
    def kind(self) -> str:
        """The scaling's name; checkpoints spell the key `type` or `rope_type`."""
        scaling = self.scaling or {}
        return str(scaling.get("type") or scaling.get("rope_type") or "default")

    @property
    def stretched_positions(self) -> int:
        """How many positions the scaling makes of those that it stretches.

        That number is its own where it names one; max_positions may then be the stretched one
        already. What a dynamic one would stretch changes with the length: not done here.
        """
        scaling = self.scaling or {}
        factor = float(scaling.get("factor") or 1.0)
        original = scaling.get("original_max_position_embeddings")
        if self.kind in ("default", "dynamic") or not (original or self.kind in ("linear", "yarn")):
            return self.max_positions
        return max(self.max_positions, int(factor * int(original or self.max_positions)))


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one target model; `families.py` makes it from a config.json.

    The tuples `layer_ropes` and `layer_windows` have one entry per layer: an index into `ropes`
    (-1: no rotary embedding), and the sliding window in tokens, itself included (0: none).
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    attention_scale: float
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int, ...]
    layer_windows: tuple[int, ...]
    tied: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    norms: Literal["pre", "post", "both"] = "pre"
    # Gemma stores weight - 1; `loading` adds the 1 once.
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_approx"] = "silu"
    # Phi-3 checkpoints store q/k/v and gate/up already concatenated.
    stored_fused: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    # Gemma 3's residual stream exceeds float16; mlx-lm clips it there.
    clip_residual: bool = False
