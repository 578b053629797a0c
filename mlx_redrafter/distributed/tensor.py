"""Every layer cut between machines: by heads, and by the inner columns of feed-forward layers.

What is made of a cut layer is a sum with one part for each machine; biases behind such a sum are
the first machine's. Everything else of a model is on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_redrafter.distributed.link import Link
from mlx_redrafter.errors import ModelError
from mlx_redrafter.models.config import DecoderConfig
from mlx_redrafter.models.share import Layers

Shares = Sequence[int]
Segment = tuple[int, int]
ROWS, COLUMNS, LAST, FIRST = "rows", "columns", "last", "first"
_WIDE = 64  # inner columns that stay together, where there are enough


@dataclass(frozen=True)
class Cut:
    """Segments of so many numbers, along the outputs or inputs of a matrix, or an axis."""

    along: str
    segments: tuple[Segment, ...]
    total: int

    def of(self, name: str, value: mx.array, first: bool) -> mx.array:
        """This machine's part of a tensor; first: is this the first machine?"""
        bias = name.endswith(".bias")
        if self.along == COLUMNS and bias:
            return value if first else mx.zeros_like(value)
        axis = {ROWS: -1 if bias else -2, COLUMNS: -1, LAST: -1, FIRST: 0}[self.along]
        size = value.shape[axis]
        parts = []
        for start, stop in self.segments:
            if start * size % self.total or stop * size % self.total:
                raise ModelError(
                    f"{name} is quantised in groups of {self.total // size}, which {start} to "
                    f"{stop} of {self.total} do not hold whole: give other --shares, or "
                    "--split pipeline"
                )
            at = [slice(None)] * value.ndim
            at[axis] = slice(start * size // self.total, stop * size // self.total)
            parts.append(value[tuple(at)])
        return mx.contiguous(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis))


