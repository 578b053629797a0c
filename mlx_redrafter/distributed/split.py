"""How a model is shared among machines: by tensors or by layers, and in which parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import mlx.core as mx

from mlx_redrafter.distributed.link import Link
from mlx_redrafter.distributed.pipeline import Pipeline
from mlx_redrafter.distributed.tensor import Tensor
from mlx_redrafter.errors import ModelError, OptionError
from mlx_redrafter.models.config import DecoderConfig
from mlx_redrafter.models.loading import SHARED
from mlx_redrafter.models.share import Share

Kind = Literal["auto", "tensor", "pipeline"]
Weights = dict[str, mx.array]
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Split:
    """Which kind of split, and everybody's share in any unit (empty: equal ones).

    Raises:
        OptionError: shares that are none.
    """

    kind: Kind = "auto"
    shares: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise OptionError(f"split {self.kind!r} is unknown: use {', '.join(get_args(Kind))}")
        if any(share < 1 for share in self.shares):
            raise OptionError(
                f"shares {','.join(map(str, self.shares))} are not possible: give a whole number "
                "of at least 1 for every machine, such as 2,1"
            )

    def for_size(self, size: int) -> tuple[int, ...]:
        """Everybody's share. Raises OptionError."""
        if self.shares and len(self.shares) != size:
            raise OptionError(
                f"--shares has {len(self.shares)} numbers for {size} machines: give one for each"
            )
        return self.shares or (1,) * size


def shares_of(text: str | None) -> tuple[int, ...]:
    """The shares of "2,1"; raises OptionError."""
    if text is None:
        return ()
    try:
        return Split("auto", tuple(int(part) for part in text.split(","))).shares
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(
            f"--shares {text} are not numbers: give one for every machine, such as 2,1"
        ) from None


class Planned:
    """A `Plan`: how one of several machines cuts what it reads.

    Args:
        link: to the others.
        split: kind and shares.
        quick: is a collective quick enough for two in every layer (RDMA)?

    ``share`` is there after the cut, and ``kind`` says which split it is.
    """

    share: Share | None = None

    def __init__(self, link: Link, split: Split, quick: bool = False) -> None:
        self.link, self.split, self._quick = link, split, quick
        self.shares = split.for_size(link.size)
        self.kind: Kind = split.kind

    def cut(
        self, config: DecoderConfig, weights: Weights, raw: Mapping[str, Any]
    ) -> tuple[Share, Weights]:
        """See `Plan.cut`. A folder that holds one share already says how it was cut."""
        stored = raw.get(SHARED)
        if stored is not None:
            self._check_stored(stored)
            groups = {int(i): int(size) for i, size in stored["groups"].items()}
        else:
            groups = quantised_groups(config, weights)
        self.share = share = self.shared(config, groups)
        if stored is None:
            weights = self.part(config, share, weights)
        return share, {_local(name, share): value for name, value in weights.items()}

    def part(self, config: DecoderConfig, share: Share, weights: Weights) -> Weights:
        """This machine's part, by the names of the whole model."""
        result = {}
        for name, value in weights.items():
            layer = _LAYER.fullmatch(name)
            if layer is not None and int(layer[1]) not in share.held:
                continue
            if layer is not None and isinstance(share, Tensor):
                value = share.cut(config, int(layer[1]), layer[2], value)
            result[name] = value
        return result

    def described(self, groups: Mapping[int, int]) -> dict[str, Any]:
        """What config.json says of a folder that holds one share."""
        return {
            **asdict(Split(self.kind, self.shares)),
            "rank": self.link.rank,
            "groups": {str(i): size for i, size in groups.items()},
        }

    def shared(self, config: DecoderConfig, groups: Mapping[int, int]) -> Share:
        """This machine's share; raises ModelError."""
        if self.kind == "auto":
            self.kind = self._chosen(config, groups)
        if self.kind == "pipeline":
            return Pipeline(config, self.link, self.shares)
        if not self.link.alike and any(
            config.layer(i).experts is not None for i in range(config.num_layers)
        ):
            raise ModelError(
                "machines of different kinds may choose different experts in a layer that they "
                "share: give --split pipeline"
            )
        return Tensor(config, self.link, self.shares, groups)

    def _chosen(self, config: DecoderConfig, groups: Mapping[int, int]) -> Kind:
        """Tensors where links are quick, or layers cannot be parted; else layers."""
        able: dict[Kind, bool] = {}
        trials: dict[Kind, Any] = {
            "tensor": lambda: Tensor(config, self.link, self.shares, groups),
            "pipeline": lambda: Pipeline(config, self.link, self.shares),
        }
        for kind, trial in trials.items():
            try:
                able[kind] = bool(trial())
            except ModelError:
                able[kind] = False
        if able["tensor"] and (self._quick or not able["pipeline"]):
            return "tensor"
        return "pipeline"

    def _check_stored(self, stored: Mapping[str, Any]) -> None:
        rank, size = int(stored["rank"]), len(stored["shares"])
        if (rank, size) != (self.link.rank, self.link.size):
            raise ModelError(
                f"the folder holds the share of machine {rank} of {size}, and this is machine "
                f"{self.link.rank} of {self.link.size}: give every machine the folder that "
                "`mlx-redrafter shard` made for it"
            )
        if self.split.kind not in ("auto", stored["kind"]):
            raise ModelError(
                f"the folder was cut for --split {stored['kind']}: leave out --split "
                f"{self.split.kind}, or cut the model again"
            )
        self.kind, self.shares = stored["kind"], tuple(stored["shares"])


def quantised_groups(config: DecoderConfig, weights: Weights) -> dict[int, int]:
    """By layer, how many inner numbers of a quantised feed-forward layer share a scale."""
    found: dict[int, int] = {}
    for name, scales in weights.items():
        layer = _LAYER.fullmatch(name)
        if layer is None or not layer[2].endswith("down_proj.scales"):
            continue
        one = config.layer(int(layer[1]))
        inner = one.intermediate_size
        if one.experts is not None and "switch_mlp" in layer[2]:
            inner = one.experts.size
        elif one.experts is not None and "shared_experts" in layer[2]:
            inner = one.experts.shared
        found[int(layer[1])] = max(found.get(int(layer[1]), 1), inner // scales.shape[-1])
    return found


def _local(name: str, share: Share) -> str:
    """A tensor's name in a decoder that holds these layers only."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    return f"model.layers.{int(layer[1]) - share.held.start}.{layer[2]}"
