"""Multi-head latent attention (DeepSeek V2, arXiv 2405.04434), absorbed: the latent vectors are
attended to as they are kept, by one token or by many, and never made into keys and values."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear

from mlx_redrafter.cache.packed import Packed, Seen

from .attention import masked_softmax, mixed, readable, scored
from .config import DecoderConfig
from .layers import LayerPass


class LatentAttention(nn.Module):
    """Attention of one layer over a slab (1, 1, C, rank + rope). N tokens are computed as one is;
    mlx-lm expands the whole cache for more than one, and agrees up to rounding."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        latent = config.latent
        assert latent is not None, "a latent layer has a configuration"
        self._latent, self._heads, self._scale = latent, config.num_heads, config.attention_scale
        dim, q_size = config.hidden_size, config.num_heads * (latent.plain + latent.rope)
        if latent.query_rank:
            self.q_a_proj = nn.Linear(dim, latent.query_rank, bias=latent.bias)
            self.q_a_layernorm = nn.RMSNorm(latent.query_rank, latent.eps)
            self.q_b_proj = nn.Linear(latent.query_rank, q_size, bias=False)
        else:
            self.q_proj = nn.Linear(dim, q_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(dim, latent.rank + latent.rope, bias=latent.bias)
        self.kv_a_layernorm = nn.RMSNorm(latent.rank, latent.eps)
        self.embed_q = MultiLinear(latent.plain, latent.rank, config.num_heads)
        self.unembed_out = MultiLinear(latent.rank, latent.value, config.num_heads)
        self.o_proj = nn.Linear(config.num_heads * latent.value, dim, bias=latent.bias)

    def fuse(self) -> None:
        """Nothing: its projections read different inputs, or have norms between them."""

    def _queries(self, x: mx.array) -> mx.array:
        """x (N, D) -> (N, H, plain + rope)."""
        if "q_proj" in self:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return q.reshape(x.shape[0], self._heads, -1)

    def __call__(self, x: mx.array, run: LayerPass) -> mx.array:
        """x (N, D) -> (N, D)."""
        latent, heads = self._latent, self._heads
        q = self._queries(x)
        kept, key = mx.split(self.kv_a_proj_with_mqa(x), [latent.rank], axis=-1)
        turned = mx.concatenate([q[..., latent.plain :], key[:, None]], axis=1)
        turned = run.rotate(turned, heads + 1)  # (H + 1, N, rope)
        rows = mx.concatenate([self.kv_a_layernorm(kept)[None], turned[heads:]], axis=-1)
        absorbed = self.embed_q(q[..., : latent.plain].transpose(1, 0, 2))  # (H, N, rank)
        q = mx.concatenate([absorbed, turned[:heads]], axis=-1)
        out = run.each(self._mixed, q.transpose(1, 0, 2), rows[0])  # (N, H, rank)
        out = self.unembed_out(out.transpose(1, 0, 2))
        return self.o_proj(out.transpose(1, 0, 2).reshape(x.shape[0], -1))

    def _mixed(self, run: LayerPass, q: mx.array, rows: mx.array) -> mx.array:
        """q (N, H, rank + rope), rows (N, rank + rope), which are kept -> (N, H, rank)."""
        assert self._latent is not None
        slab = run.write(rows[None, None])
        q = q.transpose(1, 0, 2)
        return _attend(q, slab, run.mask, self._scale, self._latent.rank).transpose(1, 0, 2)


def _attend(q: mx.array, slab: Seen, mask: mx.array, scale: float, values: int) -> mx.array:
    """q (H, B*n, W) over slabs (B, 1, C, W) where mask (B*n, S) is True; (H, B*n, values), of the
    first ``values`` numbers of a row. Only the first S <= C slots are read."""
    heads, total, width = q.shape
    rows, seen = slab.shape[0], mask.shape[1]
    kept = readable(slab[:, 0, :seen])  # (B, S, W)
    q = (q * mx.array(scale, q.dtype)).reshape(heads, rows, -1, width).transpose(1, 0, 2, 3)
    scores = scored(q.reshape(rows, -1, width), kept)
    scores = scores.reshape(rows, heads, -1, seen)
    weights = masked_softmax(scores, mask.reshape(rows, 1, -1, seen))
    if not isinstance(kept, Packed):
        kept = kept[..., :values]
    out = mixed(weights.reshape(rows, -1, seen), kept)[..., :values]
    return out.reshape(rows, heads, -1, values).transpose(1, 0, 2, 3).reshape(heads, total, values)
