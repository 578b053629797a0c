"""Rotary embeddings with one position per token, as tree nodes need."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE, initialize_rope

from ..errors import ModelError
from ..runtime.device import fused_kernels
from .config import RopeConfig

ROPE_TYPES = (
    "default", "dynamic", "linear", "llama3", "longrope", "mrope", "proportional", "su", "yarn",
)  # fmt: skip

Rotation = tuple[mx.array, mx.array]
"""Cosines and sines, each as it multiplies the pairs of a head: (N, 2 or 1, dims/2), transposed
where pairs are neighbours."""


class Rope:
    """One rotary embedding. Frequencies come from mlx-lm, so that they are equal to the bit."""

    def __init__(self, config: RopeConfig):
        kind = config.kind
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"rope type '{kind}' in config.json is not supported; "
                f"needed: one of {', '.join(ROPE_TYPES)}"
            )
        scaling = dict(config.scaling) if config.scaling else None
        if scaling and kind == "su":
            scaling["type"] = "longrope"
        if kind == "dynamic":
            scaling = None  # it changes nothing within max_positions, where the context ends
        try:
            made = initialize_rope(
                config.dims, config.base, config.traditional, scaling, config.max_positions
            )
        except (AssertionError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(
                f"rope scaling of type '{kind}' in config.json is incomplete ({error!r}); "
                "needed: the keys of that type, such as 'factor'"
            ) from error
        self.dims = config.dims
        self.traditional = config.traditional
        self.scale = 1.0
        self.mscale = 1.0
        if isinstance(made, nn.RoPE):
            self.scale = float(made.scale)
            self.inverse = _from_base(float(made.base), self.dims // 2)
        else:
            freqs = made._freqs.astype(mx.float32)
            if freqs.shape != (self.dims // 2,):
                raise ModelError(
                    f"rope scaling of type '{kind}' gives {freqs.size} frequencies; "
                    f"needed: {self.dims // 2} (half of the rotated head size)"
                )
            self.inverse = mx.reciprocal(freqs)
        if isinstance(made, YarnRoPE):
            self.mscale = float(made.mscale)
        elif isinstance(made, SuScaledRoPE):
            self.mscale = float(made._scale)
        mx.eval(self.inverse)

    def prepare(self, positions: mx.array, dtype: mx.Dtype) -> Rotation:
        """Cosines, and sines with their signs, of N positions; once per pass."""
        scaled = positions.astype(mx.float32) * mx.array(self.scale, mx.float32)
        theta = scaled[:, None, None] * self._pairs(self.inverse[None])
        signs = self._pairs(mx.array([[-1.0], [1.0]]))
        # On a CPU at the type of the activations, as mlx-lm rounds them there.
        kind = mx.float32 if fused_kernels() else dtype
        return mx.cos(theta).astype(kind), (mx.sin(theta) * signs).astype(kind)

    def __call__(self, x: mx.array, heads: int, rotation: Rotation) -> mx.array:
        """x (N, A, Dh) -> (A, N, Dh), the first ``heads`` rotated, row n by position n.

        One fused kernel, and with the heads outside no kernel behind it has to copy queries, keys
        or values: mx.fast.rope needs its input in one piece, attention the rows of a head.
        """
        n, every, size = x.shape
        half = self.dims // 2
        sides = (half, 2) if self.traditional else (2, half)
        if self.dims < size:
            turned = self._turn(x[..., : self.dims].reshape(n, every, *sides), heads, rotation)
            rest = x[..., self.dims :].transpose(1, 0, 2)
            return mx.concatenate([turned.reshape(every, n, self.dims), rest], axis=-1)
        return self._turn(x.reshape(n, every, *sides), heads, rotation).reshape(every, n, size)

    def _turn(self, x: mx.array, heads: int, rotation: Rotation) -> mx.array:
        """x (N, A, 2, dims/2), or (N, A, dims/2, 2) -> (A, N, the same)."""
        cos, sin = rotation
        kept = x.transpose(1, 0, 2, 3)
        scaled = kept if self.mscale == 1.0 else kept * mx.array(self.mscale, x.dtype)
        other = scaled[:, :, :, ::-1] if self.traditional else scaled[:, :, ::-1]
        turned = (scaled.astype(cos.dtype) * cos + other.astype(cos.dtype) * sin).astype(x.dtype)
        if heads == kept.shape[0]:
            return turned
        rotated = mx.array([[[[i < heads]]] for i in range(kept.shape[0])])
        return mx.where(rotated, turned, kept)

    def _pairs(self, x: mx.array) -> mx.array:
        """(2 or 1, dims/2 or 1) as the two sides of a pair lie in a head."""
        return x.T if self.traditional else x


def _from_base(base: float, half: int) -> mx.array:
    """Inverse frequencies by the operations of the fallback in mlx/fast.cpp, so that float32 bits
    are mlx-lm's."""
    step = mx.log(mx.array(base, mx.float32)) / half
    return mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * step)
