"""What MLX computes on, and the machine around it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def fused_kernels() -> bool:
    """True where mx.fast has real kernels; on the CPU it decomposes into primitives."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.gpu))


def release() -> None:
    """Have MLX give back what a GPU's freed arrays leave: it keeps them for arrays of the same size
    until nearly all memory is taken, and slabs that grew are not of the same size."""
    import mlx.core as mx

    if fused_kernels():
        mx.clear_cache()


def device() -> str:
    """What MLX computes on: "gpu" (Metal) or "cpu"."""
    import mlx.core as mx

    return "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


def dtype_name(dtype: object) -> str:
    """An MLX type as a person writes it: "float32"."""
    return str(dtype).removeprefix("mlx.core.")


def conditions(model: str, dtype: object, *names: str, **own: Any) -> dict[str, Any]:
    """What figures hold for: a model and its type, what the caller adds, and of the machine the
    facts of these names, in this order."""
    here = machine(*(names or ("chip", "device", "mlx", "blas")))
    return {"model": model, "dtype": dtype_name(dtype), **own, **here}


def machine(*names: str) -> dict[str, Any]:
    """Chip, memory, operating system, versions, and the BLAS where one is used; or only the facts
    of these names, in this order."""
    import mlx.core as mx

    import mlx_redrafter
    from mlx_redrafter.runtime import blas

    found = mx.device_info()
    name = blas.used()
    facts = {
        "chip": _chip(found),
        "memory_gb": memory_bytes() / 2**30,
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "device": device(),
        "blas": name,
        "blas_detail": blas.status().detail if name else None,
        "python": platform.python_version(),
        "mlx_redrafter": mlx_redrafter.__version__,
        "mlx": importlib.metadata.version("mlx"),
        "mlx_lm": importlib.metadata.version("mlx-lm"),
    }
    return {name: facts[name] for name in names or facts}


def _chip(found: Mapping[str, Any]) -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        out = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return out or platform.machine()
    return str(found.get("device_name") or platform.machine())


def memory_bytes() -> int:
    """Of the whole machine."""
    import mlx.core as mx

    found = mx.device_info()
    if "memory_size" in found:
        return int(found["memory_size"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
