"""Threads that compute with MLX end cleanly.

MLX keeps a stream for every thread that computes. One that is left behind by a thread that has
ended aborts the process when it exits ("terminate called without an active exception"), unless
`mx.clear_streams()` was called in that thread as the last thing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import mlx.core as mx

_here = threading.local()


class _Streams:
    """Lives as long as its thread: Python destroys what is local to a thread in that thread."""

    def __init__(self) -> None:
        self._clear: Callable[[], None] = mx.clear_streams

    def __del__(self) -> None:
        self._clear()


def clear_at_end() -> None:
    """Have the streams of the calling thread cleared when it ends; the main thread needs nothing.

    A thread that clears them itself, as its last act, does no harm.
    """
    if threading.current_thread() is not threading.main_thread() and not hasattr(_here, "streams"):
        _here.streams = _Streams()
