"""One rule for every temperature.

The token at position t is ``argmax(log p_t / temperature + g_t)``, where p_t is the target's
distribution after all processors and g_t is Gumbel noise keyed by (seed, t); at temperature 0 the
noise is left out. By the Gumbel-max theorem that is an exact draw. The noise does not depend on
the draft, so the same seed gives the same tokens with drafting on, off, or with another drafter.

Processors run in mlx_lm's order: bias, repetition, presence and frequency penalty on the logits;
then top-p, min-p and top-k on the distribution at temperature 1; then the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx

from mlx_redrafter.decoding.filters import restrict
from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import vectorised
from mlx_redrafter.runtime import checks
from mlx_redrafter.runtime.device import fused_kernels
from mlx_redrafter.tree.nodes import DraftTree, integers

Arrays = dict[str, mx.array]
MAX_CONTEXT = 1024
LEAST_TEMP = 0.001
ROUNDINGS = 4  # of a logit, that two passes may differ by
_NUMBERS: dict[str, tuple[float, float]] = {
    "temp": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
_WHOLE = {
    "top_k": (0, 2**31 - 1),
    "repetition_context_size": (1, MAX_CONTEXT),
    "presence_context_size": (1, MAX_CONTEXT),
    "frequency_context_size": (1, MAX_CONTEXT),
    "seed": (0, 2**32 - 1),
}
# An infinite logit has no distribution; one of 1e30 is chosen as surely.
_BIAS = (-math.inf, 1e30)
_ODD, _FAR = 0x9E3779B9, 0x85157AF5  # 2**32 / golden ratio, 2**32 / plastic ratio**2, roughly


@dataclass(frozen=True)
class SamplingParams:
    """Options of a draw, with mlx_lm's names and meanings.

    Args:
        temp: temperature; 0 is greedy and ignores top-k, top-p, min-p and the seed.
        top_p: keep the smallest set of most likely tokens with this much mass; 0 or 1: off.
        top_k: keep the k most likely tokens (and those equal to the k-th); 0: off.
        min_p: keep tokens at least this likely relative to the most likely one; 0: off.
        repetition_penalty: factor on the logits of recent tokens; None, 0 or 1: off.
        presence_penalty: subtracted once from the logits of recent tokens; None or 0: off.
        frequency_penalty: subtracted for every recent occurrence; None or 0: off.
        *_context_size: how many tokens are recent.
        logit_bias: token id -> value added to its logit; -inf: the token is never chosen. The ids
            may be text, as JSON has them.
        seed: 32-bit key of the noise; the same seed draws the same text.

    None stands for the default everywhere.

    Raises:
        OptionError: a value out of its range, or of another type.
    """

    temp: float = 0.0
    top_p: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20
    logit_bias: dict[int, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for option in fields(self):
            name, value = option.name, getattr(self, option.name)
            if value is None:
                value = option.default
            elif name == "logit_bias":
                value = _bias(value)
            elif name in _NUMBERS:
                value = checks.number(name, value, *_NUMBERS[name])
            else:
                value = checks.whole(name, value, *_WHOLE[name])
            object.__setattr__(self, name, value)
        if 0 < self.temp < LEAST_TEMP:
            raise OptionError(
                f"temp {self.temp} is not possible: use 0 for greedy, or {LEAST_TEMP} to 100"
            )

    @property
    def features(self) -> frozenset[str]:
        """What has to be computed; part of the compiled graph's key."""
        names = set()
        if self.logit_bias:
            names.add("bias")
        if self.repetition_penalty not in (None, 0, 1):
            names.add("repetition")
        if self.presence_penalty:
            names.add("presence")
        if self.frequency_penalty:
            names.add("frequency")
        if self.temp > 0:
            names.add("sample")
            names.update(
                name
                for name, on in [
                    ("top_p", 0 < self.top_p < 1),
                    ("min_p", self.min_p > 0),
                    ("top_k", self.top_k > 0),
                ]
                if on
            )
        return frozenset(names)

    @property
    def windows(self) -> tuple[tuple[str, int], ...]:
        """(penalty, recent tokens) of the active penalties, in the order they apply."""
        sizes = {
            "repetition": self.repetition_context_size,
            "presence": self.presence_context_size,
            "frequency": self.frequency_context_size,
        }
        return tuple((name, size) for name, size in sizes.items() if name in self.features)

    def check(self, vocab_size: int) -> None:
        """Refuse a bias that does not fit the vocabulary; raises OptionError."""
        for token in self.logit_bias or ():
            checks.whole("logit_bias token", token, 0, vocab_size - 1)
        banned = [value for value in (self.logit_bias or {}).values() if value == -math.inf]
        if len(banned) == vocab_size:
            raise OptionError("logit_bias bans every token: leave at least one")

    def arrays(self, vocab_size: int) -> Arrays:
        """The values as arrays, so that changing one does not trace a graph again.

        Raises OptionError as `check` does.
        """
        self.check(vocab_size)
        values: Arrays = {}
        if self.logit_bias:
            ids = mx.array(list(self.logit_bias), mx.int32)
            amounts = mx.array(list(self.logit_bias.values()), mx.float32)
            values["bias"] = mx.zeros((vocab_size,), mx.float32).at[ids].add(amounts)
        for name in ("repetition", "presence", "frequency"):
            if name in self.features:
                values[name] = mx.array(getattr(self, f"{name}_penalty"), mx.float32)
        if "sample" in self.features:
            values["temp"] = mx.array(self.temp, mx.float32)
            values["seed"] = mx.array([self.seed], mx.uint32)
        for name in ("top_p", "min_p", "top_k"):
            if name in self.features:
                values[name] = mx.array(getattr(self, name), mx.float32)
        return values


