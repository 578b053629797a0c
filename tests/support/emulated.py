"""Kernels for Metal, run without a Mac: their text is compiled into tests/kernels/emulator."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_redrafter.kernels import source
from mlx_redrafter.kernels.source import Kernel, Launch

EMULATOR = Path(__file__).parents[1] / "kernels" / "emulator"
MISSING = sys.platform != "linux" or shutil.which("g++") is None
NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16", mx.uint32: "uint32",
         mx.int32: "int32", mx.bool_: "bool"}  # fmt: skip
CPP = {"float32": "float", "float16": "half", "bfloat16": "bfloat16_t", "uint32": "uint32_t",
       "int32": "int", "bool": "bool"}  # fmt: skip


class Found(NamedTuple):
    """What a run said ("ok", or what is wrong), and its outputs."""

    error: str
    outputs: list[np.ndarray]


class Instance(NamedTuple):
    """A kernel for one kind of arguments, as MLX compiles it; text: in place of the kernel's."""

    kernel: Kernel
    constants: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    text: str | None = None

    @classmethod
    def of(cls, launch: Launch, text: str | None = None) -> Instance:
        constants = tuple(defined(name, value) for name, value in launch.constants.items())
        inputs = tuple(NAMES[x.dtype] for x in launch.inputs)
        return cls(launch.kernel, constants, inputs, tuple(NAMES[d] for d in launch.dtypes), text)

    @property
    def name(self) -> str:
        return f"{self.kernel.name}-{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"


def defined(name: str, value: mx.Dtype | bool | int) -> str:
    """A constant of a launch, as C++ and Metal define it."""
    if isinstance(value, mx.Dtype):
        return f"using {name} = {CPP[NAMES[value]]};"
    return f"constexpr {type(value).__name__} {name} = {int(value)};"


class Emulator:
    """A program with these kernels in it, compiled once.

    Args:
        folder: where the program is made.
        beside: text of more functions.
        joined: products may be joined with the sums behind them, as Metal's compiler may.
    """

    def __init__(
        self, folder: Path, instances: Iterable[Instance], beside: str = "", joined: bool = False
    ) -> None:
        listed = list(dict.fromkeys(instances))
        functions = "\n".join(_function(i, one, folder) for i, one in enumerate(listed))
        table = ", ".join(f'{{"{one.name}", kernel_{i}}}' for i, one in enumerate(listed))
        main = f"int main() {{ return emulated::run({{{table}}}); }}\n"
        common = source.FOLDER / "common.h"
        text = f'#include "dialect.hpp"\n#include "{common}"\n{beside}\n{functions}\n{main}'
        (folder / "main.cpp").write_text(text)
        self._program = folder / "emulator"
        flags = ["-O2", "-ffp-contract=fast", "-mfma"] if joined else ["-O1", "-ffp-contract=off"]
        # What nobody set is no number that could be right; beyond the end of a lane's own array
        # the program ends.
        flags += ["-ftrivial-auto-var-init=pattern"]
        flags += ["-fsanitize=bounds,shift", "-fsanitize-undefined-trap-on-error"]
        command = ["g++", "-std=c++17", "-w", "-U_FORTIFY_SOURCE", *flags]
        files = ["-I", str(EMULATOR), "-o", str(self._program), str(folder / "main.cpp")]
        # What runtime/compiler.py sets there says how numbers are rounded.
        env = {name: value for name, value in os.environ.items() if name != "CPLUS_INCLUDE_PATH"}
        made = subprocess.run(
            [*command, *files], capture_output=True, text=True, check=False, env=env
        )
        assert made.returncode == 0, made.stderr[:3000]

    def run(
        self, launches: Sequence[Launch], orders: int = 1, texts: Sequence[str | None] = ()
    ) -> list[Found]:
        """Each in so many orders of its lanes, whose bits must be the same."""
        jobs = []
        for i, launch in enumerate(launches):
            instance = Instance.of(launch, texts[i] if texts else None)
            jobs.append(_job(launch, instance.name, orders))
        command = [str(self._program)]
        ran = subprocess.run(command, input=b"".join(jobs), capture_output=True, check=False)
        if ran.returncode:
            return [Found(f"the program ended with {ran.returncode}", [])] * len(launches)
        return list(_results(ran.stdout, launches))


def bits(array: mx.array) -> np.ndarray:
    """An array as NumPy can have it: bfloat16 as its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def values(found: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Outputs of a run as float64."""
    if dtype == mx.bfloat16:
        return np.array(mx.array(found).view(mx.bfloat16).astype(mx.float32)).astype(np.float64)
    return found.astype(np.float64)


def written(launch: Launch, folder: Path) -> str:
    """The whole source that MLX makes of a launch, without its preamble; no Metal is needed."""
    file = folder / "launch.mlxfn"
    run = lambda *inputs: launch._replace(inputs=inputs).run()  # noqa: E731
    mx.export_function(str(file), run, *launch.inputs)
    found = file.read_bytes()
    start = found.index(source.header().encode())
    end = found.index(b";\n", found.index(b"[[host_name", start)) + 2
    return found[start:end].decode()


def _function(number: int, one: Instance, folder: Path) -> str:
    lines = [f"static void kernel_{number}(void* job_) {{", *one.constants]
    for i, (name, kind) in enumerate(zip(one.kernel.inputs, one.inputs, strict=True)):
        lines.append(f"  const auto {name} = emulated::input<{CPP[kind]}>(job_, {i});")
        lines.append(f"  const int* {name}_shape = emulated::shape(job_, {i});")
    for i, (name, kind) in enumerate(zip(one.kernel.outputs, one.outputs, strict=True)):
        lines.append(f"  const auto {name} = emulated::output<{CPP[kind]}>(job_, {i});")
    file = source.FOLDER / f"{one.kernel.name}.metal"
    if one.text is not None:
        file = folder / f"{one.name}.metal"
        file.write_text(one.text)
    return "\n".join([*lines, f'#include "{file}"', "}"])


def _job(launch: Launch, name: str, orders: int) -> bytes:
    sizes = " ".join(str(n) for n in (*launch.grid, *launch.group))
    parts = [f"{name} {orders} {len(launch.inputs)} {len(launch.shapes)} {sizes}\n".encode()]
    for label, array in zip(launch.kernel.inputs, launch.inputs, strict=True):
        shape = " ".join(map(str, array.shape))
        parts.append(f"{label} {NAMES[array.dtype]} {shape}\n".encode() + bits(array).tobytes())
    outputs = zip(launch.kernel.outputs, launch.dtypes, launch.shapes, strict=True)
    for label, dtype, size in outputs:
        parts.append(f"{label} {NAMES[dtype]} {' '.join(map(str, size))}\n".encode())
    return b"".join(parts)


def _results(text: bytes, launches: Sequence[Launch]) -> Iterable[Found]:
    kinds: dict[mx.Dtype, Callable] = {mx.float16: np.float16, mx.bfloat16: np.uint16}
    at = 0
    for launch in launches:
        end = text.index(b"\n", at)
        error, at, outputs = text[at:end].decode(), end + 1, []
        if error == "ok":
            for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True):
                kind, count = np.dtype(kinds.get(dtype, np.float32)), int(np.prod(shape))
                found = np.frombuffer(text, kind, count, at)
                outputs.append(found.reshape(shape))
                at += count * kind.itemsize
        yield Found(error, outputs)


def to_array(found: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """An output of a run."""
    array = mx.array(found)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array
