"""Reading a prompt into a session's slabs, chunk by chunk, densely or sparsely."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import mlx.core as mx

from mlx_redrafter.models import Decoder, cache
from mlx_redrafter.prefill.config import SparsePrefill
from mlx_redrafter.prefill.session import Session
from mlx_redrafter.prefill.sparse import SparseAttention

Progress = Callable[[int, int], None]
Hidden = tuple[mx.array, tuple[mx.array, ...]]


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


def read(
    target: Decoder,
    prompt: Sequence[int],
    session: Session,
    step: int,
    *,
    layers: Sequence[int] = (),
    sparse: SparseAttention | None = None,
    progress: Progress | None = None,
) -> Hidden:
    """Read what the session lacks of all but the last token; it has room for it.

    Args:
        step: tokens of a pass.
        layers: indices of blocks whose output is wanted too.
        sparse: None: everything is read densely.
        progress: called before each pass and at the end with (tokens read, tokens in the prompt).

    Returns:
        hidden (1, D) of the last token read, after the final norm, and the wanted outputs (1, D).
    """
    hidden = mx.zeros((1, target.config.hidden_size), target.dtype)
    inner = tuple(hidden for _ in layers)
    options = sparse.options if sparse is not None else None
    for part in parts(len(session.tokens), len(prompt), step, options):
        if progress is not None:
            progress(part.start, len(prompt))
        chunk = list(prompt[part.start : part.stop])
        if sparse is None or part.dense:
            hidden, inner = _dense(target, chunk, session, layers)
        else:
            hidden, inner = _sparse(target, chunk, session, layers, sparse)
        session.tokens.extend(chunk)
        if sparse is not None:
            sparse.count(part.start, part.stop, part.dense)
    if progress is not None:
        progress(len(prompt), len(prompt))
    return hidden, inner


def _inputs(chunk: list[int], session: Session) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Tokens (n,), positions (n,), mask (n, S), slots (S,) of a chunk."""
    done, capacity = len(session.tokens), session.kv[0].shape[2]
    positions = mx.arange(done, done + len(chunk), dtype=mx.int32)
    # Slots past the chunk are empty: attention reads a bucket's worth and not all of them.
    filled = mx.arange(min(cache.bucket(done + len(chunk)), capacity), dtype=mx.int32)
    return mx.array(chunk, mx.int32), positions, filled[None] <= positions[:, None], filled


def _dense(target: Decoder, chunk: list[int], session: Session, layers: Sequence[int]) -> Hidden:
    write = cache.Append(mx.array([len(session.tokens)], mx.int32))
    hidden, inner, session.kv = target(*_inputs(chunk, session), session.kv, write, layers)
    hidden, inner = hidden[-1:], tuple(x[-1:] for x in inner)
    mx.eval(hidden, inner, session.kv)
    return hidden, inner


def _sparse(
    target: Decoder,
    chunk: list[int],
    session: Session,
    layers: Sequence[int],
    sparse: SparseAttention,
) -> Hidden:
    done = len(session.tokens)
    write = cache.Append(mx.array([done], mx.int32))
    session.read_sparsely(sparse.options.tag, done)
    inputs = _inputs(chunk, session)
    kv, session.kv = Given(session.kv), []
    try:
        hidden, inner, new = target(*inputs, kv, write, layers, sparse.at(done))
        hidden, inner = hidden[-1:], tuple(x[-1:] for x in inner)
        mx.eval(hidden, inner, new)
    except BaseException:
        session.clear()  # some of its slabs are gone
        raise
    session.kv = new
    return hidden, inner


class Given(Sequence[mx.array]):
    """Slabs, each for whoever asks first. A selector evaluates its layer within the pass: another
    name for the slab before it would make MLX copy all of it."""

    def __init__(self, slabs: list[mx.array]) -> None:
        self.slabs: dict[int, mx.array] = dict(enumerate(slabs))

    @overload
    def __getitem__(self, index: int) -> mx.array: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[mx.array]: ...

    def __getitem__(self, index: int | slice) -> mx.array | Sequence[mx.array]:
        assert isinstance(index, int)
        return self.slabs.pop(index)

    def __len__(self) -> int:
        return len(self.slabs)
