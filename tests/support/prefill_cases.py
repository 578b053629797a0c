"""What the tests of sparse prefill share: random arrays, options for tiny models, reading."""

from __future__ import annotations

from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import prefill_reference as reference

from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.models import Decoder
from mlx_redrafter.prefill.config import HeadPattern, SparsePrefill
from mlx_redrafter.prefill.reading import read
from mlx_redrafter.prefill.selectors import Blocks, Chunk, Columns
from mlx_redrafter.prefill.sparse import SELECTORS, SparseAttention, attend_to
from mlx_redrafter.stats import PrefillStats

BLOCK = 16
SMALL: dict[str, Any] = {
    "block": 16, "stride": 4, "min_context": 32, "dense_tail": 16, "sink": 16, "local": 16,
    "max_density": 1.0, "tau": 0.5,
}  # fmt: skip
# Lines so few that the tiny prompts are thinned out.
FEW = tuple({head: HeadPattern(vertical=1, slash=1) for head in range(4)} for _ in range(3))
MODES = {
    mode: SparsePrefill(mode, **SMALL, patterns=FEW if mode == "minference" else None)  # type: ignore[arg-type]
    for mode in SELECTORS
}
XATTENTION, TRIANGLEMIX = MODES["xattention"], MODES["trianglemix"]


def fresh(target: Decoder, length: int) -> Session:
    return Session().open(target.caches, capacity_for(length), target.dtype)


def read_by(
    target: Decoder,
    prompt: list[int],
    options: SparsePrefill | None = None,
    step: int = 64,
) -> tuple[mx.array, Session, PrefillStats | None]:
    """Final hidden state (1, D), the session, what sparse prefill did."""
    session = fresh(target, len(prompt))
    sparse = SparseAttention(options, target.config) if options is not None else None
    hidden = read(target, prompt, session, step, sparse=sparse).hidden
    return hidden, session, sparse.stats if sparse is not None else None


def rows(session: Session) -> np.ndarray:
    """All keys and values of the tokens that the session holds."""
    kept = [np.array(slab)[0, :, : len(session.tokens)] for slab in session.caches]
    return np.concatenate([slab.ravel() for slab in kept])


def random_case(
    seed: int, heads: int = 4, kv_heads: int = 2, offset: int = 64, n: int = 48, size: int = 8
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q (H, n, Dh), keys and values (Hkv, offset + n, Dh)."""
    rng = np.random.default_rng(seed)
    shapes = ((heads, n, size), *2 * [(kv_heads, offset + n, size)])
    q, keys, values = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, keys, values


def who_sees_whom(chosen: Blocks | Columns, chunk: Chunk) -> np.ndarray:
    """(H, n, length) of integers: how often each key enters, read off the result.

    Queries of zeros look at everything alike, and the value of key k is the k-th unit vector.
    """
    length, kv_heads = chunk.length, chunk.kv_heads
    q = np.zeros((chunk.heads, chunk.q.shape[1], length), np.float32)
    values = np.stack([np.eye(length, dtype=np.float32)] * kv_heads)
    slab = reference.slab_of(np.zeros_like(values), values, chunk.slab.shape[2])
    out = attend_to(chosen, Chunk(mx.array(q), slab, chunk.offset, BLOCK, 1.0))
    weights = np.array(out).reshape(-1, chunk.heads, length).transpose(1, 0, 2)
    own = np.arange(chunk.offset, length)  # the diagonal enters once and gives the unit
    return weights / weights[:, np.arange(len(own)), own][..., None]
