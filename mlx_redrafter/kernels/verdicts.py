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
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import OptionError
from ..runtime.paths import cache_dir, json_or_nothing, write_whole
from . import products
from .delta import DELTA
from .products import Order, Shape
from .source import digest

VARIABLE = "MLX_REDRAFTER_KERNEL"
CHOICES = ("off", "fast", "exact")
GAIN = 1.1  # times as fast as MLX's, or it is not worth another way
PROBE = "mlx_redrafter.kernels.probe"
_SECONDS = 300  # for all that is asked at once
_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}

Say = Callable[[str], None]


class Verdict(NamedTuple):
    """Of one kind of weights, or of a recurrence.

    Args:
        gains: how many times faster than MLX's own way the kernel for it was, by rows; none where
            it was not right.
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
        text = gains or "not right here"
        if self.order is not None:
            text += ", exact in MLX's order" if self.single else ", exact in an order of its own"
        return text

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


def verdicts(shapes: Iterable[Shape], say: Say) -> dict[Shape, Verdict]:
    """Of all possible products of these shapes; see `found`."""
    wanted = {shape: named(shape) for shape in shapes if products.possible(shape)}
    known = found(wanted.values(), PROBE, say)
    return {shape: known[name] for shape, name in wanted.items() if name in known}


def found(names: Iterable[str], probe: str, say: Say, again: bool = False) -> dict[str, Verdict]:
    """Verdicts by name, asking the machine about those that nobody has asked about yet. Nothing
    where there is no Metal.

    Args:
        probe: the module that is asked, as a program with names for arguments.
        say: told before it takes seconds.
        again: ask in any case.
    """
    wanted = list(dict.fromkeys(names))
    if not wanted or not metal():
        return {}
    facts = conditions()
    known = stored(facts)
    missing = [name for name in wanted if again or name not in known]
    if missing:
        say("Trying kernels for few rows on this GPU (once, some seconds) ...")
        known |= _asked(missing, probe)
        _keep(facts, known)
    return {name: known[name] for name in wanted}


def conditions() -> dict[str, str]:
    """Everything that a verdict depends on."""
    info = mx.device_info()
    return {
        "device": str(info.get("device_name", platform.machine())),
        "architecture": str(info.get("architecture", "")),
        "macos": platform.mac_ver()[0],
        "mlx": version("mlx"),
        "kernels": digest(products.FAST, products.EXACT, DELTA),
    }


def stored(facts: Mapping[str, str]) -> dict[str, Verdict]:
    """What was kept under these conditions."""
    known = {}
    for name, content in json_or_nothing(_file(facts)).get("shapes", {}).items():
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            known[name] = Verdict.from_dict(content)
    return known


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


def _keep(facts: Mapping[str, str], known: Mapping[str, Verdict]) -> None:
    """Without a place to keep it, it is asked the next time too."""
    content = {name: verdict.as_dict() for name, verdict in known.items()}
    with contextlib.suppress(OSError):
        file = _file(facts)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({**facts, "shapes": content}, indent=1) + "\n")


def _asked(names: Sequence[str], probe: str) -> dict[str, Verdict]:
    """In a process of its own: what a GPU cannot stand ends that one. A line for each name."""
    lines, reason = "", ""
    try:
        ran = subprocess.run(
            [sys.executable, "-m", probe, *names],
            capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        lines = ran.stdout
        reason = f"it ended with {ran.returncode}: {' '.join(ran.stderr.split())[-200:]}"
    except subprocess.TimeoutExpired as error:
        lines = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        reason = f"it took more than {_SECONDS} s"
    except OSError as error:
        reason = str(error)
    known = {}
    for line in lines.splitlines():
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            content = json.loads(line)
            known[content["name"]] = Verdict.from_dict(content)
    return {name: known.get(name, Verdict(error=reason)) for name in names}
