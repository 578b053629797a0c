"""Block drafters: one pass over a block of masked places guesses all levels at once.

DFlash (arXiv 2602.06036), with f the outputs of some of the target's layers side by side, and e the
target's input embedding:

    c = rms(fc f)   the context of a position
    x = e[root, mask, mask, ...]   at the root's position and those that follow
    per layer   u = rms(x);  x = x + attention(u over the keys and values of every c, and of u);
                x = x + mlp(rms(x))
    hidden = rms(x);  logits = the target's head

A place predicts the token after it, or else its own; the root's predicts nothing then. Keys and
values of a context depend on its position alone: they are kept for the whole text.

DSpark (arXiv 2607.05147) adds to a level's logits what follows from the token before, t:

    vanilla  O W[t]
    gated    O (sigmoid(G [hidden; W[t]]) * W[t])
    rnn      g, c, o = J [s; W[t]; hidden];  s = sigmoid(g) s + (1 - sigmoid(g)) tanh(c);  O tanh(o)

Domino (arXiv 2605.29707) does so from all tokens before: s = GRU(e[t], s);  O silu(A [hidden; s]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_redrafter.cache.layer import LayerCache, Pass
from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.drafters import UNFITTED, Ask, Verified, eagle, files
from mlx_redrafter.drafters.beam import search
from mlx_redrafter.drafters.eagle import EagleConfig
from mlx_redrafter.drafters.levels import LevelDrafter, Levels
from mlx_redrafter.models import Target
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.tree.nodes import Candidates, integers
from mlx_redrafter.tree.shape import BEAMS

Embed = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class BlockConfig:
    """Shape of a drafter.

    Args:
        layer: one of its layers, and what it shares with other heads: sizes, output rows, draft
            vocabulary.
        features: layers of the target that it reads.
        places: of a block, the root's included: ``B``.
        mask: the token at all of them but the root's.
        after: does a place predict the token after it, and not its own?
        windows: of every layer in tokens, the place itself included; 0: none.
        causal: of every layer: does a place not see those behind it?
        root_windows: does a window reach back from the root, which it does not count, for every
            place?
        bias: ``none`` | ``vanilla`` | ``gated`` | ``rnn`` | ``domino``.
        rank: width of what its output matrix reads, 0 without one.
        bias_rows: of its output matrix.
        state_size: of Domino's recurrence.
        plain_levels: levels without a bias.
    """

    layer: EagleConfig
    features: tuple[int, ...]
    places: int
    mask: int
    after: bool
    windows: tuple[int, ...]
    causal: tuple[bool, ...]
    root_windows: bool = False
    bias: str = "none"
    rank: int = 0
    bias_rows: int = 0
    state_size: int = 0
    plain_levels: int = 0

    @property
    def levels(self) -> int:
        """Tokens that a block drafts."""
        return self.places if self.after else self.places - 1

    @property
    def draft_vocab_size(self) -> int | None:
        return self.layer.draft_vocab_size


class Layer(eagle.Block):
    """A layer: places see contexts and each other."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def over(
        self, x: mx.array, positions: mx.array, slab: mx.array, seen: mx.array, above: mx.array
    ) -> mx.array:
        """Places x (B, H) at positions (B,), over a slab whose slots are seen (B or 1, C), and over
        those places of which above (B, B) is True."""
        u = self.input_layernorm(x)
        branches = self.self_attn.rows(u, positions), above
        return self(x, self.self_attn.attended(u, positions, slab, seen, branches))


