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
from dataclasses import dataclass

import mlx.core as mx

from mlx_redrafter.decoding.tree import DraftTree
from mlx_redrafter.errors import OptionError

Arrays = dict[str, mx.array]
MAX_CONTEXT = 1024


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
        logit_bias: token id -> value added to its logit.
        seed: 32-bit key of the noise.

    Raises:
        OptionError: a value out of its range.
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
        ranges: list[tuple[str, float | None, float, float]] = [
            ("temp", self.temp, 0, 100),
            ("top_p", self.top_p, 0, 1),
            ("top_k", self.top_k, 0, 2**31 - 1),
            ("min_p", self.min_p, 0, 1),
            ("repetition_penalty", self.repetition_penalty, 0, 100),
            ("presence_penalty", self.presence_penalty, -100, 100),
            ("frequency_penalty", self.frequency_penalty, -100, 100),
            ("repetition_context_size", self.repetition_context_size, 1, MAX_CONTEXT),
            ("presence_context_size", self.presence_context_size, 1, MAX_CONTEXT),
            ("frequency_context_size", self.frequency_context_size, 1, MAX_CONTEXT),
            ("seed", self.seed, 0, 2**32 - 1),
        ]
        for name, value, low, high in ranges:
            if value is not None and not low <= value <= high:  # also refuses NaN
                raise OptionError(f"{name} {value} is not possible: use {low} to {high}")
        if 0 < self.temp < 1e-3:
            raise OptionError(f"temp {self.temp} is too small: use 0 for greedy, or 0.001 and more")
        if any(not math.isfinite(v) for v in (self.logit_bias or {}).values()):
            raise OptionError("logit_bias values must be finite numbers")

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

    def arrays(self, vocab_size: int) -> Arrays:
        """The values as arrays, so that changing one does not trace a graph again."""
        values: Arrays = {}
        if self.logit_bias:
            bad = [t for t in self.logit_bias if not 0 <= t < vocab_size]
            if bad:
                raise OptionError(
                    f"logit_bias token {bad[0]} is not possible: vocabulary has {vocab_size} tokens"
                )
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


def gumbel(seed: mx.array, position: mx.array, count: int, vocab_size: int) -> mx.array:
    """Noise for ``count`` positions from ``position`` on: (count, V) float32.

    seed (1,) uint32, position (1,) int32. The key of position t is the pair (seed, t) itself.
    """
    positions = position.astype(mx.uint32) + mx.arange(count, dtype=mx.uint32)
    keys = mx.stack([mx.broadcast_to(seed, (count,)), positions], axis=-1)  # (count, 2)
    return mx.stack([mx.random.gumbel((vocab_size,), key=keys[i]) for i in range(count)])


def choose(
    logits: mx.array,
    tree: DraftTree,
    windows: dict[str, mx.array],
    arrays: Arrays,
    noise: mx.array | None,
) -> mx.array:
    """The target's token after every node.

    Args:
        logits: (N, V).
        tree: gives the depth of each node, which selects its noise.
        windows: per active penalty (N, R) int32, the recent tokens of each node, -1 for none.
        arrays: see :meth:`SamplingParams.arrays`.
        noise: (L+1, V), row d for the choice made at depth d; None at temperature 0.

    Returns:
        (N,) int32.
    """
    if noise is None and not windows and not arrays:
        return mx.argmax(logits, axis=-1).view(mx.int32)  # the same in every type
    logits = penalise(logits.astype(mx.float32), windows, arrays)
    if noise is not None:
        if noise.shape[0] > 1:
            noise = mx.take(noise, tree.depths, axis=0)
        logits = restrict(logits, arrays) / arrays["temp"] + noise
    return mx.argmax(logits, axis=-1).view(mx.int32)


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


def restrict(logits: mx.array, arrays: Arrays) -> mx.array:
    """Log-probabilities with the tokens outside top-p, min-p and top-k at -inf. (N, V)."""
    filters = [name for name in ("top_p", "min_p", "top_k") if name in arrays]
    if not filters:
        return logits
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for name in filters:
        if name == "min_p":
            floor = logp.max(-1, keepdims=True) + mx.log(arrays["min_p"])
            logp = mx.where(logp < floor, -mx.inf, logp)
            continue
        surprise = mx.maximum(-logp, 0.0)  # rounding may put a logp just above 0
        if name == "top_p":
            p = mx.exp(logp)
            limit = _threshold(surprise, p, arrays[name] * p.sum(-1, keepdims=True))
        else:
            limit = _threshold(surprise, mx.array(1.0), arrays[name])
        logp = mx.where(surprise > limit, -mx.inf, logp)
    return logp


def _threshold(x: mx.array, weights: mx.array, budget: mx.array) -> mx.array:
    """The smallest t per row for which the entries <= t weigh at least the budget: (N, 1).

    Bisection over the bits of a non-negative float, which order as the floats do: exact after 31
    halvings, and no sort of the vocabulary (on Metal a merge sort of many passes). Infinity where
    all entries together weigh less.
    """
    low = mx.full((*x.shape[:-1], 1), -1, mx.int32)  # below 0: nothing is in
    high = mx.full(low.shape, 0x7F800000, mx.int32)  # infinity: everything is in
    for _ in range(31):
        middle = low + (high - low) // 2  # the sum may overflow
        inside = mx.where(x <= mx.view(middle, mx.float32), weights, 0.0).sum(-1, keepdims=True)
        enough = inside >= budget
        low, high = mx.where(enough, low, middle), mx.where(enough, middle, high)
    return mx.view(high, mx.float32)


def _occurrences(window: mx.array, vocab_size: int) -> mx.array:
    """How often each token stands in each row's window. (N, R) -> (N, V) float32."""
    n, recent = window.shape
    rows = mx.broadcast_to(mx.arange(n)[:, None], (n, recent))
    counts = mx.zeros((n, vocab_size), mx.float32)
    return counts.at[rows, mx.maximum(window, 0)].add((window >= 0).astype(mx.float32))


def recent_tokens(
    tree: DraftTree, history: mx.array, position: mx.array, size: int, depth: int
) -> mx.array:
    """The last ``size`` tokens up to and including every node: (N, size) int32, -1 for none.

    history (C,) int32 holds the token at every position below the root's ``position`` (1,).
    """
    tokens, _, depths, ancestors = tree
    levels = mx.arange(depth + 1, dtype=mx.int32)
    # The node at each depth of each node's path (N, L+1); past the node itself: never read.
    at = mx.argmax(
        ancestors[:, None, :] & (depths[None, None, :] == levels[None, :, None]), axis=-1
    )
    path = mx.take(tokens, at)
    where = position + depths[:, None] - (size - 1) + mx.arange(size, dtype=mx.int32)[None]
    old = mx.take(history, mx.clip(where, 0, history.shape[0] - 1))
    new = mx.take_along_axis(path, mx.clip(where - position, 0, depth), axis=-1)
    recent = mx.where(where < position, old, new)
    return mx.where(where < 0, -1, recent)
