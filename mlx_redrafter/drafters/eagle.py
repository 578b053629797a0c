"""EAGLE heads: one decoder block over pairs of a hidden state and the token that follows it.

EAGLE-3 (arXiv 2503.01840), with f = fc of some layers' outputs, and e the token's input embedding:

    u = [rms(e); rms(f)];  y = f + attention(u);  out = y + mlp(rms(y));  logits = U rms(out)

EAGLE-1 and 2 (arXiv 2401.15077, 2406.16858), with f the target's last hidden state:

    u = fc [e; f];         y = u + attention(u);  out = y + mlp(rms(y));  logits = the target's head

A rollout goes on with f = out. Keys and values of the pair at a position, (f of p, token p + 1),
depend on that pair alone: they are kept for the whole text, made of what the target's passes left.
Those of a draft's own pairs live as long as the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.cache.layer import LayerCache, Pass
from mlx_redrafter.cache.slabs import Slab
from mlx_redrafter.drafters import UNFITTED, Ask, Verified, files
from mlx_redrafter.drafters.beam import lineage, search
from mlx_redrafter.models import Target
from mlx_redrafter.models.attention import attend, attend_branches
from mlx_redrafter.models.config import DecoderConfig, RopeConfig
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.models.fuse import fuse
from mlx_redrafter.models.layers import MLP
from mlx_redrafter.models.rope import Rope
from mlx_redrafter.tree.nodes import Candidates, integers
from mlx_redrafter.tree.shape import BEAMS


@dataclass(frozen=True)
class EagleConfig:
    """Shape of a head.

    Args:
        hidden_size: its own width ``H``.
        target_size: ``D`` of the target.
        vocab_size: ``V`` of the target.
        features: layers of the target that it reads; empty: EAGLE-1, the last hidden state.
        num_heads, num_kv_heads, head_dim, intermediate_size, norm_eps, rope: of its block.
        rows: of its output matrix; 0: it uses the target's.
        draft_vocab_size: None: the target's whole vocabulary.
        own_embedding: has it an input embedding of its own?
        fc_bias, attention_bias, output_bias, mlp_bias: where biases are; attention's are those of
            queries, keys and values.
        feature_norm: before fc ``none``, one over ``all`` features, or one for ``each`` layer.
        qk_norm: are queries and keys normed, head by head?
        norm_before_residual: does the block add to the normed f instead of f?
        norm_output: does a rollout go on with rms(out)?
        last_norm: is there a norm before the output matrix?
    """

    hidden_size: int
    target_size: int
    vocab_size: int
    features: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    rows: int = 0
    draft_vocab_size: int | None = None
    own_embedding: bool = False
    fc_bias: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    feature_norm: str = "none"
    qk_norm: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    last_norm: bool = True

    @property
    def pair_size(self) -> int:
        """Width of what attention reads."""
        return 2 * self.hidden_size if self.features else self.hidden_size


class Attention(nn.Module):
    """Grouped-query attention whose keys and values may be asked for alone."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self._heads, self._kv_heads = config.num_heads, config.num_kv_heads
        self._size, self._scale = config.head_dim, config.head_dim**-0.5
        wide, bias = config.pair_size, config.attention_bias
        q_size, kv_size = self._heads * self._size, self._kv_heads * self._size
        self.q_proj = nn.Linear(wide, q_size, bias=bias)
        self.k_proj = nn.Linear(wide, kv_size, bias=bias)
        self.v_proj = nn.Linear(wide, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self._size, config.norm_eps)
            self.k_norm = nn.RMSNorm(self._size, config.norm_eps)
        self._rope = Rope(config.rope)

    def fuse(self) -> None:
        """Keys and values are one projection, where they can be."""
        joined = fuse([self.k_proj, self.v_proj])
        if joined is not None:
            self.kv_proj = joined
            del self.k_proj, self.v_proj

    def rows(self, u: mx.array, positions: mx.array) -> mx.array:
        """Keys and values of pairs u (R, *) at positions (R,): (1, 2*Hkv, R, Dh)."""
        shape = (u.shape[0], self._kv_heads, self._size)
        if "kv_proj" in self:
            k, v = mx.split(self.kv_proj(u), 2, axis=-1)
        else:
            k, v = self.k_proj(u), self.v_proj(u)
        k, v = k.reshape(shape), v.reshape(shape)
        if "k_norm" in self:
            k = self.k_norm(k)
        rotation = self._rope.prepare(positions, u.dtype)
        return self._rope(mx.concatenate([k, v], axis=1), self._kv_heads, rotation)[None]

    def queries(self, u: mx.array, positions: mx.array) -> mx.array:
        """(R, *) -> (H, R, Dh)."""
        q = self.q_proj(u).reshape(u.shape[0], self._heads, self._size)
        if "q_norm" in self:
            q = self.q_norm(q)
        return self._rope(q, self._heads, self._rope.prepare(positions, u.dtype))

    def attended(
        self,
        u: mx.array,
        positions: mx.array,
        slab: mx.array,
        seen: mx.array,
        branches: tuple[mx.array, mx.array] | None = None,
    ) -> mx.array:
        """Over the slots that are seen (R or 1, C), and over rows of branches where each query's
        mask (R, M) is True: (R, H)."""
        q = self.queries(u, positions)
        if branches is None:
            mask = mx.broadcast_to(seen, (u.shape[0], slab.shape[2]))
            return self.o_proj(attend(q, slab, mask, self._scale, 0.0))
        rows, above = branches
        return self.o_proj(attend_branches(q, slab, seen, rows, above, self._scale))


