"""Reading a prompt into a session's slabs, chunk by chunk, densely or sparsely."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import mlx.core as mx

from mlx_redrafter.cache.layer import Kept, Pass, capacity_of
from mlx_redrafter.cache.session import Session
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.models import Target
from mlx_redrafter.models.attention import causal
from mlx_redrafter.models.decoder import Functions
from mlx_redrafter.models.features import Chunk, Features
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.sparse import SparseAttention
from mlx_redrafter.runtime.device import fused_kernels

Progress = Callable[[int, int], None]
P = ParamSpec("P")
T = TypeVar("T")
Absorb = Callable[[Chunk, Sequence[Kept]], list[Kept]]
USUAL = 512  # tokens of a pass


@dataclass(frozen=True)
class Part:
    """Prompt tokens start..stop-1, read in one pass; ``dense`` says why not sparsely."""

    start: int
    stop: int
    dense: str = ""


def parts(
    start: int, prompt: int, step: int, options: SparsePrefill | None = None
) -> Iterator[Part]:
    """The passes that read a prompt of so many tokens from ``start`` on, but for its last token.

    Sparse ones begin and end at multiples of the block; what is before the least context, or
    before the first such multiple behind a reused prefix, and the tail of the prompt are dense.
    """
    total = prompt - 1
    if options is None:
        yield from _split(start, total, step, "off")
        return
    block = options.block
    first = _up(max(start, options.min_context), block)
    last = (prompt - options.tail) // block * block if options.tail else total // block * block
    if first >= last:
        short = prompt <= options.min_context
        yield from _split(start, total, step, "short context" if short else "dense tail")
        return
    early = "short context" if start < options.min_context else "not whole blocks"
    yield from _split(start, first, step, early)
    yield from _split(first, last, max(block, step // block * block), "")
    yield from _split(last, total, step, "dense tail" if options.tail else "not whole blocks")


def _split(start: int, stop: int, step: int, dense: str) -> Iterator[Part]:
    for at in range(start, stop, step):
        yield Part(at, min(at + step, stop), dense)


def _up(n: int, block: int) -> int:
    return -(-n // block) * block


def reading(
    target: Target,
    prompt: Sequence[int],
    session: Session,
    step: int,
    *,
    layers: Sequence[int] = (),
    absorb: Absorb | None = None,
    sparse: SparseAttention | None = None,
    progress: Progress | None = None,
    beside: Iterable[None] = (),
) -> Generator[None, None, Features]:
    """Read what the session lacks of all but the last token, a pass from one step of the iteration
    to the next; it has room for it.

    Args:
        step: tokens of a pass.
        layers: indices of blocks whose output is wanted too.
        absorb: adds a part to the caches behind the target's, if the session has more.
        sparse: None: everything is read densely.
        progress: called before each pass and at the end with (tokens read, tokens in the prompt).
        beside: what the host does while a GPU reads, a step of it with every pass.

    Returns:
        features (1, D) of the last token read: after the final norm, and the wanted outputs.
    """
    nothing = mx.zeros((1, target.config.hidden_size), target.dtype)
    found = Features(nothing, tuple(layers), (nothing,) * len(layers))
    options = sparse.options if sparse is not None else None
    meanwhile = iter(beside)
    for part in parts(len(session.tokens), len(prompt), step, options):
        if progress is not None:
            progress(part.start, len(prompt))
        chunk = list(prompt[part.start : part.stop + 1])
        dense = part.dense or (sparse.unable if sparse is not None else "")
        found = _read(target, chunk, session, layers, absorb, None if dense else sparse, meanwhile)
        if sparse is not None:
            sparse.count(part.start, part.stop, dense)
        yield
    if progress is not None:
        progress(len(prompt), len(prompt))
    session.mark()
    session.hold_rings()
    return found


def at_once(steps: Callable[P, Generator[None, None, T]]) -> Callable[P, T]:
    """What goes step by step, without a stop."""

    @functools.wraps(steps)
    def run(*args: P.args, **more: P.kwargs) -> T:
        going = steps(*args, **more)
        while True:
            try:
                next(going)
            except StopIteration as end:
                return cast(T, end.value)

    return run


read = at_once(reading)


def _inputs(chunk: list[int], session: Session) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Tokens (n,), positions (n,), mask (n, S), slots (S,) of a chunk."""
    done, room = len(session.tokens), capacity_of(session.kinds, session.caches)
    positions = mx.arange(done, done + len(chunk), dtype=mx.int32)
    # Slots past the chunk are empty: attention reads a capacity's step more and not all of them.
    needed = capacity_for(done + len(chunk))
    filled = mx.arange(needed if room is None else min(needed, room), dtype=mx.int32)
    return mx.array(chunk, mx.int32), positions, filled[None] <= positions[:, None], filled


def _read(
    target: Target,
    chunk: list[int],
    session: Session,
    layers: Sequence[int],
    absorb: Absorb | None,
    sparse: SparseAttention | None,
    meanwhile: Iterator[None],
) -> Features:
    """One pass over all but the last token. A selector evaluates its layer within it: a slab that
    had another owner would be copied, so the session gives its caches away for a sparse one."""
    done = len(session.tokens)
    if sparse is None:
        functions = Functions(causal(done + len(chunk) - 1, target.config))
    else:
        functions = Functions(sparse.at(done))
    inputs = _inputs(chunk[:-1], session)
    if sparse is not None:
        session.read_sparsely(sparse.options.tag, done)
    before = session.caches if sparse is None else session.take()
    own = len(target.caches)
    caches, others = Pass(before[:own], mx.array([done], mx.int32)), before[own:]
    del before
    try:
        hidden, outputs = target(*inputs, caches, layers, functions)
        if absorb is not None:
            read = Features(hidden, tuple(layers), outputs)
            following = mx.array(chunk[1:], mx.int32)
            others = absorb(Chunk(inputs[0], following, inputs[1], read), others)
        found = Features(hidden[-1:], tuple(layers), tuple(x[-1:] for x in outputs))
        session.caches = [*caches.caches, *others]  # before they are written: no other owner
        if fused_kernels():
            mx.async_eval(found.hidden, found.outputs, session.caches)
            next(meanwhile, None)
        mx.eval(found.hidden, found.outputs, session.caches)
    except BaseException:
        if sparse is not None:
            session.clear()  # some of its slabs are gone
        raise
    session.tokens.extend(chunk[:-1])
    session.stand = len(session.tokens)
    session.furthest = max(session.furthest, session.stand)
    if absorb is not None or not others:
        session.covered = session.stand
    session.mark_within()
    return found