def _bias(given: Any) -> dict[int, float]:
    """Token id -> value, from what JSON, NumPy or a caller wrote; raises OptionError."""
    if not isinstance(given, Mapping):
        raise OptionError(
            f"logit_bias {checks.shown(given)} is not possible: use token ids and what to add, "
            "{42: -5.0}"
        )
    bias: dict[int, float] = {}
    for key, value in given.items():
        if isinstance(key, str) and key.strip().isdecimal():
            key = int(key)
        token = checks.whole("logit_bias token", key, 0)
        if token in bias:
            raise OptionError(f"logit_bias names token {token} twice: give it once")
        bias[token] = checks.number(f"logit_bias of token {token}:", value, *_BIAS)
    return bias


Keys = tuple[mx.array, mx.array]


def noise_keys(seed: mx.array, positions: mx.array) -> Keys:
    """What the noise at positions (R,) int32 is made of, seed (1,) uint32: two of (R, 1) uint32."""
    at = positions.astype(mx.uint32)
    # The second must be nothing that a token's own number makes of the first: both would cancel.
    first = _mixed(_mixed(seed + _ODD) ^ at)
    second = _mixed(_mixed(at) ^ (seed + _FAR))
    return first.reshape(-1, 1), second.reshape(-1, 1)


def gumbel(keys: Keys, tokens: mx.array) -> mx.array:
    """Noise of every token at every position: a function of (seed, position, token) alone.

    The random bits are a hash: the token's number in Weyl's sequence, mixed twice with keys made of
    seed and position (the mixing is lowbias32's, github.com/skeeto/hash-prospector). A CPU takes
    half the time of mx.random, and no token costs anything that is not asked for.

    Args:
        keys: of R positions, see :func:`noise_keys`.
        tokens: (M,) int32.

    Returns:
        (R, M) float32.
    """
    first, second = keys
    bits = _mixed(_mixed(tokens.astype(mx.uint32) * _ODD + first) ^ second)
    uniform = ((bits >> 9).astype(mx.float32) + 0.5) * (1 / (1 << 23))  # exact, never 0 or 1
    return -_log(-_log(uniform))


def _mixed(x: mx.array) -> mx.array:
    """A permutation of uint32 in which every bit depends on every bit."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


def _log(x: mx.array) -> mx.array:
    """The natural logarithm; MLX's own is a library call per element on a CPU."""
    return mx.log(x) if fused_kernels() else vectorised.log(x)


