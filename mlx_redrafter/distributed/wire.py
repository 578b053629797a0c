"""The connection between the first machine and each of the others: what is decided, and who lives.

Decisions go beside the tensors, over TCP: to wait for one costs nothing, and whoever is lost is
noticed by a thread, even where the main one waits inside a collective for ever.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from mlx_redrafter.distributed.ending import SILENCE, End
from mlx_redrafter.errors import RedrafterError

Message = dict[str, Any]
BEAT = 1.0  # seconds between signs of life
PARTING = 5.0  # seconds between the end and being told so
_CLOSED = "it closed the connection"


class ClusterError(RedrafterError):
    """Machines that cannot be started, do not fit together, or are lost."""


class Wire:
    """Messages to and from one other process, in order; each is a line of JSON.

    Args:
        lost: called in a thread, once, with what happened: it closed, or it is silent. Not after
            `close`.
        heard: called in a thread at every sign of life.
    """

    def __init__(
        self,
        connection: socket.socket,
        lost: Callable[[str], None],
        heard: Callable[[], None] = lambda: None,
    ) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SILENCE)
        self._socket, self._lost, self._heard = connection, lost, heard
        self._closed = False
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._lock = threading.Lock()
        for work in (self._read, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def send(self, message: Message) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                self._socket.sendall(data)
            except OSError as error:
                self._gone(_why(error))

    def receive(self, seconds: float | None = None) -> Message:
        """The next message; ClusterError if none comes within so many seconds."""
        try:
            return self._inbox.get(timeout=seconds)
        except queue.Empty:
            raise ClusterError(f"nothing was said for {seconds:g} s") from None

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        rest = b""
        try:
            while data := self._socket.recv(1 << 16):
                self._heard()
                *lines, rest = (rest + data).split(b"\n")
                for line in filter(None, lines):
                    message = json.loads(line)
                    if message.get("op") == "end":
                        self._closed = True
                        self._end_soon()
                    if message.get("op") != "beat":
                        self._inbox.put(message)
        except TimeoutError:
            return self._gone(f"it has not been heard of for {SILENCE:g} s")
        except (OSError, ValueError) as error:
            return self._gone(_why(error))
        self._gone(_CLOSED)

    def _end_soon(self) -> None:
        """Whoever waits inside a collective does not hear of the end."""
        timer = threading.Timer(PARTING, self._lost, ["it has ended"])
        timer.daemon = True
        timer.start()

    def _beat(self) -> None:
        while not self._closed:
            self.send({"op": "beat"})
            time.sleep(BEAT)

    def leave(self) -> None:
        """What follows is no loss."""
        self._closed = True

    def _gone(self, why: str) -> None:
        if not self._closed:
            self._closed = True
            self._lost(why)


def _why(error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return _CLOSED
    return getattr(error, "strerror", None) or str(error)


def to_first(settings: dict[str, Any], end: End) -> Wire:
    """From another machine to the first; settings: where it is, a token, and this one's rank.

    Raises ClusterError.
    """
    host, port = settings["at"]
    try:
        connection = socket.create_connection((host, port), SILENCE)
    except OSError as error:
        raise ClusterError(
            f"the first machine is not reached at {host}:{port} ({error.strerror or error})"
        ) from None
    wire = Wire(
        connection,
        lambda why: end.now(f"the connection to the first machine is lost: {why}"),
        end.heard,
    )
    wire.send({"op": "hello", "rank": settings["rank"], "token": settings["token"]})
    return wire