class Markov(nn.Module):
    """DSpark's bias: of the token before, of the place, and in a recurrence of those before it."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        rank, size = config.rank, config.layer.hidden_size
        self._kind = config.bias
        self.previous = nn.Embedding(config.layer.vocab_size, rank)
        self.out = nn.Linear(rank, config.bias_rows, bias=False)
        if config.bias == "gated":
            self.gate = nn.Linear(size + rank, rank)
        if config.bias == "rnn":
            self.joint = nn.Linear(2 * rank + size, 3 * rank)
        self.state_size = rank if config.bias == "rnn" else 1

    def __call__(
        self, tokens: mx.array, hidden: mx.array, state: mx.array, embed: Embed
    ) -> tuple[mx.array, mx.array]:
        """tokens (R,), hidden (R, H), state (R, S) -> bias (R, Vd), the state after it."""
        w = self.previous(tokens)
        if self._kind == "gated":
            w = mx.sigmoid(self.gate(mx.concatenate([hidden, w], axis=-1))) * w
        if self._kind == "rnn":
            every = self.joint(mx.concatenate([state, w, hidden], axis=-1))
            gate, candidate, w = mx.split(every, 3, axis=-1)
            gate, w = mx.sigmoid(gate), mx.tanh(w)
            state = gate * state + (1 - gate) * mx.tanh(candidate)
        return self.out(w), state


class Domino(nn.Module):
    """Domino's bias: of all tokens of the block so far. Its recurrence is torch's GRU."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        size, state = config.layer.hidden_size, config.state_size
        self.input = nn.Linear(size, 3 * state, bias=False)
        self.recur = nn.Linear(state, 3 * state, bias=False)
        self.down = nn.Linear(size + state, config.rank, bias=False)
        self.out = nn.Linear(config.rank, config.bias_rows, bias=False)
        self.state_size = state

    def __call__(
        self, tokens: mx.array, hidden: mx.array, state: mx.array, embed: Embed
    ) -> tuple[mx.array, mx.array]:
        """tokens (R,), hidden (R, H), state (R, S) -> bias (R, Vd), the state after it."""
        reset, update, new = mx.split(self.input(embed(tokens)), 3, axis=-1)
        r, z, n = mx.split(self.recur(state), 3, axis=-1)
        z = mx.sigmoid(update + z)
        n = mx.tanh(new + mx.sigmoid(reset + r) * n)
        state = (1 - z) * n + z * state
        return self.out(nn.silu(self.down(mx.concatenate([hidden, state], axis=-1)))), state


