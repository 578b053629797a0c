"""Machines that mlx.launch has started, each with the same command."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket

from mlx_redrafter.distributed.cluster import (
    PATIENCE,
    Cluster,
    accepted,
    checked,
    facts,
    greeted,
    join_ring,
    test,
)
from mlx_redrafter.distributed.ending import End
from mlx_redrafter.distributed.follow import follow
from mlx_redrafter.distributed.link import Link
from mlx_redrafter.distributed.wire import Wire, to_first


def first_of_launched(link: Link, end: End, patience: float = PATIENCE) -> Cluster:
    """The same on the first machine, where mlx.launch has started all; see `second_of_launched`."""
    token = secrets.token_hex(16)
    everybody = json.loads(_content(os.environ.get("MLX_HOSTFILE", "")) or "[]")
    address = everybody[0][0].rpartition(":")[0] if everybody else _own_address()
    listener = socket.create_server((address, 0))
    link.texts(json.dumps({"at": listener.getsockname()[:2], "token": token}))
    names = [f"rank {rank}" for rank in range(1, link.size)]
    peers = accepted(listener, token, names, [], end)
    listener.close()
    link.alike = checked(facts(), peers)
    for peer in peers:
        peer.wire.send({"op": "go", "alike": link.alike})
    test(link)
    return Cluster(link, peers, end, "MLX_JACCL_COORDINATOR" in os.environ, [], patience)


def second_of_launched(link: Link, end: End) -> Wire:
    """The same on the others: the connection to the first."""
    settings = json.loads(link.texts("")[0])
    wire = to_first({**settings, "rank": link.rank}, end)
    link.alike = greeted(wire)
    test(link)
    return wire


def of_launched(patience: float = PATIENCE) -> Cluster:
    """The first machine of those that mlx.launch has started. On the others this is where they do
    their part, and leave. Raises ClusterError."""
    end = End()
    link = join_ring({}, None, None, end)
    if link.rank == 0:
        return first_of_launched(link, end, patience)
    follow(link, second_of_launched(link, end), end)
    raise SystemExit(0)


def _content(file: str) -> str:
    with contextlib.suppress(OSError), open(file, encoding="utf-8") as stream:
        return stream.read()
    return ""


def _own_address() -> str:
    return str(os.environ.get("MLX_JACCL_COORDINATOR", "127.0.0.1:0").rpartition(":")[0])
