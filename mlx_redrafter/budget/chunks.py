"""How many tokens of a long prompt to read in one pass: measured once on a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_redrafter.cache.packed import PackedSlab
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.models import Decoder, DecoderConfig, Target
from mlx_redrafter.prefill.reading import USUAL, read
from mlx_redrafter.runtime import clock
from mlx_redrafter.runtime.device import fused_kernels
from mlx_redrafter.runtime.metal import FULL, attention_kernel

SIZES = (128, 256, USUAL, 1024, 2048)
LONG = 2048  # tokens to read: what the best size saves on fewer is less than measuring takes
FAR = 2048  # tokens in the cache
_LAYERS = 2  # that are timed: all are alike, and a pass over all of them would take seconds
_CLEAR = 0.95  # of the usual size's time; what is not clearly faster may be noise
_SLOWER = 1.2  # times the fastest: larger ones still are slower yet
# One layer's attention scores, without a fused kernel: heads x chunk x context x 4 bytes. Masking
# and softmax hold up to three such arrays at a time. 32 heads over a context of 32,768 tokens are
# 4 MiB for each token of the chunk: 256 of them at most.
_SCORES = 2**30


@dataclass(frozen=True)
class Chunks:
    """Seconds that a prompt token takes in passes over so many tokens.

    Args:
        near: by the size of the pass, at the beginning of a prompt.
        far: behind ``FAR`` tokens. Attention grows with the position, and so does the difference.
        layers: that were timed.
    """

    near: Mapping[int, float]
    far: Mapping[int, float]
    layers: int = _LAYERS

    def seconds(self, size: int, position: float) -> float:
        """Of a token at a position."""
        near, far = self.near[size], self.far[size]
        return near + max(far - near, 0.0) * position / FAR

    def size(self, start: int, prompt: int, most: int) -> int:
        """The fastest size for prompt tokens ``start``..``prompt - 1``; at most ``most``."""
        fitting = [n for n in self.near if n <= most]
        usual = min(USUAL, max(fitting))
        middle = (start + prompt) / 2  # the mean over all tokens, as the time is linear in it
        times = {n: self.seconds(n, middle) for n in fitting}
        best = min(times, key=lambda n: times[n])
        return best if times[best] < _CLEAR * times[usual] else usual

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parts = {"near": self.near, "far": self.far}
        by_size = {name: {str(n): t for n, t in part.items()} for name, part in parts.items()}
        return {**by_size, "layers": self.layers}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Chunks:
        """Raises KeyError, TypeError, ValueError on what ``as_dict`` did not make."""
        near, far = (
            {int(n): float(t) for n, t in stored[name].items()} for name in ("near", "far")
        )
        if not {USUAL} <= near.keys() == far.keys():
            raise ValueError("sizes are missing")
        return cls(near, far, int(stored["layers"]))


def most(config: DecoderConfig, prompt: int, packed: bool = False) -> int:
    """The largest chunk whose attention scores over the whole prompt have room; the smallest of
    ``SIZES`` in any case. packed: are keys and values quantised? No fused kernel reads these."""
    if fused_kernels() and not packed and _fused(config):
        return max(SIZES)
    return max(min(SIZES), _SCORES // (4 * config.num_heads * capacity_for(prompt)))


def _fused(config: DecoderConfig) -> bool:
    """Has every layer that attends a kernel for chunks, in which no scores are kept?"""
    if config.attention_softcap or config.latent is not None:
        return False
    layers = [config.layer(i) for i in range(config.num_layers)]
    return all(
        attention_kernel(min(SIZES), layer.num_heads, layer.num_kv_heads, layer.head_dim) == FULL
        for layer in layers
        if layer.delta is None
    )


def packed(target: Target) -> bool:
    """Does it keep keys and values quantised?"""
    return any(isinstance(kind, PackedSlab) for kind in target.caches)


def measure(target: Target, text: Sequence[int] = ()) -> Chunks:
    """Time passes over a few of the target's layers; sizes beyond the usual one until they are
    clearly slower. text: what is read, over and over; where there are no experts, it may be any.
    """
    few = _shallow(target)
    runs: dict[tuple[int, int], clock.Run] = {}
    least = float("inf")
    for n in SIZES:
        if n > USUAL and n > most(target.config, FAR + n, packed(target)):
            break
        mine = {(n, at): _reading(few, n, at, text or (0,)) for at in (0, FAR)}
        once = clock.fastest(mine, 1, warm=n == SIZES[0])[n, FAR] / n
        if n > USUAL and once > _SLOWER * least:
            break
        least = min(least, once)
        runs |= mine
    found = clock.fastest(runs, 3)
    sizes = list(dict.fromkeys(n for n, _ in runs))
    near, far = ({n: found[n, at] / n for n in sizes} for at in (0, FAR))
    return Chunks(near, far, few.config.num_layers)


def _shallow(target: Target) -> Target:
    """The first layers alone, with the target's weights; all of a module that is not ours."""
    if not isinstance(target, Decoder):
        return target
    count = min(_LAYERS, target.config.num_layers)
    few = Decoder(replace(target.config, num_layers=count, tied=True))  # its own: never evaluated
    few.model.embed_tokens, few.model.norm = target.model.embed_tokens, target.model.norm
    few.model.layers = target.model.layers[:count]
    return few


def _reading(target: Target, n: int, at: int, text: Sequence[int]) -> clock.Run:
    """Reads n tokens behind so many, in one pass."""
    prompt = [text[i % len(text)] for i in range(at + n + 1)]
    session = Session(prompt[:at])
    session.open(target.caches, capacity_for(len(prompt)), target.dtype)
    session.stand = at  # where layers that cannot be cut go back to
    session.mark()

    def once() -> None:
        read(target, prompt, session, n)
        session.trim(at)

    return once
