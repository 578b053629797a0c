"""Machines that were found, checked and joined: the first one's view, and everybody's beginning."""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_redrafter.distributed import launch
from mlx_redrafter.distributed.ending import End
from mlx_redrafter.distributed.link import Link
from mlx_redrafter.distributed.wire import ClusterError, Message, Wire
from mlx_redrafter.runtime.device import machine
from mlx_redrafter.runtime.paths import cache_dir

STARTED, READY = 11.0, 60.0  # seconds until a machine has answered, and until it has MLX ready
JOINED, LAUNCHED = 10.0, 30.0  # seconds that joining the ring may take: started here, by mlx.launch
LOST = 3.0  # seconds until the wire has said who is gone
LET_GO = 3.0  # seconds that others have to end, before the ssh to them, or they, are killed
PATIENCE = 120.0  # seconds that a step, or a part of a prompt, may take
SIZES = (1, 3, 64, 4096, 65536)  # of the exchanges that are tested


def facts() -> dict[str, Any]:
    """What has to be equal on all machines (``versions``), and what makes them round alike."""
    info = mx.device_info()
    alike = [str(info.get("architecture") or platform.machine()), str(mx.default_device()),
             platform.mac_ver()[0]]  # fmt: skip
    return {
        "versions": machine("mlx_redrafter", "mlx"),
        "alike": alike,
        "chip": machine("chip")["chip"],
    }


class Peer(NamedTuple):
    """Another machine, as the first one knows it."""

    name: str
    wire: Wire
    facts: dict[str, Any]


