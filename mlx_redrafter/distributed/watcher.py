"""A process beside a machine's own, which ends that one where it cannot end itself.

    python watcher.py PID

Lines of "TIME WHY" on its input put the end off until then, by the machine's monotonic clock; once
the input is closed there is nobody left to end. It imports nothing of this package: what it was
told last is all it knows.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time

GRACE = 2.0  # seconds between the line that says why, and the end


def main(pid: int) -> None:
    end, why, rest, ended = time.monotonic() + 60.0, b"", b"", False
    while not ended and select.select([0], [], [], max(0.0, end - time.monotonic()))[0]:
        data = os.read(0, 1 << 16)
        *lines, rest = (rest + data).split(b"\n")
        if lines:
            at, _, why = lines[-1].partition(b" ")
            end = float(at)
        ended = not data
    if ended and time.monotonic() < end:
        return
    words = threading.Thread(target=say, args=(why,), daemon=True)  # nobody may be reading them
    words.start()
    while not ended and select.select([0], [], [], GRACE)[0]:
        ended = not os.read(0, 1 << 16)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    words.join(GRACE)


def say(why: bytes) -> None:
    with contextlib.suppress(OSError):
        if why:
            os.write(2, b"error: " + why + b"\n")


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        main(int(sys.argv[1]))
