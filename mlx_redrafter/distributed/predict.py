"""The time of a step over several machines: a model of it, not a measurement.

    tensor(N)   = (body / size + head) / speed * rise(N)
                  + 2 * layers * (crossing + hops * (latency + N * D * 2 / link))
    pipeline(N) = (body + head) / speed * rise(N)
                  + size * (crossing + hops * (latency + N * D * 2 / link))

A gather has size - 1 hops over TCP, where everybody passes on to the next, and one over RDMA.
``crossing`` is the way from the GPU to the CPU, where collectives run, and back; ``rise`` is what a
pass over N rows costs beside one over one row. Figures and their sources: docs/several_machines.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_redrafter.models.loading import stored_weights

Kind = Literal["alone", "tensor", "pipeline"]
GB = 1e9
USED = 0.8  # share of the memory bandwidth that decoding reaches
BANDWIDTH = {
    "M1 Max": 400 * GB, "M2 Ultra": 800 * GB, "M3 Max": 400 * GB, "M3 Ultra": 819 * GB,
    "M4": 120 * GB, "M4 Pro": 273 * GB, "M4 Max": 546 * GB,
}  # fmt: skip
"""Memory bandwidth in bytes per second, as Apple states it."""

RISES: dict[str, Mapping[int, float]] = {
    "stock 4-bit kernels": {1: 1.0, 4: 1.25, 5: 1.42, 8: 2.2},
    "flat few-row kernels": {1: 1.0, 4: 1.05, 5: 1.07, 8: 1.15},
}
"""What a pass over so many rows costs (mlx PR 3791; 8 bits, 16 bits, or kernels of one's own)."""

DRAFTED = ((4, 2.0), (5, 2.5), (8, 3.0), (8, 4.0))
"""Rows that are checked, and tokens that come of a step."""


@dataclass(frozen=True)
class Connection:
    """crossing, latency: seconds; link: bytes per second; rdma: does a gather take one hop?"""

    name: str
    crossing: float
    latency: float
    link: float
    rdma: bool = False

    def gather(self, size: int, nbytes: float) -> float:
        """Seconds of a gather of so many bytes from each of so many machines."""
        hops = 1 if self.rdma else size - 1
        return self.crossing + hops * (self.latency + nbytes / self.link)


CONNECTIONS = (
    Connection("RDMA, default fences", 180e-6, 10e-6, 6 * GB, True),
    Connection("RDMA, fast synch", 8e-6, 10e-6, 6 * GB, True),
    Connection("Thunderbolt, TCP", 180e-6, 150e-6, 3.5 * GB),
    Connection("10 Gb Ethernet", 180e-6, 250e-6, 1.1 * GB),
)


@dataclass(frozen=True)
class Sizes:
    """Bytes that a step reads of the layers and of the output head, layers, and hidden size."""

    body: float
    head: float
    layers: int
    hidden: int


@dataclass(frozen=True)
class Row:
    """A set-up: tokens per second without drafts, and how many times that with."""

    setup: str
    size: int
    plain: float
    gains: tuple[float, ...]


def sizes_of(folder: Path) -> Sizes:
    """Of a model; nothing but headers is read. Of experts only the chosen ones count.

    Raises ModelError.
    """
    config, weights, _ = stored_weights(folder)
    body = 0.0
    for name, value in weights.items():
        if name.startswith("model.layers."):
            experts = config.layer(int(name.split(".")[2])).experts
            routed = experts is not None and ".switch_mlp." in name
            body += value.nbytes * (experts.chosen / experts.count if routed and experts else 1)
    prefix = "model.embed_tokens." if config.tied else "lm_head."
    head = sum(value.nbytes for name, value in weights.items() if name.startswith(prefix))
    return Sizes(body, float(head), config.num_layers, config.hidden_size)


def step(
    sizes: Sizes,
    speed: float,
    size: int,
    kind: Kind,
    connection: Connection,
    rows: int,
    rise: Mapping[int, float],
) -> float:
    """Seconds of a step over so many rows; speed: bytes per second that decoding reads."""
    nbytes = rows * sizes.hidden * 2
    if kind == "alone":
        return (sizes.body + sizes.head) / speed * rise[rows]
    if kind == "tensor":
        compute = (sizes.body / size + sizes.head) / speed * rise[rows]
        return compute + 2 * sizes.layers * connection.gather(size, nbytes)
    return (sizes.body + sizes.head) / speed * rise[rows] + size * connection.gather(size, nbytes)


def table(
    sizes: Sizes,
    bandwidth: float,
    machines: Sequence[int],
    rise: Mapping[int, float],
    connections: Sequence[Connection] = CONNECTIONS,
) -> list[Row]:
    """All set-ups."""
    speed = USED * bandwidth

    def row(name: str, size: int, kind: Kind, by: Connection) -> Row:
        seconds = {n: step(sizes, speed, size, kind, by, n, rise) for n in rise}
        gains = tuple(tokens * seconds[1] / seconds[n] for n, tokens in DRAFTED)
        return Row(name, size, 1 / seconds[1], gains)

    found = [row("one machine, if it fits", 1, "alone", connections[0])]
    for size in machines:
        for one in connections:
            found.append(row(f"tensor, {one.name}", size, "tensor", one))
            found.append(row(f"pipeline, {one.name}", size, "pipeline", one))
    return found
