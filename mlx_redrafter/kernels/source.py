"""The text of a kernel, and one launch of it. `tests/kernels` runs the same text without a Mac."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

FOLDER = Path(__file__).parent / "metal"
HEADERS = ("dialect.h", "common.h")
MOST_THREADS = 256  # of a group; some GPUs refuse kernels of many registers with more


class Kernel(NamedTuple):
    """A kernel's name, which is its file's, and those of what it reads and writes."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def text(self) -> str:
        return (FOLDER / f"{self.name}.metal").read_text(encoding="utf-8")


class Launch(NamedTuple):
    """A kernel with all that it is called with.

    Args:
        constants: what the text takes for known, by name; no two kinds of them share a program.
        grid: how many threads in all, by axis.
        group: how many of them share memory.
        shapes: of the outputs.
        dtypes: of the outputs.
    """

    kernel: Kernel
    inputs: Sequence[mx.array]
    constants: dict[str, Any]
    grid: tuple[int, int, int]
    group: tuple[int, int, int]
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[mx.Dtype]

    def run(self) -> list[mx.array]:
        """The outputs, not evaluated. Raises RuntimeError where there is no Metal."""
        found: list[mx.array] = _compiled(self.kernel)(
            inputs=list(self.inputs),
            template=list(self.constants.items()),
            grid=self.grid,
            threadgroup=self.group,
            output_shapes=list(self.shapes),
            output_dtypes=list(self.dtypes),
        )
        return found


def header() -> str:
    """What stands before every kernel."""
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in HEADERS)


def digest(*kernels: Kernel) -> str:
    """Another one whenever a text changes."""
    text = "\0".join([header(), *(kernel.text for kernel in kernels)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _compiled(kernel: Kernel) -> Callable[..., list[mx.array]]:
    made: Any = mx.fast.metal_kernel(
        name=f"redrafter_{kernel.name}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.text,
        header=header(),
    )
    return made
