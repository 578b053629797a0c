"""On a GPU every fused kernel is compiled when it is first met, tens of milliseconds each and some
tens of them in a shape of tree: in the midst of an answer that would be a stop of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

import mlx.core as mx

from mlx_redrafter.decoding.answering import Answering, Runner
from mlx_redrafter.decoding.step import StepFunction, StepSpec, blank_state
from mlx_redrafter.runtime.device import fused_kernels

PATIENCE = 1.0  # seconds, after which a line says what is waited for
_MOST = 2048  # slots of a state of zeros: kernels do not depend on their number, a graph does


class Compiling(Runner, Protocol):
    """What runs the steps, and knows which it has compiled; see `Engine`."""

    say: Callable[[str], None]
    warm: set[StepSpec]

    def step_function(self, spec: StepSpec) -> StepFunction: ...


def warming(engine: Compiling, answer: Answering, capacity: int) -> Iterator[None]:
    """Launch a step of every shape that an answer may choose, one by iteration, on a state of
    zeros: while the GPU is at a part of the prompt, the host compiles what it will need.

    Those that this engine has met before are left out; on a CPU all are. capacity: of the answer's
    caches, whose graphs are traced with that.
    """
    if not fused_kernels():
        return
    sampling, drafters = answer.request.sampling, engine.taking_part(answer.awake)
    looked_up = any(shape.lookup for shape in answer.policy.shapes)
    begun, said = time.perf_counter(), False
    for shape in answer.policy.shapes:
        shape = shape if answer.awake else shape.only(drafter.part for drafter in drafters)
        state = blank_state(
            engine.target, drafters, shape, 2, min(capacity, _MOST),
            history=bool(sampling.windows) or looked_up,
        )  # fmt: skip
        waiting = state.pending[1].shape[0] if state.pending else 0
        spec = answer.spec(shape, waiting)
        if spec in engine.warm:
            continue
        engine.warm.add(spec)
        if not said and time.perf_counter() - begun > PATIENCE:
            engine.say("Compiling what this GPU will need (some seconds, the first time) ...")
            said = True
        mx.async_eval(engine.step_function(spec)(state, answer.arrays))
        yield
