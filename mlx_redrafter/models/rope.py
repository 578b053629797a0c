"""Rotary embeddings with one position per token, as tree nodes need."""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE, initialize_rope

from ..errors import ModelError
from .config import RopeConfig

ROPE_TYPES = ("default", "linear", "llama3", "longrope", "su", "yarn")

Rotation = tuple[mx.array, mx.array]


def fused_kernels() -> bool:
    """True where mx.fast has real kernels; on the CPU it decomposes into primitives."""
    return bool(mx.default_device() == mx.Device(mx.gpu))


def rope_type(config: RopeConfig) -> str:
    """The scaling's name; checkpoints spell the key `type` or `rope_type`."""
    scaling = config.scaling or {}
    return str(scaling.get("type") or scaling.get("rope_type") or "default")


class Rope:
    """One rotary embedding. Frequencies come from mlx-lm, so that they are equal to the bit."""

    def __init__(self, config: RopeConfig):
        kind = rope_type(config)
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"rope type '{kind}' in config.json is not supported; "
                f"needed: one of {', '.join(ROPE_TYPES)}"
            )
        scaling = dict(config.scaling) if config.scaling else None
        if scaling and kind == "su":
            scaling["type"] = "longrope"
        try:
            made = initialize_rope(
                config.dims, config.base, config.traditional, scaling, config.max_positions
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(
                f"rope scaling of type '{kind}' in config.json is incomplete ({error!r}); "
                "needed: the keys of that type, such as 'factor'"
            ) from error
        self.dims = config.dims
        self.traditional = config.traditional
        self.base: float | None = None
        self.scale = 1.0
        self.mscale = 1.0
        self.freqs: mx.array | None = None
        if isinstance(made, nn.RoPE):
            self.base, self.scale = float(made.base), float(made.scale)
        else:
            self.freqs = made._freqs.astype(mx.float32)
            if self.freqs.shape != (self.dims // 2,):
                raise ModelError(
                    f"rope scaling of type '{kind}' gives {self.freqs.size} frequencies; "
                    f"needed: {self.dims // 2} (half of the rotated head size)"
                )
        if isinstance(made, YarnRoPE):
            self.mscale = float(made.mscale)
        elif isinstance(made, SuScaledRoPE):
            self.mscale = float(made._scale)
        self.inverse = self._inverse_frequencies()
        mx.eval(self.inverse)

    def _inverse_frequencies(self) -> mx.array:
        # The operations of the fallback in mlx/fast.cpp, so that float32 bits are mlx-lm's.
        if self.base is None:
            return mx.reciprocal(cast(mx.array, self.freqs))
        half = self.dims // 2
        step = mx.log(mx.array(self.base, mx.float32)) / half
        return mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * step)

    def prepare(self, positions: mx.array, dtype: mx.Dtype) -> Rotation | None:
        """Cosines and sines, each (N, 1, dims/2), once per pass; None where mx.fast.rope runs."""
        if fused_kernels():
            return None
        scaled = positions.astype(mx.float32) * mx.array(self.scale, mx.float32)
        theta = scaled[:, None, None] * self.inverse
        return mx.cos(theta).astype(dtype), mx.sin(theta).astype(dtype)

    def __call__(self, x: mx.array, positions: mx.array, rotation: Rotation | None) -> mx.array:
        """Rotate x (N, heads, Dh), row n by positions[n]; same shape and dtype."""
        if self.mscale != 1.0:
            x = x * self._mscales(x.shape[-1], x.dtype)
        if rotation is None:
            # Tokens on the batch axis: mx.fast.rope takes one offset per batch entry.
            y = mx.fast.rope(
                x[:, :, None],
                self.dims,
                traditional=self.traditional,
                base=self.base,
                scale=self.scale,
                offset=positions,
                freqs=self.freqs,
            )
            return y[:, :, 0]
        return self._rotate(x, *rotation)

    def _mscales(self, head_dim: int, dtype: mx.Dtype) -> mx.array:
        scale = mx.full((self.dims,), self.mscale, dtype)
        if self.dims == head_dim:
            return scale
        return mx.concatenate([scale, mx.ones((head_dim - self.dims,), dtype)])

    def _rotate(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        half = self.dims // 2
        if self.traditional:
            x1, x2 = x[..., 0 : self.dims : 2], x[..., 1 : self.dims : 2]
        else:
            x1, x2 = x[..., :half], x[..., half : self.dims]
        y1 = x1 * cos - x2 * sin
        y2 = x1 * sin + x2 * cos
        if self.traditional:
            parts = [mx.stack([y1, y2], axis=-1).reshape(*x.shape[:-1], self.dims)]
        else:
            parts = [y1, y2]
        if self.dims < x.shape[-1]:
            parts.append(x[..., self.dims :])
        return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
