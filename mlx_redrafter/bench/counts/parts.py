"""One decode step, traced as on Metal, and taken apart: draft, choice, verify pass, ..."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_redrafter.bench.counts.graph import Graph, graph, metal_shaped
from mlx_redrafter.bench.counts.metal import dispatches, unknown, widest_sort
from mlx_redrafter.cache.layer import Pass
from mlx_redrafter.decoding import sampling, step
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.drafters import Drafter, lookup
from mlx_redrafter.models import Decoder
from mlx_redrafter.tree.shape import BEAMS, TreeShape

# In the order in which a step calls them: where the part is called, and what the report says.
Calls = tuple[tuple[Any, str, str], ...]
CALLS: Calls = (
    (lookup, "search", "lookup"),
    (step, "draft", "choose the tree"),
    (step, "verify", "verify pass"),
    (Decoder, "logits", "output head"),
    (sampling, "sample", "choose tokens"),
    (step, "accept", "walk"),
)
DRAFT, MOVE, STATE = "draft", "move accepted rows", "commit, next state"
NAMES = (DRAFT, *(name for _, _, name in CALLS))
ORDER = (*NAMES[:4], MOVE, *NAMES[4:], STATE)
VERIFY = ("verify pass", "output head", MOVE)


@dataclass(frozen=True)
class Counts:
    """What one step does. ``parts`` adds up to ``launches`` and ``primitives``."""

    shape: TreeShape
    primitives: int  # those mx.compile leaves, views included
    launches: Counter[str]  # estimated dispatches on Metal, by kind
    parts: dict[str, tuple[int, int]]  # name -> (primitives, launches)
    by_part: dict[str, Counter[str]]  # launches of every part, by kind
    unknown: set[str]
    widest_sort: int

    @property
    def dispatches(self) -> int:
        return sum(self.launches.values())

    @property
    def beside_verify(self) -> int:
        """Dispatches of everything that is not the target's pass."""
        return sum(n for name, (_, n) in self.parts.items() if name not in VERIFY)


def count(
    target: Decoder,
    drafters: Sequence[Drafter],
    shape: TreeShape,
    params: SamplingParams | None = None,
    capacity: int = 256,
) -> Counts:
    """Count a step of evaluated models, loaded as on Metal or not, at so many KV slots."""
    params = SamplingParams() if params is None else params
    used = drafters if shape.drafts else ()
    spec = step.StepSpec(shape, params.features, params.windows)
    function = step.make_step(target, used, spec, lambda: None)
    arrays = params.arrays(target.config.vocab_size)
    history = bool(params.windows or shape.lookup)
    state = step.blank_state(target, used, shape, 2, capacity, history)
    mx.eval(state)
    leaves = _leaves(state)

    def whole(*values: mx.array) -> list[mx.array]:
        return _leaves(function(_restored(state, values), arrays))

    beams = {type(drafter): None for drafter in used if drafter.part == BEAMS}
    calls = (*((kind, "propose", DRAFT) for kind in beams), *CALLS)
    with metal_shaped():
        names, cut, moved = _called(whole, calls, leaves), {}, None
        for name in names:
            cut[name] = graph(_until(whole, calls, name), *leaves)
            if name == "verify pass":
                with patch.object(
                    step, "Pass", functools.partial(_without_moves, len(target.caches))
                ):
                    moved = graph(_until(whole, calls, name), *leaves)
        full = graph(whole, *leaves)
    parts: dict[str, Graph] = {}
    for name, part in cut.items():
        parts[name] = moved if name == "verify pass" and moved is not None else part
        if name == "verify pass":
            parts[MOVE] = part
    parts[STATE] = full
    return _summed(shape, full, parts)


def _summed(shape: TreeShape, full: Graph, parts: dict[str, Graph]) -> Counts:
    """A part is what a graph that ends behind it has more than the one that ends before it."""
    numbers, kinds = {}, {}
    primitives, before = 0, Counter[str]()
    for name, part in parts.items():
        launches = dispatches(part)
        kinds[name] = Counter(launches)
        kinds[name].subtract(before)
        numbers[name] = (len(part.fused) - primitives, sum(kinds[name].values()))
        primitives, before = len(part.fused), launches
    return Counts(shape, len(full.fused), before, numbers, kinds, unknown(full), widest_sort(full))


def _without_moves(
    layers: int, caches: Any, position: mx.array, ancestors: Any, pending: Any
) -> Pass:
    """A pass that puts nothing of the one before into place, where it is the target's."""
    return Pass(caches, position, ancestors, () if len(caches) == layers else pending)


def _restored(state: step.State, values: tuple[mx.array, ...]) -> step.State:
    """The state with other arrays in it."""
    rest = iter(values)

    def again(old: Any) -> Any:
        if isinstance(old, mx.array):
            return next(rest)
        if isinstance(old, step.State):
            return step.State(*map(again, old))
        return type(old)(again(value) for value in old)

    return again(state)  # type: ignore[no-any-return]


def _leaves(tree: Any) -> list[mx.array]:
    pairs = cast(list[tuple[str, Any]], tree_flatten(tree))
    return [leaf for _, leaf in pairs if isinstance(leaf, mx.array)]


@contextlib.contextmanager
def _watched(calls: Calls, on_result: Callable[[str, Any], None]) -> Iterator[None]:
    """Within it ``on_result`` is told what every part returns."""

    def watch(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            on_result(name, result)
            return result

        return watched

    with contextlib.ExitStack() as stack:
        for owner, attribute, name in calls:
            watched = watch(getattr(owner, attribute), name)
            stack.enter_context(patch.object(owner, attribute, watched))
        yield


def _called(
    whole: Callable[..., list[mx.array]], calls: Calls, leaves: list[mx.array]
) -> list[str]:
    """The parts that this step has, in order."""
    names: list[str] = []
    with _watched(calls, lambda name, _: names.append(name)):
        graph(whole, *leaves)
    called = dict.fromkeys(names)
    return [name for name in NAMES if name in called]


def _until(
    whole: Callable[..., list[mx.array]], calls: Calls, last: str
) -> Callable[..., list[mx.array]]:
    """The step up to and including one of its parts, as a function of the same arrays."""
    wanted = NAMES[: NAMES.index(last) + 1]

    def function(*values: mx.array) -> list[mx.array]:
        kept: list[mx.array] = []

        def keep(name: str, result: Any) -> None:
            if name in wanted:
                kept.extend(_leaves(result))

        with _watched(calls, keep):
            whole(*values)
        return kept

    return function
