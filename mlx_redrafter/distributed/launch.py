"""Starting the other machines: over ssh, or as processes of this one."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_redrafter.distributed.wire import ClusterError
from mlx_redrafter.terminal import console

Backend = Literal["ring", "jaccl"]
LOCAL = ("localhost", "127.0.0.1")
FIRST_PORT = 32323  # of the ring, on other machines; as mlx.launch


@dataclass(frozen=True)
class Host:
    """One machine.

    Args:
        ssh: as ssh knows it; ``localhost``: a process here.
        ips: its addresses for the ring, with a port or without; the first is where others find it.
        rdma: by machine, the device that leads there; None: itself.
    """

    ssh: str
    ips: tuple[str, ...] = ()
    rdma: tuple[str | None, ...] = ()

    @property
    def local(self) -> bool:
        return self.ssh in LOCAL

    @property
    def address(self) -> str:
        """Where others find it; raises ClusterError."""
        if self.ips:
            return self.ips[0].partition(":")[0]
        try:
            return str(socket.getaddrinfo(self.ssh, None, socket.AF_INET)[0][4][0])
        except OSError as error:
            raise ClusterError(
                f"the machine {self.ssh} is not found ({error.strerror}): give its name as ssh "
                "knows it, or its addresses in --hostfile"
            ) from None


@dataclass(frozen=True)
class Hosts:
    """All machines, this one first, and what connects them."""

    hosts: tuple[Host, ...]
    backend: Backend = "ring"

    def __post_init__(self) -> None:
        if len(self.hosts) < 2:
            raise ClusterError(
                f"{len(self.hosts)} machine is given: name this one first and at least one other, "
                "such as --hosts mac-1,mac-2"
            )

    @property
    def names(self) -> list[str]:
        return [host.ssh for host in self.hosts]

    def environment(self) -> dict[str, str]:
        """What `mx.distributed.init` reads, without the rank; files are given as their content."""
        if self.backend == "jaccl":
            devices = [list(host.rdma) for host in self.hosts]
            coordinator = f"{self.hosts[0].address}:{FIRST_PORT}"
            return {"MLX_IBV_DEVICES": json.dumps(devices), "MLX_JACCL_COORDINATOR": coordinator}
        free = iter(free_ports(len(self.hosts)))
        ports = [next(free) if h.local else FIRST_PORT + i for i, h in enumerate(self.hosts)]
        everybody = [
            [ip if ":" in ip else f"{ip}:{port}" for ip in (host.ips or (host.address,))]
            for host, port in zip(self.hosts, ports, strict=True)
        ]
        return {"MLX_HOSTFILE": json.dumps(everybody)}


def named(text: str) -> Hosts:
    """The machines of "mac-1,mac-2"; raises ClusterError."""
    return Hosts(tuple(Host(name.strip()) for name in text.split(",") if name.strip()))


def from_file(file: Path, backend: Backend | None = None) -> Hosts:
    """Those of a host file of mlx.launch; raises ClusterError."""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        listed = given["hosts"] if isinstance(given, dict) else given
        stated = given.get("backend") if isinstance(given, dict) else None
        hosts = tuple(
            Host(str(one["ssh"]), tuple(one.get("ips") or ()), tuple(one.get("rdma") or ()))
            for one in listed
        )
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ClusterError(f"{file} cannot be read ({why})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClusterError(
            f"{file} is no host file ({type(error).__name__}: {error}); needed: "
            '[{"ssh": "mac-1", "ips": ["10.0.0.1"]}, ...], as mlx.distributed_config writes it'
        ) from None
    chosen = backend or stated or "ring"
    if chosen not in ("ring", "jaccl"):
        raise ClusterError(f"{file} names the back end {chosen!r}; needed: ring or jaccl")
    return Hosts(hosts, chosen)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@dataclass
class Process:
    """Another machine's program, as it was started from here. It ends when its input does."""

    name: str
    popen: subprocess.Popen[bytes]
    said: str = ""  # its last error
    _reader: threading.Thread = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._copy, daemon=True)
        self._reader.start()

    def _copy(self) -> None:
        """What it says on stderr goes to ours; its last error is kept, for whoever tells of it."""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            text = line.decode(errors="replace").rstrip()
            if text.startswith("error: "):
                self.said = text.removeprefix("error: ")
            elif text:
                console.note(f"[{self.name}] {text}")

    def last_words(self, seconds: float = 1.0) -> str:
        """Its error, if it ended with one."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
            self._reader.join(seconds)
        return self.said

    def end(self, seconds: float) -> None:
        """Let it go, and see that it does."""
        with contextlib.suppress(OSError):
            assert self.popen.stdin is not None
            self.popen.stdin.close()
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()


def start(host: Host, rank: int, settings: dict[str, Any]) -> Process:
    """Start one of the others; settings go to its input. Raises ClusterError."""
    module = ["-m", "mlx_redrafter.distributed"]
    if host.local:
        command = [sys.executable, *module]
    else:
        program = shlex.join([sys.executable, *module])
        there = f"cd {shlex.quote(os.getcwd())} 2>/dev/null; exec {program}"
        command = ["ssh", "-T", "-o", "BatchMode=yes", host.ssh, there]
    try:
        popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the first machine
        )  # fmt: skip
        assert popen.stdin is not None
        popen.stdin.write(json.dumps({**settings, "rank": rank}).encode() + b"\n")
        popen.stdin.flush()
    except OSError as error:
        raise ClusterError(f"{host.ssh} cannot be started ({error.strerror})") from None
    return Process(f"{host.ssh}, rank {rank}", popen)


def end_all(processes: Sequence[Process], seconds: float) -> None:
    for process in processes:
        with contextlib.suppress(OSError):
            assert process.popen.stdin is not None
            process.popen.stdin.close()
    for process in processes:
        process.end(seconds)