class Draw:
    """The draws at ``count`` positions from ``position`` (1,) on; a `drafters.Draw`."""

    def __init__(self, arrays: Arrays, position: mx.array, count: int) -> None:
        self.temperature = arrays["temp"]
        self._keys = noise_keys(arrays["seed"], position + integers(range(count)))

    def noise(self, ahead: int, tokens: mx.array) -> mx.array:
        """The noise of tokens (M,) so many positions on: (1, M)."""
        first, second = (key[ahead : ahead + 1] for key in self._keys)
        return gumbel((first, second), tokens)


def draw(arrays: Arrays, position: mx.array, count: int) -> Draw | None:
    """None at temperature 0, or where nobody asks."""
    return Draw(arrays, position, count) if "seed" in arrays and count else None


def sample(
    logits: mx.array,
    tree: DraftTree,
    windows: dict[str, mx.array],
    arrays: Arrays,
    position: mx.array,
    told: Callable[[mx.array], None] | None = None,
) -> mx.array:
    """The target's token after every node.

    Args:
        logits: (N, V).
        tree: gives the depth of each node, which selects its noise.
        windows: per active penalty (N, R) int32, the recent tokens of each node, -1 for none.
        arrays: see :meth:`SamplingParams.arrays`.
        position: (1,) int32, the root's.
        told: of `near_ties`.

    Returns:
        (N,) int32.
    """
    scores = logits
    if windows or arrays:  # else the same in every type
        scores = penalise(logits.astype(mx.float32), windows, arrays)
    if "seed" in arrays:
        every = integers(range(logits.shape[-1]))
        drawn = gumbel(noise_keys(arrays["seed"], position + 1 + tree.depths), every)
        scores = restrict(scores, arrays) / arrays["temp"] + drawn
    if told is not None:
        told(near_ties(logits, scores, arrays))
    return mx.argmax(scores, axis=-1).view(mx.int32)


def near_ties(logits: mx.array, scores: mx.array, arrays: Arrays) -> mx.array:
    """Where another token's score is so near the largest that rounding may choose: (N,) bool.

    A pass over other rows beside a node may give logits (N, V) that differ by a few roundings of
    their type, at the size of the largest.
    """
    size = mx.abs(logits).max(-1, keepdims=True).astype(mx.float32)
    margin = ROUNDINGS * mx.finfo(logits.dtype).eps * size
    if "temp" in arrays:
        margin = margin / arrays["temp"]
    scores = scores.astype(mx.float32)
    close = scores >= scores.max(-1, keepdims=True) - margin
    return close.astype(mx.int32).sum(-1) > 1


def penalise(logits: mx.array, windows: dict[str, mx.array], arrays: Arrays) -> mx.array:
    """Bias and penalties. (N, V) -> (N, V)."""
    if "bias" in arrays:
        logits = logits + arrays["bias"]
    for name in ("repetition", "presence", "frequency"):
        if name not in windows:
            continue
        count = _occurrences(windows[name], logits.shape[-1])
        penalty = arrays[name]
        if name == "repetition":
            scaled = mx.where(logits < 0, logits * penalty, logits / penalty)
            logits = mx.where(count > 0, scaled, logits)
        else:
            times = count if name == "frequency" else (count > 0).astype(mx.float32)
            logits = logits - times * penalty
    return logits


def _occurrences(window: mx.array, vocab_size: int) -> mx.array:
    """How often each token stands in each row's window. (N, R) -> (N, V) float32."""
    n, recent = window.shape
    rows = mx.broadcast_to(mx.arange(n)[:, None], (n, recent))
    counts = mx.zeros((n, vocab_size), mx.float32)
    return counts.at[rows, mx.maximum(window, 0)].add((window >= 0).astype(mx.float32))


def recent_tokens(tree: DraftTree, history: mx.array, position: mx.array, size: int) -> mx.array:
    """The last ``size`` tokens up to and including every node: (N, size) int32, -1 for none.

    history (C,) int32 holds the token at every position below the root's ``position`` (1,).
    """
    where = position + tree.depths[:, None] - (size - 1) + mx.arange(size, dtype=mx.int32)[None]
    old = mx.take(history, mx.clip(where, 0, history.shape[0] - 1))
    on_path = mx.clip(where - position, 0, tree.paths.shape[1] - 1)
    new = mx.take_along_axis(tree.paths, on_path, axis=-1)
    recent = mx.where(where < position, old, new)
    return mx.where(where < 0, -1, recent)
