"""The one decoder: N tokens with their own positions and an explicit mask, over KV slabs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.cache.layer import LayerCache, Pass
from mlx_redrafter.cache.packed import Packing, packed
from mlx_redrafter.cache.ring import Ring, ring_of
from mlx_redrafter.cache.slabs import Slab

from . import delta
from .attention import Attend, dense
from .block import Block
from .config import DecoderConfig
from .gemma4 import LayerInputs
from .layers import Activation, LayerPass, Memory, Rotate, Routed, norm
from .rope import Rope, Rotation
from .share import Share, Whole
from .stacked import StackPass


class Functions(NamedTuple):
    """What a pass computes with: how a layer attends, and the gated activation (None: the
    family's own). routed: told of the experts (..., N, K) that every layer of them chose."""

    attend: Callable[[int], Attend] = dense
    activation: Activation | None = None
    routed: Routed | None = None


DECODING = Functions()


class Part(NamedTuple):
    """One sequence's share of a pass; see `Decoder.__call__`."""

    tokens: mx.array
    positions: mx.array
    mask: mx.array
    key_positions: mx.array
    caches: Pass


class Backbone(nn.Module):
    """Embedding, blocks and final norm: the part whose checkpoint names start with `model.`."""

    def __init__(self, config: DecoderConfig, share: Share):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(share.layer(config, i), share.total) for i in share.held]
        self.norm = norm(config)
        if config.layer_input:
            self.layer_inputs = LayerInputs(config)


