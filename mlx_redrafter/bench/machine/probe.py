"""A plain answer far into a text, timed in a process of its own: MLX reads its limit of launches in
a command buffer once, and whether it pays is a matter of the machine (see `runtime.metal`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlx_redrafter.runtime import metal

_TOKENS, _ROUNDS, CACHED = 48, 3, 2048
_PATIENCE = 600  # seconds
_CLEAR = 0.97  # of the other's time: what is not clearly faster may be noise


def both(folder: Path, cached: int = CACHED) -> dict[str, Any]:
    """Seconds a step with MLX's own limit and with ours, and which is kept for this model.

    Raises:
        RuntimeError: a process that fails, with its last line.
    """
    found = {name: _alone(folder, cached, name) for name in (metal.OWN, metal.MLX)}
    own, mlx = (found[name]["milliseconds"] for name in (metal.OWN, metal.MLX))
    choice = metal.MLX if mlx < _CLEAR * own else metal.OWN
    metal.keep(folder, choice)
    return {**found, "kept": choice}


def _alone(folder: Path, cached: int, whose: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, str(folder), str(cached)]
    new = {name: value for name, value in os.environ.items() if name != metal.OPS}
    run = subprocess.run(
        command, env={**new, metal.VARIABLE: whose}, capture_output=True, text=True,
        timeout=_PATIENCE, check=False,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError((run.stderr.strip() or "no message").splitlines()[-1])
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def timed(folder: Path, cached: int) -> dict[str, Any]:
    """The fastest of a few answers, a step of it; and what limit held."""
    from mlx_redrafter.api import load
    from mlx_redrafter.cache.session import Session
    from mlx_redrafter.decoding.request import Request
    from mlx_redrafter.decoding.sampling import SamplingParams
    from mlx_redrafter.tree.shape import TreeShape

    model, _ = load(folder, None)
    config = model.target.config
    room = max(2, min(cached, config.max_positions - _TOKENS - 8))
    prompt = [7919 * i % config.vocab_size for i in range(room)]
    session, best = Session(), float("inf")
    for _ in range(_ROUNDS):
        asked = Request(prompt, SamplingParams(), TreeShape.plain(), _TOKENS, session)
        steps = model.engine.generate(asked)
        next(steps)
        start = time.perf_counter()
        count = sum(len(step.tokens) for step in steps)
        best = min(best, (time.perf_counter() - start) / max(1, count))
    return {"limit": metal.limit(), "milliseconds": round(1e3 * best, 3)}


if __name__ == "__main__":
    print(json.dumps(timed(Path(sys.argv[1]), int(sys.argv[2]))))
