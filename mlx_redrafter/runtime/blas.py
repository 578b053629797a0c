"""Choose the matrix product that MLX uses on the CPU. Only Linux has a choice.

The Linux wheel of MLX calls `cblas_sgemm` of a bundled reference BLAS: slow, one thread. A library
loaded with RTLD_GLOBAL before `mlx.core` is imported takes its place. `native/row_exact_gemm.cpp`
is such a library: it is fast and its bits equal those of the reference, whatever the number of
rows. It is compiled at the first use, with the g++ that `mx.compile` on the CPU needs anyway.

`MLX_REDRAFTER_BLAS` chooses: `row-exact`, which is also taken without it, is that library,
`reference` leaves MLX as it is. What cannot be had falls back to `reference`, and `status()` says
why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import compiler
from mlx_redrafter.runtime.paths import user_path

VARIABLE = "MLX_REDRAFTER_BLAS"
CHOICES = ("row-exact", "reference")

_NATIVE = Path(__file__).parent / "native"
_SOURCES = ("row_exact_gemm.cpp", "helper_threads.hpp")
_CPU_FIELDS = {
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags",
    "Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part",
}  # fmt: skip


@dataclass(frozen=True)
class BlasStatus:
    """What multiplies matrices on the CPU.

    `name` is "row-exact", "reference" or "accelerate"; `detail` says from where, or why nothing
    better could be had.
    """

    name: str
    detail: str


class _Unavailable(Exception):
    """Why the library cannot be built or loaded; becomes `BlasStatus.detail`."""


def prepare() -> None:
    """Load the chosen BLAS; to be called before `mlx.core` is imported. Later calls do nothing.

    An unknown value of MLX_REDRAFTER_BLAS is left to `status` to report: an import must not fail.
    """
    with contextlib.suppress(RuntimeError, OptionError):  # no such home directory
        compiler.prepare(_cache_folder().parent / "kernels")
    with contextlib.suppress(OptionError):
        status()


@functools.cache
def status() -> BlasStatus:
    """The BLAS in use, decided (and loaded) by the first call of this or of `prepare`.

    Raises OptionError for an unknown value of MLX_REDRAFTER_BLAS.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in ("auto", *CHOICES):
        raise OptionError(
            f"{VARIABLE}={choice} is not a BLAS that this program knows: "
            f"set it to {' or '.join(CHOICES)}, or unset it"
        )
    if sys.platform == "darwin":
        return BlasStatus("accelerate", "macOS: MLX brings its own fast products")
    if not sys.platform.startswith("linux"):
        return BlasStatus("reference", f"no other BLAS is provided on {sys.platform}")
    if choice == "reference":
        return BlasStatus("reference", f"chosen by {VARIABLE}")
    if "mlx.core" in sys.modules:
        return BlasStatus(
            "reference",
            "MLX was imported first; import mlx_redrafter before it, at the top of the program",
        )
    try:
        return _use()
    # The last two: no such home directory.
    except (_Unavailable, OSError, RuntimeError, OptionError) as reason:
        return BlasStatus("reference", str(reason))


@functools.cache
def warn_if_slow() -> None:
    """Say once, to who is about to compute, that no fast BLAS is in use though none was refused."""
    found = status()
    wanted = os.environ.get(VARIABLE) != "reference"
    # Without g++ nothing is compiled at all, which is said elsewhere.
    if sys.platform.startswith("linux") and found.name == "reference" and wanted and _compiler():
        warnings.warn(f"matrix products are up to eight times slower: {found.detail}", stacklevel=4)


def _compiler() -> str | None:
    return shutil.which("g++")


def used() -> str | None:
    """The name of the BLAS that multiplies; None where the GPU does. Imports MLX."""
    import mlx.core as mx

    return None if mx.default_device().type == mx.DeviceType.gpu else status().name


def rows_alone() -> bool:
    """Does a row come out the same to the last bit, however many are multiplied with it?"""
    return used() in ("row-exact", "reference")


def full_float32() -> None:
    """Have float32 multiplied in full; to be called before the first product, when MLX asks.

    Otherwise newer Apple GPUs take TF32 for two and more rows: its 10 bits look like an error.
    """
    os.environ["MLX_ENABLE_TF32"] = "0"


def _use() -> BlasStatus:
    path = _library()
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise _Unavailable(f"the compiled BLAS does not load: {error}") from error
    return BlasStatus("row-exact", str(path))


def _library() -> Path:
    """The compiled library of this source, compiler and CPU; built if the cache has none."""
    program = _compiler()
    if program is None:
        raise _Unavailable("no g++ on PATH to compile the row-exact BLAS; install g++")
    path = _cache_folder() / f"{_key(program)}.so"
    return path if path.exists() else _build(program, path)


def _cache_folder() -> Path:
    if own := os.environ.get("MLX_REDRAFTER_CACHE"):
        return user_path(own) / "blas"
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "mlx-redrafter" / "blas"


def _flags() -> list[str]:
    # The reference BLAS of the aarch64 wheel has fused multiply-adds, that of x86-64 has not.
    contract = "fast" if platform.machine() == "aarch64" else "off"
    return [
        "-std=c++17", "-O3", "-march=native", f"-ffp-contract={contract}",
        "-fvisibility=hidden", "-shared", "-fPIC", "-pthread",
    ]  # fmt: skip


def _key(program: str) -> str:
    """Changes with source, flags, compiler and CPU: a home directory may be shared by machines."""
    import hashlib

    # Starting `g++ --version` would cost more than everything else here; its file tells as much.
    real = os.path.realpath(program)
    stat = os.stat(real)
    parts = [*_flags(), real, str(stat.st_size), str(stat.st_mtime_ns), *_cpu()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for name in _SOURCES:
        digest.update((_NATIVE / name).read_bytes())
    return f"row-exact-{digest.hexdigest()[:16]}"


def _cpu() -> list[str]:
    return [line for line in compiler.cpuinfo() if line.split(":")[0].strip() in _CPU_FIELDS]


def _build(program: str, path: Path) -> Path:
    """Compile to a name of its own and rename, so that concurrent first runs do not meet."""
    import subprocess
    import tempfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            output = Path(folder, path.name)
            command = [program, *_flags(), str(_NATIVE / _SOURCES[0]), "-o", str(output)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            os.replace(output, path)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or ["no message"]
        raise _Unavailable(f"g++ could not compile the row-exact BLAS: {lines[0]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unavailable(f"the row-exact BLAS could not be built: {error}") from error
    return path