class Decoder(nn.Module):
    """A target model for tree verification.

    One call runs N tokens, each with its own position and its own row of the mask, against the
    layers' caches: a prompt chunk, a single token and a draft tree are the same call. All of
    it can be traced by mx.compile.

    Args:
        config: of the whole model.
        share: what this machine has of it, if several run it.
    """

    def __init__(self, config: DecoderConfig, share: Share | None = None):
        super().__init__()
        self.config = config
        self.share = share = Whole(config.num_layers) if share is None else share
        self.model = Backbone(config, share)
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, config.head_bias)
        self._ropes = [Rope(rope) for rope in config.ropes]
        layers = {i: share.layer(config, i) for i in share.held}
        # A shortened model is told of more layers than it has, one that is only sized of none.
        every = (*config.layer_windows, *[0] * config.num_layers)[: config.num_layers]
        self.windows = windows = {i: every[i] for i in layers}
        # A layer that reads another's keys within another window needs all of them.
        sources = [(i, one.kv_source) for i, one in layers.items()]
        rings = all(source is None or windows[i] == windows[source] for i, source in sources)
        # The first of the caches that each reads: its own, or those of an earlier layer.
        self._caches: list[LayerCache] = []
        self._slots: dict[int, int] = {}
        for i, one in layers.items():
            source = one.kv_source
            self._slots[i] = len(self._caches) if source is None else self._slots[source]
            if source is None:
                self._caches += _kept(one, windows[i] if rings else 0)
        routed = [one.experts.chosen for one in layers.values() if one.experts is not None]
        self._routes = sum(routed) if share.routes else 0

    @property
    def dtype(self) -> mx.Dtype:
        """Dtype of the activations."""
        return self.model.norm.weight.dtype

    @property
    def caches(self) -> Sequence[LayerCache]:
        """What each layer remembers."""
        return self._caches

    @property
    def routes(self) -> int:
        """Experts that a token is sent to, over all layers."""
        return self._routes

    def pack(self, packing: Packing) -> None:
        """Keep keys and values quantised. Before anything is made of `caches`; raises OptionError
        where rows do not divide into groups."""
        self._caches = packed(self._caches, packing)

    def __call__(
        self,
        tokens: mx.array,
        positions: mx.array,
        mask: mx.array,
        key_positions: mx.array,
        caches: Pass,
        layers: Sequence[int] = (),
        functions: Functions = DECODING,
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        """Run N tokens.

        tokens (N,), positions (N,) int32; mask (N, C) bool, True where a token may attend (prefix,
        ancestors and itself); key_positions (C,) int32, the position of the token in every slot
        (only sliding windows read it); caches: what the layers remember, which has it with N more
        nodes afterwards; layers: indices of blocks whose output is wanted too.

        Returns hidden (N, D) after the final norm, and the wanted outputs (N, D).
        """
        part = Part(tokens, positions, mask, key_positions, caches)
        return self.together([part], layers, functions)[0]

    def together(
        self,
        parts: Sequence[Part],
        layers: Sequence[int] = (),
        functions: Functions = DECODING,
        stacks: Sequence[StackPass] = (),
    ) -> list[tuple[mx.array, tuple[mx.array, ...]]]:
        """Run the tokens of several sequences in one pass: all that is done to every token alike
        is done once. What comes of each is, row by row, what it would be alone.

        stacks: of the first of them, whose masks and caches are those of a stack; all others have
        their own.
        """
        one = len(parts) == 1
        tokens = parts[0].tokens if one else mx.concatenate([p.tokens for p in parts])
        positions = parts[0].positions if one else mx.concatenate([p.positions for p in parts])
        x = self.embed(tokens)
        if self.config.embedding_scale != 1.0:
            x = x * self.config.embedding_scale
        if self.config.embedding_norm:
            x = mx.fast.rms_norm(x, None, self.config.norm_eps)
        rotations = [rope.prepare(positions, x.dtype) for rope in self._ropes]
        inner = self.model.get("layer_inputs")
        given = None if inner is None else inner(tokens, x)
        alone = parts[sum(stack.sequences for stack in stacks) :]
        running = [_Running.stacked(self, stack, x.dtype) for stack in stacks]
        running += [_Running.alone(self, part, x.dtype) for part in alone]

        def run(x: mx.array) -> tuple[mx.array, dict[int, mx.array]]:
            outputs = {}
            for index, block in zip(self.share.held, self.model.layers, strict=True):
                common = _Common(
                    self._rotate(self.config.layer_ropes[index], rotations),
                    functions.attend(index),
                    functions.activation,
                    None if given is None else given[:, index],
                    functions.routed,
                )
                runs = [sequence.layer(index, common) for sequence in running]
                of_layer = runs[0] if one else runs[0]._replace(sequences=tuple(runs))
                x = outputs[index] = block(x, of_layer)
            return x, outputs

        x, wanted = self.share.passed(x, run, layers)
        hidden = self.model.norm(x)
        if one:
            return [(hidden, tuple(wanted))]
        ends = list(itertools.accumulate(p.tokens.shape[0] for p in parts[:-1]))
        cut = [mx.split(every, ends, axis=0) for every in (hidden, *wanted)]
        return [(own[0], tuple(own[1:])) for own in zip(*cut, strict=True)]

    def masks(self, part: Part) -> dict[int, mx.array]:
        """One mask (N, C) per distinct sliding window, or (N, S) over its layers' rings."""
        _, positions, mask, key_positions, caches = part
        masks = {0: mask}
        # Of every window one layer that sees it.
        for window, index in {window: i for i, window in self.windows.items() if window}.items():
            layer = self._slots[index]
            ring = ring_of(self._caches[layer])
            if ring is not None and caches.room(layer, self._caches[layer]) is None:
                masks[window] = ring.mask(positions, caches)
            else:
                masks[window] = mask & (positions[:, None] < key_positions + window)
        return masks

    def growth(self, positions: mx.array, dtype: mx.Dtype) -> mx.array | None:
        """How much larger queries are at their positions, (N, 1); Ministral 3."""
        if self.config.query_growth is None:
            return None
        beta, step = self.config.query_growth
        growth = 1 + beta * mx.log(1 + mx.floor(positions / step))
        return growth.astype(dtype)[:, None]

    def place(self, layer: int) -> tuple[int, int]:
        """Of a layer: the first of its caches, and the window that it sees."""
        return self._slots[layer], self.windows[layer]

    def _rotate(self, index: int, rotations: Sequence[Rotation]) -> Rotate:
        if index < 0:
            return lambda x, _: x.transpose(1, 0, 2)
        rope, rotation = self._ropes[index], rotations[index]
        return lambda x, heads: rope(x, heads, rotation)

    @property
    def stacks(self) -> bool:
        """Can sequences lie in a stack, as far as layers go?"""
        # Of all layers: machines that share a model put their answers into one order.
        layers = map(self.config.layer, range(self.config.num_layers))
        return all(layer.delta is None and layer.latent is None for layer in layers)

    def common(self, *arrays: mx.array) -> Sequence[mx.array]:
        """See `Share.common`."""
        return self.share.common(*arrays)

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden (M, D) after the final norm -> logits (M, V), scaled and soft-capped."""
        if self.config.tied:
            out = self.model.embed_tokens.as_linear(hidden)
        else:
            out = self.lm_head(hidden)
        return self.scaled(out)

    def scaled(self, out: mx.array) -> mx.array:
        """Products with output rows (M, *) -> logits, scaled and soft-capped."""
        if self.config.logits_divisor != 1.0:
            out = out / self.config.logits_divisor
        if self.config.logits_scale != 1.0:
            out = out * self.config.logits_scale
        if self.config.logits_softcap:
            cap = self.config.logits_softcap
            out = mx.tanh(out / cap) * cap
        return out

    def norm(self, x: mx.array) -> mx.array:
        """What the last layer puts out (..., D) -> what the head reads."""
        out: mx.array = self.model.norm(x)
        return out

    def embed(self, tokens: mx.array) -> mx.array:
        """tokens (...,) -> rows of the input embedding (..., D), without the embedding scale."""
        return self.model.embed_tokens(tokens).astype(self.dtype)

    def head_rows(self, ids: mx.array) -> mx.array:
        """ids (K,) -> rows (K, D) of the output head or tied embedding, dequantised."""
        head = self.model.embed_tokens if self.config.tied else self.lm_head
        rows = head.weight[ids]
        if isinstance(head, nn.QuantizedLinear | nn.QuantizedEmbedding):
            biases = head.get("biases")
            rows = mx.dequantize(
                rows,
                scales=head.scales[ids],
                biases=None if biases is None else biases[ids],
                group_size=head.group_size,
                bits=head.bits,
                mode=head.mode,
            )
        return rows.astype(self.dtype)


def _kept(layer: DecoderConfig, window: int) -> Sequence[LayerCache]:
    """What a layer remembers, within a window or (0) of everything."""
    if layer.delta is not None:
        return delta.caches(layer)
    return [Ring(*layer.kept, window=window) if window else Slab(*layer.kept)]


class _Common(NamedTuple):
    """What a layer does to all sequences of a pass; see `LayerPass`."""

    rotate: Rotate
    attend: Attend
    activation: Activation | None
    given: mx.array | None
    routed: Routed | None


class _Running:
    """One sequence, or those of a stack, while a pass is run.

    Args:
        masks: by window.
        positions: of all nodes.
        caches: what layers remember, where sequences do not lie in a stack.
        extend: adds a layer's rows to its cache: what it reads.
    """

    def __init__(
        self,
        decoder: Decoder,
        masks: Mapping[int, mx.array],
        positions: mx.array,
        dtype: mx.Dtype,
        caches: Pass,
        extend: Callable[[int, mx.array], Any],
        stack: StackPass | None = None,
    ) -> None:
        self._decoder, self._masks, self._caches = decoder, masks, caches
        self._growth = decoder.growth(positions, dtype)
        self._extend, self._stack = extend, stack
        self._seen: dict[int, Any] = {}

    @classmethod
    def alone(cls, decoder: Decoder, part: Part, dtype: mx.Dtype) -> _Running:
        kinds, caches = decoder.caches, part.caches

        def extend(slot: int, rows: mx.array) -> Any:
            return caches.extend(slot, kinds[slot], rows)

        return cls(decoder, decoder.masks(part), part.positions, dtype, caches, extend)

    @classmethod
    def stacked(cls, decoder: Decoder, stack: StackPass, dtype: mx.Dtype) -> _Running:
        masks = {window: stack.mask(window) for window in {*decoder.windows.values(), 0}}
        nothing = Pass((), stack.positions)
        return cls(decoder, masks, stack.positions, dtype, nothing, stack.extend, stack)

    def layer(self, index: int, common: _Common) -> LayerPass:
        slot, window = self._decoder.place(index)
        return LayerPass(
            Memory(self._caches, self._decoder.caches, slot),
            self._masks[window],
            common.rotate,
            functools.partial(self._write, slot),
            common.attend,
            common.activation,
            self._growth,
            common.given,
            common.routed,
            stack=self._stack,
        )

    def _write(self, slot: int, rows: mx.array) -> Any:
        """What a layer reads: its cache with these rows, or what the layer whose cache it is
        read in this pass."""
        if slot not in self._seen:
            self._seen[slot] = self._extend(slot, rows)
        return self._seen[slot]
