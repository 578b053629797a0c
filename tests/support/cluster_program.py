"""The first of three machines, all of them here: runs many cases and prints what came of them;
then the second one is killed in the middle of an answer.

    python cluster_program.py FOLDER HOSTFILE PID [full]

with folders `tensor` and `pipeline` in it, of models that have a drafter beside them; PID: a file
with the second one's. Without `full` the costliest cases are left out.

What takes the time is how often machines meet: the threads that wait for others do not sleep.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np

from mlx_redrafter.api import Model
from mlx_redrafter.budget.costs import bare_pass
from mlx_redrafter.cache.layer import new_caches
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.decoding.request import Request
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.distributed import cluster, launch, lead
from mlx_redrafter.distributed.cluster import Cluster
from mlx_redrafter.distributed.noise import without_noise
from mlx_redrafter.distributed.split import Split
from mlx_redrafter.tree.shape import TreeShape

PROMPT = [(7 * i + 3) % 90 for i in range(11)]
PLAIN, TREE = TreeShape.plain(), TreeShape(2, 2, 5)
SHAPES = {"tree": TREE, "chain": TreeShape.chain(2), "lookup": TreeShape(1, 1, 5, lookup=4)}
PARAMS = {"greedy": SamplingParams(), "sampled": SamplingParams(temp=0.8, seed=5)}
N = 5


def request(
    prompt: list[int] = PROMPT,
    params: SamplingParams = PARAMS["greedy"],
    shape: TreeShape = PLAIN,
    n: int = N,
    **more: Any,
) -> Request:
    return Request(prompt, params, shape, n, **more)


def text(model: Model, asked: Request, steps: int | None = None) -> list[int]:
    """An answer, or what its first steps give."""
    running, found = model.engine.generate(asked), list[int]()
    for i, step in enumerate(running, 1):
        found += step.tokens
        if i == steps:
            break
    running.close()
    return found


def loaded(there: Cluster, folder: Path, split: Split) -> Model:
    place = folder / split.kind
    model, _ = lead.load(there, str(place), str(place / "drafter"), split, text=False)
    return model


def collectives(there: Cluster, model: Model, rows: int) -> tuple[int, list[str]]:
    """Of a pass that is traced and never run: how many, and what else it exchanges by."""
    before, target = there.link.collectives, model.target
    caches = new_caches(target.caches, 64, target.dtype)
    out, _ = bare_pass(target)(mx.zeros((rows,), mx.int32), mx.array([3], mx.int32), caches)
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, out)
        drawn = Path(file.name).read_text()
    other = [name for name in ("AllReduce", "Send", "Recv", "ReduceScatter") if name in drawn]
    return there.link.collectives - before, other


def texts(model: Model, kinds: dict[str, list[str]]) -> dict[str, Any]:
    """By sampling, plain text and that of shapes."""
    found: dict[str, Any] = {}
    for name, shapes in kinds.items():
        params = PARAMS[name]
        found[name] = {"plain": text(model, request(params=params))}
        for shape in shapes:
            found[name][shape] = text(model, request(params=params, shape=SHAPES[shape]))
    return found


def sessions(model: Model) -> dict[str, Any]:
    """Kept, stopped early, forked, and an answer that ends by its length."""
    session = Session()
    first = text(model, request(shape=TREE, session=session), steps=1)
    again = [*PROMPT, *first, 8, 9]
    kept = text(model, request(again, shape=TREE, n=3, session=session))
    copy = session.fork(len(PROMPT))
    forked = text(model, request([*PROMPT, 4, 5], n=2, session=copy))
    return {
        "kept": kept,
        "afresh": text(model, request(again, n=3)),
        "forked": forked,
        "forked afresh": text(model, request([*PROMPT, 4, 5], n=2)),
        "one": text(model, request(n=1)),
    }


def stopped(model: Model) -> str:
    """Ctrl-C while a prompt is read."""

    def leave(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    try:
        text(model, request(step_size=4, progress=leave))
    except KeyboardInterrupt:
        return "stopped"
    return "went on"


class Even:
    """A grammar, and a place in it: every token is even, and the third is 8."""

    end, over = 1, False

    def __init__(self) -> None:
        self.count = 0

    def begin(self) -> Even:
        return Even()

    def take(self, tokens: Sequence[int]) -> int:
        for taken, token in enumerate(tokens):
            if token % 2 or (self.count == 2 and token != 8):
                return taken
            self.count += 1
        return len(tokens)

    def mask(self) -> np.ndarray:
        return np.array([0x55555555] * 4, np.uint32)

    def forced(self, most: int) -> list[int]:
        return [8] if self.count == 2 else []


def batch(model: Model) -> list[list[int]]:
    """Two answers at once, one of them drafted, and a third that is let go."""
    running = model.batch(model.engine, None) if model.batch else Batch(model.engine)
    rows = [
        running.add(request(shape=TREE, n=4)),
        running.add(request(params=PARAMS["sampled"], n=3)),
        running.add(request(PROMPT[:4], n=20)),
    ]
    found: dict[Any, list[int]] = {row: [] for row in rows}
    while running.rows or running.waiting:
        for row, emitted in running.step():
            found[row] += emitted.tokens
        if len(found[rows[2]]) > 1:
            running.remove(rows[2])
    return [found[row] for row in rows[:2]]


def lose(model: Model, pid: Path) -> None:
    """An answer without an end, in which a machine is killed."""
    for number, _ in enumerate(model.engine.generate(request(n=2000))):
        if number == 2:
            os.kill(int(pid.read_text()), signal.SIGKILL)


def main(folder: Path, hostfile: Path, pid: Path, full: bool) -> None:
    without_noise()
    with cluster.start(launch.from_file(hostfile)) as there:
        model = loaded(there, folder, Split("tensor"))
        results: dict[str, Any] = {
            "tensor": texts(model, {"greedy": ["lookup"], "sampled": ["tree"]}),
            "sessions": sessions(model),
            "stopped": stopped(model),
            "batch": batch(model),
            "collectives": [collectives(there, model, rows) for rows in (1, 8)],
        }
        for name, split, shape in (
            ("unequal", Split("tensor", (3, 2, 1)), "chain"),
            ("pipeline", Split("pipeline"), "tree"),
        ):
            other = loaded(there, folder, split)
            results[name] = texts(other, {"sampled": [shape]})
            results[f"{name} collectives"] = [collectives(there, other, rows) for rows in (1, 8)]
        if full:
            results |= costly(there, folder, model)
        print(json.dumps(results), flush=True)
        lose(model, pid)


def costly(there: Cluster, folder: Path, model: Model) -> dict[str, Any]:
    """A grammar; machines that round differently."""
    grammar = [text(model, request(shape=shape, n=4, grammar=Even())) for shape in (PLAIN, TREE)]
    there.link.alike = False
    there.tell("alike", alike=False)
    unlike = loaded(there, folder, Split("tensor"))
    before = there.link.collectives
    found = texts(unlike, {"sampled": ["tree"]})
    more = there.link.collectives > before
    return {"grammar": grammar, "unlike": found, "unlike more": more}


if __name__ == "__main__":
    places = [Path(argument) for argument in sys.argv[1:4]]
    main(places[0], places[1], places[2], "full" in sys.argv[4:])
