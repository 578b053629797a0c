"""Let MLX compile its CPU kernels on Linux for this machine's vector units.

MLX runs `g++ -O3` without naming a CPU, and a fused kernel with an exponential then calls a library
function for every multiply-add: 10 ns per element, 1-2 ns with vector units. A folder in front of
the compiler's include path holds a <cmath> that names the CPU level and includes the real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

_NATIVE = Path(__file__).parent / "native"
_PATH = "CPLUS_INCLUDE_PATH"
# What a level needs beyond the one before (x86-64 psABI), as /proc/cpuinfo names it.
_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
}


def prepare(cache: Path) -> None:
    """Set the include path, if the CPU and the compiler are such that it helps and works.

    Args:
        cache: folder that remembers what the compiler could do.
    """
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return
    compiler = shutil.which("g++")
    level = _level()
    if compiler is None or level is None:
        return
    folder = _NATIVE / level
    if str(folder) in os.environ.get(_PATH, "").split(os.pathsep) or not _works(
        compiler, folder, cache
    ):
        return
    rest = os.environ.get(_PATH)
    os.environ[_PATH] = str(folder) + (os.pathsep + rest if rest else "")


@functools.cache
def cpuinfo() -> tuple[str, ...]:
    """The lines of /proc/cpuinfo for the first processor. Raises OSError."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return tuple(file.read(16384).split("\n\n", 1)[0].splitlines())


def _level() -> str | None:
    try:
        lines = cpuinfo()
    except OSError:
        return None
    flags = {f for line in lines if line.startswith("flags") for f in line.split()}
    v3 = _LEVELS["x86-64-v3"] <= flags
    return next((name for name, needs in _LEVELS.items() if v3 and needs <= flags), None)


def _works(compiler: str, folder: Path, cache: Path) -> bool:
    """Does this compiler know the level? Asked once per compiler."""
    import subprocess

    stat = os.stat(os.path.realpath(compiler))
    mark = cache / f"{folder.name}-{stat.st_size}-{stat.st_mtime_ns}"
    try:
        if mark.is_file():
            return mark.read_text() == "yes"
        command = [compiler, "-std=c++17", "-O3", "-fsyntax-only", "-isystem", str(folder)]
        run = subprocess.run(
            [*command, "-x", "c++", "-"], input="#include <cmath>\nint main() { return 0; }\n",
            text=True, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    with contextlib.suppress(OSError):  # without a place to keep it, it is asked every time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("yes" if run.returncode == 0 else "no")
    return run.returncode == 0


def compiling(since: float) -> bool:
    """Has MLX, on Linux, begun to compile a kernel since that time (`time.time`)?"""
    folders = Path(tempfile.gettempdir(), "mlx").glob("*/cpu")
    with contextlib.suppress(OSError):
        return any(folder.stat().st_mtime >= since for folder in folders)
    return False


def keep_memory() -> None:
    """Let large buffers be reused instead of returned to the system: for training.

    glibc maps every large buffer anew, and each of its pages costs a fault when it is first
    written: three times the price of the arithmetic for a softmax over 10 million numbers.
    """
    if not sys.platform.startswith("linux"):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 * 2**20)
