"""What MLX itself writes about connections that are lost, which is left out."""

from __future__ import annotations

import faulthandler
import io
import os
import re
import sys
import threading

# Threads write it in pieces, which meet in one line.
_NOISE = re.compile(
    rb"\[ring\]|\[jaccl\]|[Ss]ocket|closed by the peer|with errno|no progress|pending tasks"
    rb"|^[\s\d]*$"
)


def without_noise() -> None:
    """From now on what MLX itself writes about lost connections is left out: one line of ours says
    it. Our own stderr stays what it was.

    What C++ says before it aborts a process is lost with the thread that copies; Python's stack is
    said there instead.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    faulthandler.enable(kept)
    raw = type(sys.stderr.buffer.raw) if hasattr(sys.stderr.buffer, "raw") else io.FileIO  # type: ignore[attr-defined]
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw(kept, "w", closefd=False)), sys.stderr.encoding, errors="replace",
        line_buffering=True,
    )  # fmt: skip

    def copy() -> None:
        with open(source, "rb") as lines:
            for line in lines:
                if not _NOISE.search(line):
                    os.write(kept, line)

    threading.Thread(target=copy, daemon=True).start()