class Tensor:
    """One machine's part of every layer.

    Args:
        link: to the others.
        shares: of all machines, in any unit.
        groups: by layer, how many inner numbers of a feed-forward layer are quantised together.

    Raises:
        ModelError: a layer that cannot be cut so.
    """

    routes = True

    def __init__(
        self, config: DecoderConfig, link: Link, shares: Shares, groups: Mapping[int, int]
    ) -> None:
        self.held = range(config.num_layers)
        self._link, self._shares, self._groups = link, shares, groups
        self.total, self.common = link.total, link.common
        for index in self.held:
            self.layer(config, index)

    def passed(
        self, x: mx.array, run: Layers, layers: Sequence[int]
    ) -> tuple[mx.array, list[mx.array]]:
        x, outputs = run(x)
        return x, [outputs[i] for i in layers]

    def layer(self, config: DecoderConfig, index: int) -> DecoderConfig:
        """A layer with this machine's heads and columns."""
        one = config.layer(index)
        if one.experts is None or one.experts_beside:
            a, b = self._columns(one.intermediate_size, index)
            changed = replace(one, intermediate_size=b - a)
        else:
            changed = one
        if one.experts is not None:
            a, b = self._columns(one.experts.size, index)
            shared = self._columns(one.experts.shared, index) if one.experts.shared else (0, 0)
            cut = replace(one.experts, size=b - a, shared=shared[1] - shared[0])
            changed = replace(changed, experts=cut)
        if one.delta is not None:
            a, b = self._whole(one.delta.key_heads, "heads of keys", config)
            each = one.delta.value_heads // one.delta.key_heads
            delta = replace(one.delta, key_heads=b - a, value_heads=each * (b - a))
            return replace(changed, delta=delta)
        if one.latent is not None:
            a, b = self._whole(one.num_heads, "heads", config)
            return replace(changed, num_heads=b - a, num_kv_heads=b - a)
        if one.qk_norm == "full":
            raise ModelError(
                f"model_type '{config.model_type}' norms all heads together, which machines that "
                "share them cannot do: give --split pipeline"
            )
        (qa, qb), (a, b) = self._heads(one)
        return replace(changed, num_heads=qb - qa, num_kv_heads=b - a)

    def cut(self, config: DecoderConfig, index: int, name: str, value: mx.array) -> mx.array:
        """Of a layer's tensor, by its name within the layer, this machine's part."""
        one = config.layer(index)
        module = name.rpartition(".")[0]
        cuts = self._cuts(one, index)
        found = cuts.get(module) or cuts.get(name)
        return value if found is None else found.of(name, value, self._link.rank == 0)

    def _cuts(self, one: DecoderConfig, index: int) -> dict[str, Cut]:
        """How a layer's tensors are cut, by module or name; the others are everywhere."""
        found: dict[str, Cut] = {}
        if one.delta is not None:
            found |= self._delta(one)
        elif one.latent is not None:
            found |= self._latent(one)
        else:
            found |= self._attention(one)
        if one.experts is None or one.experts_beside:
            found |= self._mlp("mlp", one.intermediate_size, index)
        if one.experts is not None:
            place = "beside" if one.experts_beside else "mlp"
            found |= self._mlp(f"{place}.switch_mlp", one.experts.size, index)
            if one.experts.shared:
                found |= self._mlp(f"{place}.shared_experts", one.experts.shared, index)
        return found

    def _attention(self, one: DecoderConfig) -> dict[str, Cut]:
        size, heads, kept = one.head_dim, one.num_heads, one.num_kv_heads
        (qa, qb), (a, b) = self._heads(one)
        query = (size * qa, size * qb)
        keys, values = (
            (size * (before + a), size * (before + b)) for before in (heads, heads + kept)
        )
        own = (size * a, size * b)
        prefix = "self_attn."
        return {
            f"{prefix}q_proj": Cut(ROWS, (query,), size * heads),
            f"{prefix}gate_proj": Cut(ROWS, (query,), size * heads),
            f"{prefix}k_proj": Cut(ROWS, (own,), size * kept),
            f"{prefix}v_proj": Cut(ROWS, (own,), size * kept),
            f"{prefix}qkv_proj": Cut(ROWS, (query, keys, values), size * (heads + 2 * kept)),
            f"{prefix}o_proj": Cut(COLUMNS, (query,), size * heads),
            f"{prefix}sinks": Cut(LAST, ((qa, qb),), heads),
        }

    def _latent(self, one: DecoderConfig) -> dict[str, Cut]:
        latent, heads = one.latent, one.num_heads
        assert latent is not None
        a, b = self._whole(heads, "heads", one)
        query = latent.plain + latent.rope
        rows = Cut(ROWS, ((query * a, query * b),), query * heads)
        by_head = Cut(FIRST, ((a, b),), heads)
        out = Cut(COLUMNS, ((latent.value * a, latent.value * b),), latent.value * heads)
        found = {"q_proj": rows, "q_b_proj": rows, "embed_q": by_head, "unembed_out": by_head,
                 "o_proj": out}  # fmt: skip
        return {f"self_attn.{name}": cut for name, cut in found.items()}

    def _delta(self, one: DecoderConfig) -> dict[str, Cut]:
        delta = one.delta
        assert delta is not None
        a, b = self._whole(delta.key_heads, "heads of keys", one)
        each = delta.value_heads // delta.key_heads
        keys = (a * delta.key_size, b * delta.key_size)
        values = (a * each * delta.value_size, b * each * delta.value_size)
        channels = (
            keys,
            (delta.keys + keys[0], delta.keys + keys[1]),
            (2 * delta.keys + values[0], 2 * delta.keys + values[1]),
        )
        heads = ((a * each, b * each),)
        found = {
            "in_proj_qkv": Cut(ROWS, channels, delta.channels),
            "in_proj_z": Cut(ROWS, (values,), delta.values),
            "in_proj_b": Cut(ROWS, heads, delta.value_heads),
            "in_proj_a": Cut(ROWS, heads, delta.value_heads),
            "taps": Cut(LAST, channels, delta.channels),
            "dt_bias": Cut(LAST, heads, delta.value_heads),
            "A_log": Cut(LAST, heads, delta.value_heads),
            "out_proj": Cut(COLUMNS, (values,), delta.values),
        }
        return {f"linear_attn.{name}": cut for name, cut in found.items()}

    def _mlp(self, place: str, inner: int, index: int) -> dict[str, Cut]:
        a, b = self._columns(inner, index)
        return {
            f"{place}.gate_proj": Cut(ROWS, ((a, b),), inner),
            f"{place}.up_proj": Cut(ROWS, ((a, b),), inner),
            f"{place}.gate_up_proj": Cut(ROWS, ((a, b), (inner + a, inner + b)), 2 * inner),
            f"{place}.down_proj": Cut(COLUMNS, ((a, b),), inner),
        }

    def _heads(self, one: DecoderConfig) -> tuple[Segment, Segment]:
        """Query heads, and key/value heads: fewer than machines are held by several of them."""
        each, count = one.num_heads // one.num_kv_heads, one.num_kv_heads
        if count >= self._link.size:
            a, b = self._whole(count, "key/value heads", one)
            return (a * each, b * each), (a, b)
        per, rest = divmod(self._link.size, count)
        if rest or each % per or len(set(self._shares)) > 1:
            raise ModelError(
                f"model_type '{one.model_type}' has {count} key/value heads of {each} queries, "
                f"which {self._link.size} machines cannot share in these parts: take fewer "
                "machines, or give --split pipeline"
            )
        own, part = each // per, self._link.rank
        return (part * own, (part + 1) * own), (part // per, part // per + 1)

    def _columns(self, inner: int, index: int) -> Segment:
        """Inner columns, in whole groups."""
        unit = self._groups.get(index, 1)
        wide = math.lcm(unit, _WIDE)
        if inner % wide == 0 and inner // wide >= 4 * self._link.size:
            unit = wide
        if inner % unit:
            raise ModelError(
                f"a feed-forward layer of {inner} is quantised in groups of {unit}, which do not "
                "hold it whole: give --split pipeline"
            )
        ends = borders(inner // unit, self._shares)
        return unit * ends[self._link.rank], unit * ends[self._link.rank + 1]

    def _whole(self, count: int, what: str, config: DecoderConfig) -> Segment:
        if count < self._link.size:
            raise ModelError(
                f"model_type '{config.model_type}' has {count} {what}, which {self._link.size} "
                "machines cannot share: take fewer machines, or give --split pipeline"
            )
        ends = borders(count, self._shares)
        return ends[self._link.rank], ends[self._link.rank + 1]


def borders(count: int, shares: Shares) -> list[int]:
    """Where ``count`` things are cut so that everybody has about his share, and one at least."""
    whole, ends = sum(shares), [0]
    for i in range(1, len(shares)):
        wanted = round(count * sum(shares[:i]) / whole)
        ends.append(min(max(wanted, ends[-1] + 1), count - (len(shares) - i)))
    return [*ends, count]