class Block(nn.Module):
    """The head's decoder block."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(config.hidden_size, config.norm_eps)

        self.self_attn = Attention(config)
        self.mlp = MLP(_as_decoder(config))
        self.post_attention_layernorm = norm()
        if config.features:
            self.input_layernorm, self.hidden_norm = norm(), norm()

    def __call__(self, residual: mx.array, attended: mx.array) -> mx.array:
        """(R, H), (R, H) -> (R, H)."""
        y = residual + attended
        return y + self.mlp(self.post_attention_layernorm(y))


class Eagle(nn.Module):
    """A head of either kind; a ``drafters.Drafter`` with rows per position."""

    part = BEAMS
    calibration = UNFITTED

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        width, size, count = config.hidden_size, config.target_size, len(config.features)
        self.fc = nn.Linear(count * size or width + size, width, bias=config.fc_bias)
        if config.feature_norm == "all":
            self.input_norm = nn.RMSNorm(count * size, config.norm_eps)
        if config.feature_norm == "each":
            self.fc_norm = [nn.RMSNorm(size, config.norm_eps) for _ in range(count)]
        self.midlayer = Block(config)
        if config.last_norm:
            self.norm = nn.RMSNorm(width, config.norm_eps)
        if config.rows:
            self.lm_head = nn.Linear(width, config.rows, bias=False)
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.draft_vocab_size:
            self.draft_vocab = mx.zeros((config.draft_vocab_size,), mx.int32)
            self.freeze(keys="draft_vocab", recurse=False)
        self._kind = Slab(2 * config.num_kv_heads, config.head_dim, in_place=False, ahead=1)

    def bind(self, target: Target) -> Eagle:
        """Take what is the target's: its embedding, its output rows where the head has none."""
        config = self.config
        self._embed = self.embed_tokens if config.own_embedding else target.embed
        drafted = self.draft_vocab if config.draft_vocab_size else None
        self._vocabulary = integers(range(config.vocab_size)) if drafted is None else drafted
        if not config.rows:
            self._output: Any = files.target_logits(target, drafted)
        else:
            self._output = self.lm_head
            if drafted is not None and config.rows != drafted.shape[0]:
                files.cut_rows(self.lm_head, drafted)
        self.midlayer.self_attn.fuse()
        self.midlayer.mlp.fuse()
        mx.eval(self.parameters())
        return self

    @property
    def features(self) -> tuple[int, ...]:
        return self.config.features

    @property
    def caches(self) -> Sequence[LayerCache]:
        """Keys and values of the pair at every position."""
        return (self._kind,)

    @property
    def vocabulary(self) -> mx.array:
        """(Vd,) int32: the target's ids of its tokens."""
        return self._vocabulary

    def token_ids(self, picks: mx.array) -> mx.array:
        """Draft-vocabulary indices -> token ids of the target."""
        return mx.take(self._vocabulary, picks) if self.config.draft_vocab_size else picks

    def mixed(self, read: mx.array) -> mx.array:
        """f of what the target's layers put out (M, layers * D): (M, H)."""
        if not self.config.features:
            return read
        if "input_norm" in self:
            read = self.input_norm(read)
        if "fc_norm" in self:
            parts = mx.split(read, len(self.fc_norm), axis=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            read = mx.concatenate(normed, axis=-1)
        return self.fc(read)

    def pairs(self, embedding: mx.array, f: mx.array) -> tuple[mx.array, mx.array]:
        """e (R, H), f (R, H) -> what the block adds to (R, H), what attention reads (R, *)."""
        if not self.config.features:
            u = self.fc(mx.concatenate([embedding, f], axis=-1))
            return u, u
        normed = self.midlayer.hidden_norm(f)
        u = mx.concatenate([self.midlayer.input_layernorm(embedding), normed], axis=-1)
        return normed if self.config.norm_before_residual else f, u

    def rows(self, tokens: mx.array, f: mx.array, positions: mx.array) -> mx.array:
        """Keys and values of the pairs of f (M, H) and the tokens (M,) that follow."""
        _, u = self.pairs(self._embed(tokens), f)
        return self.midlayer.self_attn.rows(u, positions)

    def output(self, out: mx.array) -> tuple[mx.array, mx.array]:
        """Of the block's output (R, H): logits (R, Vd), and the f of a rollout (R, H)."""
        normed = self.norm(out) if "norm" in self else out
        return self._output(normed), normed if self.config.norm_output else out

    # A drafter

    def absorb(self, chunk: Chunk, own: Pass) -> None:
        f = self.mixed(chunk.read.of(self.features))
        own.extend(0, self._kind, self.rows(chunk.following, f, chunk.positions))

    def begin(self, read: Features) -> mx.array:
        """(1, H): f of the position before the root's."""
        return self.mixed(read.of(self.features))

    def propose(self, state: mx.array, ask: Ask) -> list[Candidates]:
        assert ask.own is not None
        cell = Branches(self, ask.own.settled(0, self._kind), ask.position)
        levels = search(cell, state[0], ask.root, ask.shape, ask.draw, self.calibration)
        return levels[-1:] if ask.shape.one_path else levels

    def commit(self, state: mx.array, done: Verified) -> mx.array:
        """Every node of the tree and the target's token after it are a pair; those of the path that
        was accepted are put into place by the next step."""
        assert done.own is not None
        f = self.mixed(done.read.of(self.features))
        following = mx.maximum(done.choices, 0)
        done.own.leave(0, self.rows(following, f, done.position + done.tree.depths))
        return mx.take(f, done.last, axis=0) if f.shape[0] > 1 else f


class Branches:
    """The cell of one search, a `drafters.Cell`. The pairs of all its levels are kept beside the
    slab, and each beam knows which of them are above it.

    Args:
        slab: (1, 2*Hkv, C, Dh), the pairs of all positions before the root's.
        position: (1,) int32, the root's.
    """

    def __init__(self, head: Eagle, slab: mx.array, position: mx.array) -> None:
        self._head, self._slab, self._position = head, slab, position
        self._seen = (integers(range(slab.shape[2])) < position)[None]
        self._rows: mx.array | None = None
        self._level = 0
        self.vocabulary = head.vocabulary

    def context(self, read: mx.array) -> mx.array:
        return read

    def start(self, context: mx.array) -> tuple[tuple[mx.array, ...], mx.array]:
        """f (H,) -> the state: f (1, H), later also which pairs are above (R, M)."""
        return (context[None],), context

    def step(
        self, tokens: mx.array, state: tuple[mx.array, ...], fixed: mx.array
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        head, block, beams = self._head, self._head.midlayer, tokens.shape[0]
        f, *above = state
        f = mx.broadcast_to(f, (beams, f.shape[1]))
        residual, u = head.pairs(head._embed(tokens), f)
        positions = self._position + integers([self._level - 1] * beams)
        branches = None
        if self._level:  # the root's own pair is in the slab
            rows = block.self_attn.rows(u, positions)
            self._rows = rows if self._rows is None else mx.concatenate([self._rows, rows], axis=2)
            above = [lineage(above[0] if above else None, beams)]
            branches = self._rows, above[0]
        self._level += 1
        attended = block.self_attn.attended(u, positions, self._slab, self._seen, branches)
        logits, f = head.output(block(residual, attended))
        return logits, (f, *above)

    def follow(
        self, picks: mx.array, state: tuple[mx.array, ...], fixed: mx.array
    ) -> tuple[mx.array, tuple[mx.array, ...]]:
        return self.step(self.token_ids(picks), state, fixed)

    def token_ids(self, picks: mx.array) -> mx.array:
        return self._head.token_ids(picks)


def _as_decoder(config: EagleConfig) -> DecoderConfig:
    """The block's feed-forward layer as a decoder has it."""
    return DecoderConfig(
        model_type="eagle",
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_layers=1,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_positions=config.rope.max_positions,
        norm_eps=config.norm_eps,
        attention_scale=config.head_dim**-0.5,
        ropes=(config.rope,),
        layer_ropes=(0,),
        layer_windows=(0,),
        mlp_bias=config.mlp_bias,
    )
