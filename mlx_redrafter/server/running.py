"""Starting, listening, and ending well."""

from __future__ import annotations

import os
import socket
import sys
import threading
from types import FrameType

import uvicorn

from mlx_redrafter.errors import OptionError
from mlx_redrafter.server.app import make_app
from mlx_redrafter.server.endpoints import Say
from mlx_redrafter.server.security import loopback
from mlx_redrafter.server.settings import Settings
from mlx_redrafter.server.worker import Load, Worker

LAST_STEP = 10.0  # seconds that the engine thread has to end after the server
HEADER = 64 * 2**10  # bytes of all headers
IDLE = 75  # seconds after which a silent connection is closed; clients keep theirs for less


class Server(uvicorn.Server):
    """uvicorn's, which lets running answers end for a while before it ends."""

    def __init__(self, worker: Worker, settings: Settings, say: Say) -> None:
        config = uvicorn.Config(
            make_app(worker, settings, say),
            # What is cut off at the end is no error, and what is one has a line of ours.
            log_level="critical", access_log=False, lifespan="off", http="h11", ws="none",
            loop="asyncio", server_header=False, timeout_keep_alive=IDLE,
            h11_max_incomplete_event_size=HEADER,
            timeout_graceful_shutdown=int(settings.grace) + 5,
        )  # fmt: skip
        super().__init__(config)
        self.worker = worker
        worker.metrics.gauge(
            "http_connections", "Open connections.", lambda: len(self.server_state.connections)
        )
        self.end_of_grace = threading.Timer(settings.grace, worker.stop)
        self.end_of_grace.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends it when the answers have ended, the second one at once."""
        if self.should_exit:
            self.force_exit = True
            self.worker.stop()
            return
        self.end()

    def end(self) -> None:
        """Take no more requests; what runs has the time of grace."""
        self.worker.drain()
        self.should_exit = True
        self.end_of_grace.start()


def listening(settings: Settings) -> socket.socket:
    """A socket at the server's address. Raises OptionError."""
    host, port = settings.host, settings.port
    if not loopback(host) and settings.api_key is None:
        raise OptionError(
            f"--host {host} is open to others: give --api-key or --api-key-file as well, or listen "
            "on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        why = os.strerror(number) if number else str(error)
        raise OptionError(
            f"{host}:{port} cannot be listened on ({why.lower()}): choose another --port or --host"
        ) from None


def address(listener: socket.socket) -> str:
    """Where it listens, as clients have to write it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(load: Load, settings: Settings, say: Say, show: Say | None = None) -> None:
    """Serve until a signal comes. ``show`` is told the address when all is ready. Raises what
    `load` raises, and OptionError."""
    listener = listening(settings)
    where = address(listener)

    def on_ready() -> None:
        if worker.failure is None:
            say(f"listening on {where}")
            if show is not None:  # a browser may take its time, and answers shall not wait for it
                threading.Thread(target=show, args=(where,), daemon=True).start()
        else:
            server.should_exit = True

    worker = Worker(
        load, settings.queue, say, on_ready, settings.parallel, settings.cache_bytes,
        settings.cache_size,
    )  # fmt: skip
    server = Server(worker, settings, say)
    worker.start()
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        server.end_of_grace.cancel()
        worker.stop()
    if worker.failure is not None:
        raise worker.failure
    if not worker.join(LAST_STEP):
        # A thread that computes with MLX while Python ends would abort the process.
        sys.stderr.flush()
        os._exit(1)
