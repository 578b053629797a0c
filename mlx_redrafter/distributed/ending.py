"""How the process of a machine ends: from any thread, and where no thread of it can run.

Threads notice who is lost. None of them runs while MLX waits with Python's lock held
(`mx.distributed.init`, until all others have come; `mx.synchronize`), and one that ends the process
may be held up itself. So the end of every process is set already, a few seconds from now, and signs
of life from the others put it off: what hears nothing any more, or cannot run, ends. That takes no
lock: a timer of faulthandler's leaves with exit code 1, and a process beside this one says why, and
kills what is left (watcher.py).
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from mlx_redrafter.distributed import watcher
from mlx_redrafter.distributed.watcher import GRACE
from mlx_redrafter.terminal import console, modes

SILENCE = 12.0  # seconds without a sign of life
_OFTEN = 0.5  # seconds within which the end is not put off again
_STUCK = 6.0  # seconds that what ends a process may take
_HELD = f"held up for {SILENCE:g} s, or cut off from the other machines"


class End:
    """The end of this process, with one line and exit code 1.

    ``before`` is called first: it ends processes that were started here.
    """

    def __init__(self) -> None:
        self.before: Callable[[], None] = lambda: None
        self._lock, self._modes = threading.Lock(), modes.modes()
        self._gate, self._fixed, self._over, self._set = threading.Lock(), False, False, 0.0
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115  (for as long as the process runs)
        source, self._watcher = os.pipe()
        os.set_blocking(self._watcher, False)
        self._beside = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(watcher.__file__)), str(os.getpid())],
            stdin=source, stdout=subprocess.DEVNULL, stderr=_own_stderr(),
            start_new_session=True,  # Ctrl-C is not for it
        )  # fmt: skip
        os.close(source)
        self._put_off(SILENCE, _HELD)

    def heard(self) -> None:
        """Of another machine: the end is put off."""
        if not self._fixed and time.monotonic() - self._set > _OFTEN:
            self._put_off(SILENCE, _HELD)

    @contextlib.contextmanager
    def within(self, seconds: float, why: str) -> Iterator[None]:
        """Inside, nothing puts the end off: what is done there takes so long at most."""
        self._fixed = True
        self._put_off(seconds, why)
        try:
            yield
        finally:
            self._fixed = False
            self._put_off(SILENCE, _HELD)

    def now(self, text: str) -> NoReturn:
        """Nothing can interrupt a collective that waits: the process goes as it is."""
        self._over = True
        self._put_off(_STUCK, text, last=True)
        gc.disable()  # what it finds may have to wait for others before it goes
        self._lock.acquire()  # whoever comes second has nothing to add
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            modes.set_modes(self._modes)
            console.error(text)
            sys.stderr.flush()
        sys.stdout = sys.stderr = self._nowhere  # other threads have nothing to add either
        self._put_off(_STUCK, "", last=True)
        with contextlib.suppress(Exception):
            helper = threading.Thread(target=self.before, daemon=True)
            helper.start()
            helper.join(_STUCK)
        os._exit(1)

    def never(self) -> None:
        """This process has nothing to do with others any more."""
        self._over = True
        with self._gate:
            faulthandler.cancel_dump_traceback_later()
            pipe, self._watcher = self._watcher, -1
        with contextlib.suppress(OSError):
            os.close(pipe)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._beside.wait(1)

    def _put_off(self, seconds: float, why: str, last: bool = False) -> None:
        with self._gate, contextlib.suppress(OSError):
            if self._over and not last:
                return
            self._set = time.monotonic()
            late = seconds + GRACE / 2
            faulthandler.dump_traceback_later(late, exit=True, file=self._nowhere)
            told = f"{self._set + seconds} {' '.join(why.split())}\n"
            os.write(self._watcher, told.encode())


def _own_stderr() -> int | None:
    """Where this process's own words go; None: as usual."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None
