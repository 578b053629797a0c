"""ReDrafter: a recurrent drafter on the target's last hidden state (arXiv 2403.09919, section 3).

Apple's architecture with its tensor names, and extensions that a configuration switches on:

    context   h: the target's last hidden state, or a learned mix of several layers' outputs
    state     s' = silu(W e + U s + b)  (elman) | e + s  (sum) | gated recurrent unit  (gru);
              the first s is 0 (Apple's) or h
    head      x = input_proj([h, s']); x = x + silu(A x + a) per residual block; then Apple's own
              output matrix, or the target's frozen output rows
    draft vocabulary   optionally a subset of the target's tokens

e is the target's raw input embedding of the token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafters import files
from mlx_redrafter.drafters.beam import BeamDrafter
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Target
from mlx_redrafter.tree.nodes import integers

CELLS = ("sum", "elman", "gru")
HEADS = ("own", "target")
STARTS = ("zero", "context")


@dataclass(frozen=True)
class ReDrafterConfig:
    """Shape of a drafter.

    Args:
        hidden_size: ``D`` of the target.
        vocab_size: ``V`` of the target.
        exit_dim: width ``E`` of the head; a projection from ``2 D`` exists when it differs.
        num_draft_layers: residual blocks.
        cell: ``sum`` | ``elman`` | ``gru``.
        initial_state: ``zero`` | ``context``.
        context_layers: target layers mixed into the context; empty: the last hidden state alone.
        head: ``own`` output matrix | ``target``: the target's frozen output rows.
        draft_vocab_size: size of the draft vocabulary; None: the target's whole vocabulary.
    """

    hidden_size: int
    vocab_size: int
    exit_dim: int
    num_draft_layers: int = 1
    cell: str = "elman"
    initial_state: str = "zero"
    context_layers: tuple[int, ...] = ()
    head: str = "own"
    draft_vocab_size: int | None = None

    @property
    def output_size(self) -> int:
        return self.draft_vocab_size or self.vocab_size

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ReDrafterConfig:
        """From a checkpoint's config.json, Apple's or ours. Unknown keys are ignored.

        Raises:
            DrafterError: not a ReDrafter, or a value that no drafter can have.
        """
        kind = config.get("model_type")
        if kind == "recurrent_drafting_drafter":
            config = {**config, "cell": "elman" if config.get("rnn", False) else "sum"}
        elif kind != "redrafter":
            raise DrafterError(
                f"model_type {kind!r} is not a drafter: a ReDrafter folder has model_type "
                "redrafter or recurrent_drafting_drafter (Apple's) in its config.json; Medusa "
                "heads and speculators are known by their tensors, and none are here"
            )
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in config.items() if k in known and v is not None}
        layers = values.get("context_layers", [])
        if not isinstance(layers, list | tuple) or not all(isinstance(i, int) for i in layers):
            raise DrafterError(f"the drafter's context_layers {layers!r} is not a list of numbers")
        values["context_layers"] = tuple(layers)
        try:
            result = cls(**values)
        except TypeError as error:
            raise DrafterError(f"the drafter's config.json is incomplete: {error}") from None
        sizes = {
            "hidden_size": result.hidden_size,
            "vocab_size": result.vocab_size,
            "exit_dim": result.exit_dim,
            "draft_vocab_size": result.output_size,
        }
        for name, value in sizes.items():
            files.size(name, value)
        files.size("num_draft_layers", result.num_draft_layers, 0, 1000)
        if result.cell not in CELLS or result.head not in HEADS:
            raise DrafterError(
                f"the drafter's cell {result.cell!r} or head {result.head!r} is unknown: "
                f"cells are {', '.join(CELLS)}; heads are {', '.join(HEADS)}"
            )
        if result.initial_state not in STARTS:
            raise DrafterError(
                f"the drafter's initial_state {result.initial_state!r} is unknown: it is "
                f"{' or '.join(STARTS)}"
            )
        return result


class ResBlock(nn.Module):
    """x + silu(A x + a)."""

    def __init__(self, size: int, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return x + nn.silu(self.linear(x))


class ReDrafter(nn.Module, BeamDrafter):
    """The recurrent drafter: a ``drafters.Drafter`` by beam search over itself, a ``Cell``."""

    joins = True

    def __init__(self, config: ReDrafterConfig) -> None:
        super().__init__()
        size, width = config.hidden_size, config.exit_dim
        self.config = config
        if config.context_layers:
            self.context_norm = [nn.RMSNorm(size) for _ in config.context_layers]
            self.context_proj = nn.Linear(size * len(config.context_layers), size, bias=False)
        if config.cell != "sum":
            gates = 3 if config.cell == "gru" else 1
            self.rnn_u = nn.Linear(size, gates * size)
            self.rnn_w = nn.Linear(size, gates * size, bias=False)
        if width != 2 * size:
            self.input_proj = nn.Linear(2 * size, width)
        self.lm_head: list[nn.Module] = [ResBlock(width) for _ in range(config.num_draft_layers)]
        if config.head == "own":
            self.lm_head.append(nn.Linear(width, config.output_size, bias=False))
        elif width != size:
            self.head_proj = nn.Linear(width, size, bias=False)
        if config.draft_vocab_size:
            self.draft_vocab = mx.zeros((config.draft_vocab_size,), mx.int32)
            self.freeze(keys="draft_vocab", recurse=False)

    def bind(self, target: Target) -> ReDrafter:
        """Take what is shared from the target: input embedding, and frozen output rows."""
        self._embed = target.embed
        every = integers(range(self.config.vocab_size))
        self._vocabulary = self.draft_vocab if self.config.draft_vocab_size else every
        if self.config.head == "target":
            self._rows = target.head_rows(self._vocabulary)
            mx.eval(self._rows)
        if self.config.context_layers:
            self._scale = self._context_scale()
            mx.eval(self._scale)
        if self.has_gates:
            # What the cell makes of a draft token's embedding never changes: a row per token.
            self._gates = self.rnn_w(self._embed(self.draft_vocab))
            mx.eval(self._gates)
        if "input_proj" in self:
            # h is the same for the whole draft: its half of the projection is computed once.
            self._context_half, self._state_half = _halves(self.input_proj, self.config.hidden_size)
        return self

    @property
    def has_gates(self) -> bool:
        """Are embeddings of the draft vocabulary kept as the cell's input projection has them?"""
        return bool(self.config.draft_vocab_size) and self.config.cell != "sum"

    @property
    def features(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.config.context_layers

    @property
    def vocabulary(self) -> mx.array:
        return self._vocabulary

    def context(self, read: mx.array) -> mx.array:
        """The context layers' outputs (M, layers * D), or the final hidden states -> (M, D)."""
        if not self.config.context_layers:
            return read
        rows = read.shape[0]
        every = read.reshape(rows, len(self.context_norm), -1)
        normed = mx.fast.rms_norm(every, None, self.context_norm[0].eps) * self._context_scale()
        return self.context_proj(normed.reshape(rows, -1))

    def _context_scale(self) -> mx.array:
        """The weights of all norms (layers, D); gathered once, unless they are being trained."""
        weights = self.get("_scale")
        return mx.stack([norm.weight for norm in self.context_norm]) if weights is None else weights

    def start(self, context: mx.array) -> tuple[mx.array, mx.array]:
        """(D,) -> the first state (1, D), and h or its half of the projection (1, *)."""
        return self.starts(context[None])

    def starts(self, contexts: mx.array) -> tuple[mx.array, mx.array]:
        """The same for several contexts: (R, D) -> (R, D), (R, *)."""
        fixed = self._context_half(contexts) if "input_proj" in self else contexts
        return self.first_state(contexts), fixed

    def first_state(self, context: mx.array) -> mx.array:
        """(R, D) -> (R, D)."""
        return context if self.config.initial_state == "context" else mx.zeros_like(context)

    def step(self, tokens: mx.array, state: mx.array, fixed: mx.array) -> tuple[mx.array, mx.array]:
        """tokens (R,), state (R, D) -> logits (R, Vd), state (R, D)."""
        state = self.advance(self._embed(tokens), state)
        return self.head(self._joined(state, fixed)), state

    def follow(
        self, picks: mx.array, state: mx.array, fixed: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The same for tokens (R,) of the draft vocabulary."""
        if not self.has_gates:
            return self.step(self.token_ids(picks), state, fixed)
        state = self.cell(mx.take(self._gates, picks, axis=0), state)
        return self.head(self._joined(state, fixed)), state

    def _joined(self, state: mx.array, fixed: mx.array) -> mx.array:
        """[h, s], or its projection: (R, D), (1 or R, *) -> (R, E)."""
        if "input_proj" in self:
            return fixed + self._state_half(state)
        return mx.concatenate([mx.broadcast_to(fixed, state.shape), state], axis=-1)

    def advance(self, embedding: mx.array, state: mx.array) -> mx.array:
        """The recurrent cell: (R, D), (R, D) -> (R, D)."""
        if self.config.cell == "sum":
            return embedding + state
        return self.cell(self.rnn_w(embedding), state)

    def cell(self, gates: mx.array, state: mx.array) -> mx.array:
        """Elman or GRU cell on the projected embedding: (R, D or 3 D), (R, D) -> (R, D)."""
        if self.config.cell == "elman":
            return nn.silu(gates + self.rnn_u(state))
        w_reset, w_update, w_new = mx.split(gates, 3, axis=-1)
        u_reset, u_update, u_new = _parts(self.rnn_u, state, 3)
        update = mx.sigmoid(w_update + u_update)
        new = mx.tanh(w_new + mx.sigmoid(w_reset + u_reset) * u_new)
        return (1 - update) * new + update * state

    def head(self, x: mx.array) -> mx.array:
        """(R, E) -> (R, Vd)."""
        x = self.blocks(x)
        return self.lm_head[-1](x) if self.config.head == "own" else x @ self._rows.T

    def blocks(self, x: mx.array) -> mx.array:
        """The head up to its output rows: (R, E) -> (R, E), or (R, D) for the target's rows."""
        for layer in self.lm_head[: self.config.num_draft_layers]:
            x = layer(x)
        return self.head_proj(x) if "head_proj" in self else x

    def output_rows(self) -> mx.array:
        """(Vd, E) own, or (Vd, D) of the target."""
        return self.lm_head[-1].weight if self.config.head == "own" else self._rows

    def token_ids(self, picks: mx.array) -> mx.array:
        return mx.take(self.draft_vocab, picks) if self.config.draft_vocab_size else picks


def _parts(linear: nn.Module, x: mx.array, count: int) -> list[mx.array]:
    """linear(x) in parts. A quantised product leaves the bias to a kernel of its own, unless it is
    added to the parts, where they are used."""
    if not isinstance(linear, nn.QuantizedLinear):
        return list(mx.split(linear(x), count, axis=-1))
    product = mx.quantized_matmul(
        x, linear.weight, linear.scales, linear.biases, True, linear.group_size, linear.bits
    )
    pairs = zip(*(mx.split(y, count, axis=-1) for y in (product, linear.bias)), strict=True)
    return [part + bias for part, bias in pairs]


def _halves(linear: nn.Module, size: int) -> tuple[nn.Module, nn.Module]:
    """Split a projection of [h, s] into one of h and one of s (with the bias), as it is stored."""
    parts: list[nn.Module]
    if isinstance(linear, nn.QuantizedLinear) and size % linear.group_size == 0:
        parts = [_quantized_part(linear, size, start) for start in (0, size)]
    else:
        if isinstance(linear, nn.QuantizedLinear):
            linear = _dequantized(linear)
        parts = [nn.Linear(size, linear.weight.shape[0], bias=False) for _ in range(2)]
        for part, start in zip(parts, (0, size), strict=True):
            part.weight = mx.contiguous(linear.weight[:, start : start + size])
    if "bias" in linear:
        parts[1].bias = linear.bias  # where a sum follows anyway, in one kernel with it
    mx.eval([part.parameters() for part in parts])
    return parts[0], parts[1]


def _quantized_part(linear: nn.QuantizedLinear, size: int, start: int) -> nn.QuantizedLinear:
    part = nn.QuantizedLinear(
        size, linear.scales.shape[0], False, group_size=linear.group_size, bits=linear.bits
    )
    words, groups = linear.bits * size // 32, size // linear.group_size
    first_word, first_group = linear.bits * start // 32, start // linear.group_size
    part.weight = mx.contiguous(linear.weight[:, first_word : first_word + words])
    part.scales = mx.contiguous(linear.scales[:, first_group : first_group + groups])
    assert linear.biases is not None, "drafters are quantised in affine mode"
    part.biases = mx.contiguous(linear.biases[:, first_group : first_group + groups])
    return part


def _dequantized(linear: nn.QuantizedLinear) -> nn.Linear:
    weight = mx.dequantize(
        linear.weight, linear.scales, linear.biases, linear.group_size, linear.bits
    )
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in linear)
    plain.weight = weight
    if "bias" in linear:
        plain.bias = linear.bias
    return plain
