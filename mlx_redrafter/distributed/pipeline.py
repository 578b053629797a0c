"""Layers one behind the other on several machines: every one runs its own and hands on the rest.

What a stage makes of the stream is gathered and not sent: then every exchange depends on the one
before it, on every machine, and none can be met in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_redrafter.distributed.link import Link
from mlx_redrafter.distributed.tensor import Shares, borders
from mlx_redrafter.errors import ModelError
from mlx_redrafter.models.config import DecoderConfig
from mlx_redrafter.models.share import Layers, Whole


class Pipeline(Whole):
    """One machine's layers.

    Args:
        link: to the others.
        shares: of all machines, in any unit.

    Raises:
        ModelError: fewer layers than machines, or layers that read keys of another machine's.
    """

    routes = False  # a pass sees the experts of its own layers only

    def __init__(self, config: DecoderConfig, link: Link, shares: Shares) -> None:
        if config.num_layers < link.size:
            raise ModelError(
                f"the model has {config.num_layers} layers, which {link.size} machines cannot "
                "share: take fewer machines"
            )
        self._link = link
        self._ends = borders(config.num_layers, shares)
        self.held = range(self._ends[link.rank], self._ends[link.rank + 1])
        for i in range(config.num_layers):
            source = config.layer(i).kv_source
            if source is not None and self._owner(source) != self._owner(i):
                raise ModelError(
                    f"model_type '{config.model_type}' has layers that read the keys of others, "
                    f"as {i} of {source}, which one machine must hold: give --split tensor, or "
                    "other --shares"
                )

    def common(self, *arrays: mx.array) -> Sequence[mx.array]:
        return self._link.common(*arrays)

    def passed(
        self, x: mx.array, run: Layers, layers: Sequence[int]
    ) -> tuple[mx.array, list[mx.array]]:
        """Every stage in its turn; the last exchange gives all of them the end, and the outputs
        that are wanted."""
        outputs: Mapping[int, mx.array] = {}
        for stage in range(self._link.size):
            if stage == self._link.rank:
                x, outputs = run(x)
            if stage < self._link.size - 1:
                x = self._link.gather(x)[stage]
        last = self._link.size - 1
        if not layers:
            return self._link.gather(x)[last], []
        rows = mx.stack([x, *(outputs.get(i, x) for i in layers)])  # (1 + K, N, D)
        every = self._link.gather(rows)
        return every[last][0], [every[self._owner(i)][1 + k] for k, i in enumerate(layers)]

    def _owner(self, layer: int) -> int:
        return next(rank for rank, end in enumerate(self._ends[1:]) if layer < end)