class Block(nn.Module):
    """A block drafter of any kind; a ``drafters.Drafter`` with rows per position."""

    part = BEAMS
    calibration = UNFITTED

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config, layer = config, config.layer
        size, eps = layer.hidden_size, layer.norm_eps
        self.fc = nn.Linear(len(config.features) * size, size, bias=layer.fc_bias)
        self.hidden_norm, self.norm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        self.layers = [Layer(layer) for _ in config.windows]
        if config.bias != "none":
            self.bias: Any = Domino(config) if config.bias == "domino" else Markov(config)
        if layer.rows:
            self.lm_head = nn.Linear(size, layer.rows, bias=False)
        if config.draft_vocab_size:
            self.draft_vocab = mx.zeros((config.draft_vocab_size,), mx.int32)
            self.freeze(keys="draft_vocab", recurse=False)
        self._kind = Slab(2 * layer.num_kv_heads, layer.head_dim, in_place=False)

    def bind(self, target: Target) -> Block:
        """Take what is the target's: its embedding, its output rows where the drafter has none."""
        layer = self.config.layer
        drafted = self.draft_vocab if layer.draft_vocab_size else None
        self._vocabulary = integers(range(layer.vocab_size)) if drafted is None else drafted
        self._embed = target.embed
        self._output: Any = files.target_logits(target, drafted)
        if layer.rows:
            self._output = self._cut(self.lm_head, layer.rows)
        if "bias" in self:
            self._cut(self.bias.out, self.config.bias_rows)
        for one in self.layers:
            one.self_attn.fuse()
            one.mlp.fuse()
        mx.eval(self.parameters())
        return self

    def _cut(self, layer: nn.Linear, rows: int) -> nn.Linear:
        """An output matrix with the rows of the draft vocabulary alone."""
        if rows != self._vocabulary.shape[0]:
            files.cut_rows(layer, self._vocabulary)
        return layer

    @property
    def features(self) -> tuple[int, ...]:
        return self.config.features

    @property
    def caches(self) -> Sequence[LayerCache]:
        """Keys and values of the context at every position, layer by layer."""
        return (self._kind,) * len(self.layers)

    @property
    def vocabulary(self) -> mx.array:
        """(Vd,) int32: the target's ids of its tokens."""
        return self._vocabulary

    def rows(self, read: Features, positions: mx.array) -> list[mx.array]:
        """Keys and values of positions (M,), layer by layer."""
        context = self.hidden_norm(self.fc(read.of(self.features)))
        return [layer.self_attn.rows(context, positions) for layer in self.layers]

    def hidden(self, root: mx.array, position: mx.array, slabs: Sequence[mx.array]) -> mx.array:
        """What a pass over the block puts out: (B, H).

        Args:
            root: (1,) int32, at position (1,).
            slabs: every layer's contexts of the positions before the root's.
        """
        config, places = self.config, integers(range(self.config.places))
        positions = position + places
        x = self._embed(mx.where(places == 0, root, config.mask))
        for i, (layer, slab) in enumerate(zip(self.layers, slabs, strict=True)):
            slots, window = integers(range(slab.shape[2])), config.windows[i]
            seen = (slots < position)[None]
            if window:
                first = position if config.root_windows else (positions + 1).reshape(-1, 1)
                seen = seen & (slots >= first - window)
            x = layer.over(x, positions, slab, seen, self._above(config.causal[i], window))
        return self.norm(x)

    def _above(self, causal: bool, window: int) -> mx.array:
        """(B, B) bool: which places a place sees."""
        places = np.arange(self.config.places)
        behind = places[:, None] - places
        seen = behind >= 0 if causal else np.full(behind.shape, True)
        if window and not self.config.root_windows:
            seen = seen & (behind < window)
        return mx.array(seen)

    # A drafter

    def absorb(self, chunk: Chunk, own: Pass) -> None:
        for i, rows in enumerate(self.rows(chunk.read, chunk.positions)):
            own.extend(i, self._kind, rows)

    def begin(self, read: Features) -> tuple[()]:
        return ()

    def propose(self, state: tuple[()], ask: Ask) -> list[Candidates]:
        assert ask.own is not None
        slabs = [ask.own.settled(i, self._kind) for i in range(len(self.layers))]
        first = 0 if self.config.after else 1
        count = min(ask.shape.depth, self.config.levels)
        hidden = self.hidden(ask.root, ask.position, slabs)[first : first + count]
        cell = Levels(Places(self, hidden), ask.shape.depth)
        levels = search(cell, hidden[0], ask.root, ask.shape, ask.draw, self.calibration)
        return levels[-1:] if ask.shape.one_path else levels

    def commit(self, state: tuple[()], done: Verified) -> tuple[()]:
        """Every node of the tree has a context; those of the path that was accepted are put into
        place by the next step."""
        assert done.own is not None
        for i, rows in enumerate(self.rows(done.read, done.position + done.tree.depths)):
            done.own.leave(i, rows)
        return ()


class Places(LevelDrafter):
    """The levels of one search: what the block's places say, and the bias.

    Args:
        hidden: (T, H), of the places of T levels.
    """

    def __init__(self, drafter: Block, hidden: mx.array) -> None:
        self.config, self.vocabulary = drafter.config, drafter.vocabulary
        self.levels = drafter.config.levels
        self._hidden, self._base, self._embed = hidden, drafter._output(hidden), drafter._embed
        self._bias = drafter.bias if "bias" in drafter else None

    def first(self, context: mx.array, depth: int) -> mx.array:
        """(1, S): zeros."""
        size = 1 if self._bias is None else self._bias.state_size
        return mx.zeros((1, size), self._hidden.dtype)

    def level(self, index: int, tokens: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        """Without a bias, one row of logits for all beams."""
        base, hidden = (x[index : index + 1] for x in (self._base, self._hidden))
        if self._bias is None:
            return base, state
        hidden, state = (mx.broadcast_to(x, (tokens.shape[0], x.shape[1])) for x in (hidden, state))
        bias, state = self._bias(tokens, hidden, state, self._embed)
        return base if index < self.config.plain_levels else base + bias, state