@dataclass
class Cluster:
    """All machines, on the first of them. One process has one, and it lasts until the end.

    Args:
        link: what passes exchange.
        peers: the others, by rank.
        end: of this process.
        quick: is the back end one for which tensors pay (RDMA)?
    """

    link: Link
    peers: list[Peer]
    end: End
    quick: bool = False
    processes: list[launch.Process] = field(default_factory=list)
    patience: float = PATIENCE
    _since: float | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close("" if error is None or isinstance(error, SystemExit) else str(error))

    def tell(self, op: str, **more: Any) -> None:
        """Tell all others what is done next. Raises ClusterError after the end."""
        if self.closed:
            raise ClusterError(
                "the other machines were let go, in the middle of a step: start again"
            )
        if self._since is not None:  # what is told within a step shows that it goes on
            self._since = time.monotonic()
        for peer in self.peers:
            peer.wire.send({"op": op, **more})

    def answers(self) -> list[Message]:
        """What the others say to what they were told. Raises ClusterError: something went wrong
        there."""
        found = [peer.wire.receive() for peer in self.peers]
        for peer, answer in zip(self.peers, found, strict=True):
            if "error" in answer:
                raise ClusterError(f"{peer.name}: {answer['error']}")
        return found

    @contextlib.contextmanager
    def whole(self, orderly: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Within, all machines do the same. What is raised there without being ``orderly`` may have
        left them apart: they are let go."""
        self._since = time.monotonic()
        try:
            yield
        except (StopIteration, GeneratorExit):
            raise
        except BaseException as error:
            if is_lost(error):
                time.sleep(LOST)
                self.end.now("the connection to another machine was lost")
            if not orderly():
                self.close("the first machine was interrupted")
            raise
        finally:
            self._since = None

    def close(self, error: str = "") -> None:
        """Let the others go."""
        if self.closed:
            return
        self.closed = True
        for peer in self.peers:
            peer.wire.leave()
            peer.wire.send({"op": "end", "error": error})
        self.end.never()
        launch.end_all(self.processes, LET_GO)
        for peer in self.peers:
            peer.wire.close()

    def _watch(self) -> None:
        while not self.closed:
            time.sleep(0.5)
            since = self._since
            if since is not None and time.monotonic() - since > self.patience:
                self.end.now(
                    f"a step has taken more than {self.patience:g} s: a machine or a connection "
                    "hangs (mlx-redrafter doctor --hosts tests them)"
                )


def is_lost(error: BaseException) -> bool:
    """Did a collective fail because somebody is gone?"""
    return isinstance(error, RuntimeError) and any(
        name in str(error) for name in ("[ring]", "[jaccl]", "[mpi]")
    )


def start(hosts: launch.Hosts, patience: float = PATIENCE) -> Cluster:
    """Start the others and join them. This is the first machine. Raises ClusterError."""
    if hosts.hosts[0].local and not all(host.local for host in hosts.hosts):
        raise ClusterError(
            "this machine is called localhost, where others cannot reach it: give its name first"
        )
    here = "127.0.0.1" if all(host.local for host in hosts.hosts) else hosts.hosts[0].address
    processes: list[launch.Process] = []
    try:
        listener = socket.create_server((here, 0))
    except OSError as error:
        raise ClusterError(
            f"{here} is not an address of this machine ({error.strerror}): name this machine first"
        ) from None
    environment, token = hosts.environment(), secrets.token_hex(16)
    settings = {"token": token, "at": listener.getsockname()[:2], "environment": environment,
                "backend": hosts.backend, "size": len(hosts.hosts)}  # fmt: skip
    end, peers = End(), list[Peer]()
    try:
        for rank, host in enumerate(hosts.hosts[1:], 1):
            processes.append(launch.start(host, rank, settings))
        names = [f"{host.ssh}, rank {rank}" for rank, host in enumerate(hosts.hosts)]
        peers = accepted(listener, token, names[1:], processes, end)
        alike = checked(facts(), peers)
        for peer in peers:
            peer.wire.send({"op": "go", "alike": alike})
        end.before = partial(_left, peers, processes)
        link = join_ring(environment, hosts.backend, 0, end)
        link.alike = alike
        test(link)
    except BaseException as error:
        _let_go(peers, str(error))
        end.never()
        launch.end_all(processes, LET_GO)
        raise
    finally:
        listener.close()
    return Cluster(link, peers, end, hosts.backend == "jaccl", processes, patience)


def _left(peers: list[Peer], processes: list[launch.Process]) -> None:
    """The first machine ends: the others see it at once."""
    for peer in peers:
        peer.wire.close()
    launch.end_all(processes, LET_GO)


def greeted(wire: Wire) -> bool:
    """Say what is here, and hear what the first machine makes of it: do all round alike?"""
    wire.send({"op": "facts", **facts()})
    answer = wire.receive(READY)
    if answer["op"] != "go":
        raise ClusterError(str(answer.get("error") or "the first machine has ended"))
    return bool(answer["alike"])


def join_ring(environment: dict[str, str], backend: str | None, rank: int | None, end: End) -> Link:
    """Join the others for collectives; whoever waits too long for them ends. rank: None: all is in
    this process's own environment. Raises ClusterError."""
    given = environment if rank is None else {"MLX_RANK": str(rank), **environment}
    _own_kernels(int(os.environ.get("MLX_RANK", "0")) if rank is None else rank)
    seconds = LAUNCHED if rank is None else JOINED
    why = f"the other machines did not join within {seconds:g} s: can they reach each other?"
    with contextlib.ExitStack() as stack:
        for name, value in given.items():
            if value.startswith("["):
                file = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json"))
                file.write(value)
                file.flush()
                value = file.name
            os.environ[name] = value
        try:
            with end.within(seconds, why):
                return Link(mx.distributed.init(strict=True, backend=backend or "any"))
        except RuntimeError as error:
            raise ClusterError(
                f"the machines cannot be joined ({' '.join(str(error).split())})"
            ) from None
        finally:
            for name in given:
                os.environ.pop(name, None)


def _own_kernels(rank: int) -> None:
    """On Linux MLX compiles kernels into one folder, and loads what another process has written
    half of: processes here that do the same at the same time have folders of their own."""
    if sys.platform != "linux" or not rank:
        return
    folder = cache_dir() / "kernels" / f"rank-{rank}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)


def test(link: Link) -> None:
    """Exchange known values in the sizes in use; raises ClusterError. Some releases of MLX had
    collectives that gave others (docs/several_machines.md)."""
    for size in SIZES:
        mine = mx.arange(size, dtype=mx.float32) + 7 * link.rank
        for rank, part in enumerate(link.gather(mine)):
            if not mx.array_equal(part, mx.arange(size, dtype=mx.float32) + 7 * rank).item():
                raise ClusterError(
                    f"an exchange of {size} numbers arrived as others: update MLX on all machines"
                )
    link.collectives = 0


def accepted(
    listener: socket.socket,
    token: str,
    names: list[str],
    processes: list[launch.Process],
    end: End,
) -> list[Peer]:
    """The others, when all are there. Raises ClusterError: one is not started in time, or ends."""
    found: dict[int, Peer] = {}
    try:
        _gather(listener, token, names, processes, end, found)
        peers = [found[i] for i in range(len(names))]
        return [peer._replace(facts=peer.wire.receive(READY)) for peer in peers]
    except BaseException as error:
        _let_go(list(found.values()), str(error))
        raise


def _let_go(peers: list[Peer], error: str) -> None:
    """What the others do from now on is no loss."""
    for peer in peers:
        peer.wire.leave()
        peer.wire.send({"op": "end", "error": error})


def _gather(
    listener: socket.socket,
    token: str,
    names: list[str],
    processes: list[launch.Process],
    end: End,
    found: dict[int, Peer],
) -> None:
    listener.settimeout(0.2)
    begin = time.monotonic()
    while len(found) < len(names):
        end.heard()
        missing = [i for i in range(len(names)) if i not in found]
        for i in missing:
            if processes and processes[i].popen.poll() is not None:
                said = processes[i].last_words()
                why = said or f"exit code {processes[i].popen.returncode}"
                raise ClusterError(f"{names[i]} ended before it was connected ({why})")
        if time.monotonic() - begin > STARTED:
            raise ClusterError(
                f"{names[missing[0]]} was not there after {STARTED:g} s: is the same version of "
                "this program installed there, at the same place?"
            )
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        lost = _Lost(end)
        wire = Wire(connection, lost, end.heard)
        hello = wire.receive(READY)
        if not secrets.compare_digest(str(hello.get("token")), token):
            wire.close()
            continue
        i = int(hello["rank"]) - 1
        lost.name, lost.process = names[i], processes[i] if processes else None
        found[i] = Peer(names[i], wire, {})


class _Lost:
    """What is done when a machine is lost."""

    def __init__(self, end: End) -> None:
        self.end, self.name = end, "another machine"
        self.process: launch.Process | None = None

    def __call__(self, why: str) -> None:
        said = self.process.last_words() if self.process is not None else ""
        self.end.now(f"{self.name} is lost: {said or why}")


def checked(own: dict[str, Any], peers: list[Peer]) -> bool:
    """Do all round alike? Raises ClusterError where versions differ, everywhere."""
    for peer in peers:
        theirs = peer.facts["versions"]
        for name, version in own["versions"].items():
            if theirs.get(name) != version:
                program = name.replace("_", "-")
                text = (
                    f"{peer.name} has {program} {theirs.get(name)} and this machine {version}: "
                    "install the same version on all"
                )
                _let_go(peers, text)
                raise ClusterError(text)
    return all(peer.facts["alike"] == own["alike"] for peer in peers)
