"""`mlx-redrafter doctor --hosts`: do several machines start, agree and answer quickly?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx_redrafter.errors import RedrafterError
from mlx_redrafter.evaluation.model_checks import Check

if TYPE_CHECKING:
    from mlx_redrafter.distributed.cluster import Cluster
    from mlx_redrafter.distributed.launch import Hosts
    from mlx_redrafter.distributed.probing import Probe

SLOW = 2e-3  # seconds of a small exchange that leave little of any speed


def machines(hosts: Hosts, model: str | None) -> Iterator[Check]:
    """Checks of the machines, one after the other; what cannot be started fails."""
    from mlx_redrafter.distributed import cluster
    from mlx_redrafter.distributed.probing import probe

    try:
        there = cluster.start(hosts)
    except RedrafterError as error:
        yield Check("machines", "fail", str(error))
        return
    with there:
        yield _who(hosts, there)
        there.tell("probe")
        with there.whole():
            found = probe(there.link)
        yield _links(found)
        yield _alike(found, there)
        yield _rows(found)
    yield _prediction(found, len(hosts.hosts), hosts.backend == "jaccl", model)


def _who(hosts: Hosts, there: Cluster) -> Check:
    from mlx_redrafter.distributed.cluster import facts

    every = [facts(), *(peer.facts for peer in there.peers)]
    chips = [f"{host.ssh}: {one['chip']}" for host, one in zip(hosts.hosts, every, strict=True)]
    versions = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in every[0]["versions"].items())
    text = f"{len(every)} over {hosts.backend}, all with {versions}; {'; '.join(chips)}"
    return Check("machines", "ok", text, {"chips": chips, "versions": every[0]["versions"]})


def _links(found: Probe) -> Check:
    shown = ", ".join(f"{_size(n)} {t * 1e6:.0f} us" for n, t in found.seconds.items())
    least = min(found.seconds.values())
    known = {"seconds": {str(size): seconds for size, seconds in found.seconds.items()}}
    return Check("exchanges", "ok" if least < SLOW else "warn", f"a gather of {shown}", known)


def _alike(found: Probe, there: Cluster) -> Check:
    if not there.link.alike:
        text = "of different kinds: all follow the first one's trees and choices"
        return Check("bits", "ok", text, {"alike": False})
    text = "all compute the same numbers to the last bit"
    if found.alike:
        return Check("bits", "ok", text, {"alike": True})
    return Check("bits", "fail", f"not {text}, though they are of one kind", {"alike": False})


def _rows(found: Probe) -> Check:
    text = "every row of a sum over machines has the bits that it has alone"
    if found.rows_alone:
        return Check("rows", "ok", text)
    return Check("rows", "fail", f"not {text}: drafted text may differ from plain text")


def _prediction(found: Probe, size: int, rdma: bool, model: str | None) -> Check:
    from mlx_redrafter.distributed import predict
    from mlx_redrafter.hub import resolve
    from mlx_redrafter.runtime.paths import BUILTIN

    name = model or BUILTIN
    try:
        sizes = predict.sizes_of(resolve(name))
    except RedrafterError as error:
        return Check("prediction", "warn", str(error))
    small, large = min(found.seconds), max(found.seconds)
    hops = 1 if rdma else size - 1
    rate = hops * (large - small) / max(found.seconds[large] - found.seconds[small], 1e-9)
    link = predict.Connection("measured", 0.0, found.seconds[small] / hops, rate, rdma)
    rise = predict.RISES["flat few-row kernels"]
    rows = predict.table(sizes, found.bandwidth / predict.USED, [size], rise, [link])
    text = ", ".join(f"{row.setup.partition(',')[0]} {row.plain:.1f}" for row in rows)
    facts = {row.setup: row.plain for row in rows}
    return Check("prediction", "ok", f"{name}, plain tokens/s, not measured: {text}", facts)


def _size(nbytes: int) -> str:
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"
