"""What a decoder needs to know: sizes, and which of the families' small differences apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        already, as it is for llama3 and longrope wherever it is more than the original: their
        factor says how far the low frequencies go and not how long a text may be. What a dynamic
        one would stretch changes with the length: not done here.
        """
        scaling = self.scaling or {}
        factor = float(scaling.get("factor") or 1.0)
        original = int(scaling.get("original_max_position_embeddings") or 0)
        linear = self.kind in ("linear", "yarn")
        if self.kind in ("default", "dynamic") or not (linear or original >= self.max_positions):
            return self.max_positions
        return max(self.max_positions, int(factor * (original or self.max_positions)))


@dataclass(frozen=True)
class ExpertsConfig:
    """A feed-forward layer of ``count`` experts, of which every token takes ``chosen``.

    Args:
        size: inner size of an expert.
        scores: a softmax over all experts or over the chosen ones, or sigmoids, whose choice a
            stored bias corrects.
        from_top: chosen as the last of a partition by score (True) or as the first of one by
            negative score: the order in which their outputs are added.
        normalise: divide the scores of the chosen by their sum, plus ``epsilon``.
        scale: of the scores.
        groups, kept_groups: sigmoid only; experts outside the best groups are not chosen.
        precise: scores in float32, of inputs in float32.
        biases: the projections and the router have them.
        shared: inner size of the expert that all tokens take; 0: none. ``shared_gate``: it has a
            gate of its own.
    """

    count: int
    chosen: int
    size: int
    scores: Literal["softmax", "chosen", "sigmoid"] = "softmax"
    from_top: bool = False
    normalise: bool = True
    epsilon: float = 0.0
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    precise: bool = False
    biases: bool = False
    shared: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class LatentConfig:
    """Attention over one latent vector a token, from which all heads' keys and values are made.

    Args:
        rank, rope: sizes of the latent vector and of the rotated key beside it: what is kept.
        plain: the part of a query that is not rotated.
        value: of a head's output.
        query_rank: of the vector that queries are made from; 0: from the hidden state.
        eps: of the norms of both vectors.
    """

    rank: int
    rope: int
    plain: int
    value: int
    query_rank: int = 0
    eps: float = 1e-6
    bias: bool = False


@dataclass(frozen=True)
class DeltaConfig:
    """A Gated DeltaNet (arXiv 2412.06464): a short convolution, and a recurrence by heads.

    Args:
        key_heads, value_heads: of which the latter are a multiple.
        key_size, value_size: of a head.
        kernel: rows that the convolution reads, a token's own included.
    """

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int

    @property
    def keys(self) -> int:
        """Numbers of a token's keys, and of its queries."""
        return self.key_heads * self.key_size

    @property
    def values(self) -> int:
        return self.value_heads * self.value_size

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys, values."""
        return 2 * self.keys + self.values


ActivationName = Literal["silu", "gelu", "gelu_approx", "relu2", "swiglu_oai"]
QkNorm = Literal["none", "head", "full", "unit"]
LayerChanges = Mapping[str, Any]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one target model; `families.py` makes it from a config.json.

    The tuples `layer_ropes` and `layer_windows` have one entry per layer: an index into `ropes`
    (-1: no rotary embedding), and the sliding window in tokens, itself included (0: none).
    `layer_changes` has one too, or none at all: the fields in which a layer differs (see `layer`).
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
    layer_changes: tuple[LayerChanges, ...] = field(default=(), hash=False)
    tied: bool = True
    head_bias: bool = False
    latent: LatentConfig | None = None
    # In place of attention; of the whole model: some layers have it.
    delta: DeltaConfig | None = None
    # Recurrences in closed form, which reads a state once for all nodes; None: as the device wants.
    closed: bool | None = None
    # The layer whose keys and values this one reads, if not its own.
    kv_source: int | None = None
    values_are_keys: bool = False  # before the norm of the keys
    value_norm: bool = False  # without weights
    # A score per head that competes with those of the keys, and has no value.
    sinks: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    # Of queries and keys, over a head or over all of them; "unit" has no weight.
    qk_norm: QkNorm = "none"
    query_scale: float = 1.0
    # (beta, positions): queries grow with the logarithm of their position, in steps of so many.
    query_growth: tuple[float, int] | None = None
    # A sigmoid of the layer's input times what it attended to, before the output projection.
    output_gate: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True  # of a "layer" norm
    # Where a block has norms: before its two parts, behind them, or both; "parallel": one before
    # both parts, which are added together.
    norms: Literal["pre", "post", "both", "parallel"] = "pre"
    post_norm_eps: float | None = None  # of the norms behind a part, if it is another
    # Gemma stores weight - 1; `loading` adds the 1 once, to the final norm too or not.
    norm_offset: float = 0.0
    norm_offset_last: bool = True
    activation: ActivationName = "silu"
    gated: bool = True
    experts: ExpertsConfig | None = None
    experts_beside: bool = False  # the dense layer, and with norms of their own
    # Size and vocabulary of what every layer is given of the tokens besides the stream; 0: nothing.
    layer_input: int = 0
    layer_input_vocab: int = 0
    layer_scalar: bool = False  # a layer's output times a stored number
    # Phi-3 checkpoints store q/k/v and gate/up already concatenated, GLM-4 only gate/up.
    stored_fused: bool = False
    stored_gate_up: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False  # without weights
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_scale: float = 1.0
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    # Gemma 3's residual stream exceeds float16; mlx-lm clips it there.
    clip_residual: bool = False

    def layer(self, index: int) -> DecoderConfig:
        """What one layer is made of."""
        changes = self.layer_changes[index] if self.layer_changes else {}
        return replace(self, **changes) if changes else self

    @property
    def own_attention(self) -> str:
        """Why its layers cannot attend as a pass tells them to (sparsely, to branches); else
        nothing."""
        if self.latent is not None:
            return "latent attention"
        return "attention sinks" if self.sinks else ""

    @property
    def not_attention(self) -> str:
        """What some of its layers are besides attention that can be told where to look; else
        nothing."""
        return "recurrent layers" if self.delta is not None else self.own_attention

    @property
    def widest_row(self) -> int:
        """Inner numbers of the feed-forward layer that makes most of a token."""
        if self.experts is None:
            return self.intermediate_size
        routed = self.experts.chosen * self.experts.size + self.experts.shared
        return max(self.intermediate_size, routed)

    @property
    def kept_per_token(self) -> int:
        """Numbers that all layers keep of a token."""
        layers = [self.layer(i) for i in range(self.num_layers)]
        return sum(heads * size for heads, size in (layer.kept for layer in layers))

    @property
    def kept(self) -> tuple[int, int]:
        """Rows of a layer's slab and their size; of one that reads another's or has none, none."""
        if self.kv_source is not None or self.delta is not None:
            return 0, 0
        if self.latent is not None:
            return 1, self.latent.rank + self.latent.rope
        return 2 * self.num_kv_heads, self.head_dim
