"""A process beside a machine's own, which ends that one where it cannot end itself.

    python watcher.py PID

Lines of "SECONDS WHY" on its input put the end off by so many seconds; once the input is closed
there is nobody left to end. It imports nothing of this package: what it was told last is all it
knows.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading

GRACE = 2.0  # seconds between the line that says why, and the end


def main(pid: int) -> None:
    limit, why, rest = 60.0, b"", b""
    while select.select([0], [], [], limit)[0]:
        data = os.read(0, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        if lines:
            seconds, _, why = lines[-1].partition(b" ")
            limit = float(seconds)
    if why:  # in a thread: whoever should read it may have stopped reading
        line = b"error: " + why + b"\n"
        threading.Thread(target=os.write, args=(2, line), daemon=True).start()
    while select.select([0], [], [], GRACE)[0]:
        if not os.read(0, 1 << 16):
            return
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        main(int(sys.argv[1]))
