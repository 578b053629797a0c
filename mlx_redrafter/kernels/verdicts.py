"""What this machine's GPU said of the kernels: asked once for every shape, kept on disk.

`MLX_REDRAFTER_KERNEL` chooses: `fast`, which is also taken without it, where it was found right and
faster here; `exact`, where it was found right; `off`, MLX's own kernels everywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import OptionError
from ..runtime.paths import cache_dir, json_or_nothing, write_whole
from . import products
from .products import Order, Shape
from .source import digest

VARIABLE = "MLX_REDRAFTER_KERNEL"
CHOICES = ("off", "fast", "exact")
GAIN = 1.1  # times as fast as MLX's, or it is not worth another way
_SECONDS = 300  # for all that is asked at once
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}

Say = Callable[[str], None]


class Verdict(NamedTuple):
    """Of one shape.

    Args:
        gains: how many times faster than MLX's `fast` was, by rows; none where it was not right.
        order: in which `exact` gives every row the bits that it has alone; None: in none.
        single: MLX's own kernel for one row has these bits, so that one row may go its way.
        error: why there is nothing, if something went wrong.
    """

    gains: Mapping[int, float] = {}
    order: Order | None = None
    single: bool = False
    error: str = ""

    def rows(self) -> frozenset[int]:
        """How many rows `fast` gains with. Its own time is that of whole tiles, while MLX's grows
        with the rows: what is measured holds up to the next that is, or the end of the tile."""
        found: set[int] = set()
        for first, last in ((products.FAST_ROWS[0], 8), (9, products.FAST_ROWS[-1])):
            measured = sorted(n for n in self.gains if first <= n <= last)
            for n, end in itertools.pairwise([*measured, last + 1]):
                if self.gains[n] >= GAIN:
                    found |= set(range(n, end))
        return frozenset(found)

    def text(self) -> str:
        """In a line."""
        if self.error:
            return self.error
        gains = ", ".join(f"{rows}: x{gain:.2f}" for rows, gain in self.gains.items())
        exact = "no exact order" if self.order is None else "exact in an order of its own"
        exact = "exact in MLX's order" if self.single else exact
        return f"fast {gains or 'is not right here'}; {exact}"

    def as_dict(self) -> dict[str, Any]:
        gains = {str(rows): gain for rows, gain in self.gains.items()}
        return {**self._asdict(), "gains": gains}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Verdict:
        """Raises KeyError, TypeError and ValueError."""
        gains = {int(rows): float(gain) for rows, gain in stored["gains"].items()}
        order = None if stored["order"] is None else Order(*stored["order"])
        return cls(gains, order, bool(stored["single"]), str(stored["error"]))


def choice() -> str:
    """`off`, `fast` or `exact`, as the variable says. Raises OptionError."""
    given = os.environ.get(VARIABLE) or "fast"
    if given not in CHOICES:
        raise OptionError(
            f"{VARIABLE}={given} is not possible: set it to {', '.join(CHOICES[:-1])} or "
            f"{CHOICES[-1]}, or unset it"
        )
    return given


def metal() -> bool:
    """Are there kernels to be had: Metal, and MLX computes with it?"""
    return bool(mx.metal.is_available()) and mx.default_device().type == mx.DeviceType.gpu


def verdicts(shapes: Iterable[Shape], say: Say, again: bool = False) -> dict[Shape, Verdict]:
    """Of all possible shapes, asking the machine about those that nobody has asked about yet.

    Args:
        say: told before it takes seconds.
        again: ask in any case.
    """
    wanted = [shape for shape in dict.fromkeys(shapes) if products.possible(shape)]
    if not wanted or not metal():
        return {}
    facts = conditions()
    known = {} if again else stored(facts)
    missing = [shape for shape in wanted if shape not in known]
    if missing:
        say("Trying kernels for few rows on this GPU (once, some seconds) ...")
        known |= _asked(missing)
        _keep(facts, known)
    return {shape: known[shape] for shape in wanted}


def conditions() -> dict[str, str]:
    """Everything that a verdict depends on."""
    info = mx.device_info()
    return {
        "device": str(info.get("device_name", platform.machine())),
        "architecture": str(info.get("architecture", "")),
        "macos": platform.mac_ver()[0],
        "mlx": version("mlx"),
        "kernels": digest(products.FAST, products.EXACT),
    }


def stored(facts: Mapping[str, str]) -> dict[Shape, Verdict]:
    """What was kept under these conditions."""
    found = {}
    for name, content in json_or_nothing(_file(facts)).get("shapes", {}).items():
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            found[shape_of(name)] = Verdict.from_dict(content)
    return found


def named(shape: Shape) -> str:
    """A shape as it is written down: 5120x17408-4-64-float16."""
    dtype = str(shape.dtype).removeprefix("mlx.core.")
    return f"{shape.outputs}x{shape.inputs}-{shape.bits}-{shape.group}-{dtype}"


def shape_of(name: str) -> Shape:
    """The inverse of `named`. Raises KeyError and ValueError."""
    size, bits, group, dtype = name.split("-")
    outputs, inputs = size.split("x")
    return Shape(int(outputs), int(inputs), int(bits), int(group), _DTYPES[dtype])


def _file(facts: Mapping[str, str]) -> Path:
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "costs" / f"kernels-{key}.json"


def _keep(facts: Mapping[str, str], known: Mapping[Shape, Verdict]) -> None:
    """Without a place to keep it, it is asked the next time too."""
    content = {named(shape): verdict.as_dict() for shape, verdict in known.items()}
    with contextlib.suppress(OSError):
        file = _file(facts)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({**facts, "shapes": content}, indent=1) + "\n")


def _asked(shapes: Iterable[Shape]) -> dict[Shape, Verdict]:
    """In a process of its own: what a GPU cannot stand ends that one. A line for each shape."""
    listed = list(shapes)
    command = [sys.executable, "-m", "mlx_redrafter.kernels.probe", *map(named, listed)]
    lines, reason = "", "it ended early"
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        lines = ran.stdout
        reason = f"it ended with {ran.returncode}: {' '.join(ran.stderr.split())[-200:]}"
    except subprocess.TimeoutExpired as error:
        lines = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        reason = f"it took more than {_SECONDS} s"
    except OSError as error:
        reason = str(error)
    found = {}
    for line in lines.splitlines():
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            content = json.loads(line)
            found[shape_of(content["shape"])] = Verdict.from_dict(content)
    return {shape: found.get(shape, Verdict(error=reason)) for shape in listed}
