"""What is kept of a conversation, and how it was read."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from mlx.utils import tree_map

from mlx_redrafter.cache.layer import Kept, LayerCache, grown, new_caches
from mlx_redrafter.cache.ring import ring_of
from mlx_redrafter.cache.slabs import capacity_for
from mlx_redrafter.cache.snapshots import Snapshots, limit_of, nbytes
from mlx_redrafter.errors import OptionError

BETWEEN_SNAPSHOTS = 512  # tokens of a prompt, at least
UNKNOWN = -1  # a stand, while a step is in flight


@dataclass(eq=False)  # arrays have no truth: sessions are told apart, not compared
class Session:
    """The layers' caches of a conversation and the tokens that are in them.

    Give the same session to the next request: the prefix that both prompts share is not read
    again. It serves one model, and one request at a time.

    ``tag`` names the sparse prefill that read it from position ``sparse_from`` on; it is empty
    where everything was read densely. ``stand`` is how many tokens the layers that cannot be cut
    anywhere hold, and ``snapshots`` are those layers' arrays at earlier stands. ``covered`` is how
    many tokens the rows of drafters are there for: an answer may have done without them.
    ``furthest`` is where rows were written up to, and ``rings`` are the rings of windows as they
    were at the end of the last prompt: back to it a session can be cut wherever the answer went.

    ``forked`` is told of copies: (this one, the copy, its length).

    ``snapshot_bytes`` is what all snapshots may take; None: a sixteenth of the machine's memory.
    """

    tokens: list[int] = field(default_factory=list)
    caches: list[Kept] = field(default_factory=list)
    tag: str = ""
    sparse_from: int = 0
    kinds: Sequence[LayerCache] = ()
    stand: int = 0
    covered: int = 0
    furthest: int = 0
    rings: tuple[int, dict[int, Kept]] = (0, {})
    snapshot_bytes: int | None = None
    forked: Callable[[Session, Session, int], None] | None = field(
        default=None, repr=False, compare=False
    )
    snapshots: Snapshots = field(init=False)
    _dtype: mx.Dtype = field(default=mx.float32, init=False, repr=False)
    _target: weakref.ref[object] | None = field(default=None, init=False, repr=False, compare=False)
    _drafters: list[weakref.ref[object]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    _taken: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.snapshots = Snapshots(limit_of(self.snapshot_bytes))

    @contextlib.contextmanager
    def taken(self, target: object, drafters: Sequence[object] = ()) -> Iterator[None]:
        """Within, the session is the request's that runs on ``target``, with the rows of
        ``drafters`` that keep some; it is cleared if they are not those of before.

        Raises:
            OptionError: another request has it, or it holds what another model computed.
        """
        self.check(target)
        before = [drafter() for drafter in self._drafters]
        if [id(d) for d in before] != [id(d) for d in drafters]:
            self.clear()
        self._target, self._drafters = weakref.ref(target), [weakref.ref(d) for d in drafters]
        self._taken = True
        try:
            yield
        finally:
            self._taken = False

    def check(self, target: object) -> None:
        """Raise OptionError where `taken` would."""
        if self._taken:
            raise OptionError(
                "the session is in use by another answer: read that one to its end or close it, "
                "or give a Session() of its own"
            )
        if self._target is not None and self._target() is not target and self.caches:
            raise OptionError(
                "the session belongs to another model: give every loaded model its own Session()"
            )

    def open(self, kinds: Sequence[LayerCache], capacity: int, dtype: mx.Dtype) -> Session:
        """Make the caches of a model, or room in those that are there; itself."""
        self.kinds, self._dtype = kinds, dtype
        if not self.caches:
            self.caches = new_caches(kinds, capacity, dtype)
        else:
            self.caches = grown(kinds, self.caches, capacity)
        return self

    def take(self) -> list[Kept]:
        """The caches, for a pass that writes into them: they must have no other owner."""
        caches, self.caches = self.caches, []
        return caches

    def holds(
        self,
        tokens: Sequence[int],
        caches: list[Kept],
        stand: int,
        covered: int | None = None,
        furthest: int = 0,
    ) -> None:
        """What an answer left behind, which is cut to what every layer can give. covered: None:
        all of it. furthest: where the rows of its trees ended."""
        self.tokens[:], self.caches, self.stand = tokens, caches, stand
        self.furthest = max(self.furthest, furthest)
        self.covered = len(tokens) if covered is None else covered
        self.trim(len(tokens))
        self.mark()

    def mark(self, turn: bool = True) -> None:
        """Take a snapshot of the layers that could not be brought back here otherwise; turn: a
        prompt or an answer ends here."""
        kept = {i: self.caches[i] for i in self._fixed()}
        if kept and self.stand > 0:
            self.snapshots.add(self.stand, kept, turn)

    def mark_within(self) -> None:
        """The same within a prompt, where the one before is far enough back."""
        if self.stand - max(self.snapshots, default=0) >= BETWEEN_SNAPSHOTS:
            self.mark(turn=False)

    def hold_rings(self) -> None:
        """A prompt was read: its windows are kept as they are now."""
        rings = {i: self.caches[i] for i, kind in enumerate(self.kinds) if ring_of(kind)}
        self.rings = (len(self.tokens), rings)

    def trim(self, length: int) -> None:
        """Forget everything from position ``length`` on, and more where a layer can only go back to
        a snapshot, or to the end of the last prompt."""
        length = self._stand_at(self._unbroken(min(length, len(self.tokens))))
        del self.tokens[length:]
        self.covered = min(self.covered, length)
        if length <= self.sparse_from:
            self.tag, self.sparse_from = "", 0

    def reach(self, length: int) -> int:
        """How many tokens `trim` would leave of so many."""
        length = min(length, len(self.tokens))
        if not self._intact(length):
            length = self.rings[0] if self.rings[0] <= length else 0
        if self._fixed() and not 0 <= self.stand <= length:
            length = max((stand for stand in self.snapshots if stand <= length), default=0)
        return length

    def fork(self, length: int) -> Session:
        """Another session that goes on from the first ``length`` tokens, or from fewer; this one
        stays as it is. Its slabs are copies, cut to what they hold."""
        other = copy.copy(self)
        other.tokens, other.caches = list(self.tokens), list(self.caches)
        other.rings, other.snapshots = (self.rings[0], {**self.rings[1]}), self.snapshots.copied()
        other._drafters = list(self._drafters)
        other.trim(length)
        room = capacity_for(max(1, len(other.tokens)))
        other.caches = [
            kept if (kind.capacity(kept) or 0) <= room else _cut(kept, room)
            for kind, kept in zip(self.kinds, other.caches, strict=False)
        ]
        mx.eval(other.caches)
        if self.forked is not None:
            self.forked(self, other, length)
        return other

    @property
    def nbytes(self) -> int:
        """Memory of everything that is kept."""
        return nbytes(self.caches) + nbytes(self.rings[1]) + self.snapshots.nbytes

    def clear(self) -> None:
        self.tokens.clear()
        self.furthest, self.rings = 0, (0, {})
        self.snapshots.clear()
        self.caches, self.stand, self.covered = [], 0, 0
        self.tag, self.sparse_from = "", 0

    def keep_shared(self, prompt: Sequence[int], tag: str, drafted: bool = False) -> None:
        """Forget what does not serve a request."""
        self.trim(self.shared(prompt, tag, drafted))

    def shared(self, prompt: Sequence[int], tag: str, drafted: bool = False) -> int:
        """Tokens that serve a request: the prompt begins with them, they were not read by another
        sparse prefill, and if drafters' rows are needed these are there. What was read densely
        serves every request."""
        # The drafter needs the hidden state before the root: one token is always read.
        limit = max(0, min(len(self.tokens), len(prompt) - 2))
        if self.tag not in ("", tag):
            limit = min(limit, self.sparse_from)
        # Drafted or not, the same is read again: after a sparse prefill it may be read otherwise.
        ahead = max((kind.ahead for kind in self.kinds), default=0)
        if drafted:
            limit = min(limit, self.covered)
        known = len(self.tokens)
        pairs = zip(self.tokens, prompt, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(known, len(prompt)))
        return max(0, min(limit, same - ahead))

    def read_sparsely(self, tag: str, start: int) -> None:
        """Note that position ``start`` and what follows is about to be read so."""
        if not self.tag:
            self.tag, self.sparse_from = tag, start

    def _fixed(self) -> list[int]:
        """The layers that cannot be cut anywhere."""
        return [i for i, kind in enumerate(self.kinds) if not kind.cuts_anywhere]

    def _unbroken(self, length: int) -> int:
        """A number of tokens, at most ``length``, whose windows are all there."""
        held, saved = self.rings
        if held > length:
            held, saved = self.rings = (0, {})
        if self._intact(length):
            return length
        for i, kept in saved.items():
            self.caches[i] = kept
        self.furthest = held
        return held

    def _intact(self, length: int) -> bool:
        """Is all there that the windows of a token at this position show?"""
        for kind, kept in zip(self.kinds, self.caches, strict=False):
            ring = ring_of(kind)
            closed = ring is not None and kind.capacity(kept) is None
            if ring is not None and closed and not ring.intact(self.furthest, length):
                return False
        return True

    def _stand_at(self, length: int) -> int:
        """Bring every layer to one number of tokens, at most ``length``: that number."""
        fixed = self._fixed()
        if not fixed:
            return length
        if 0 <= self.stand <= length:
            return self.stand
        stand = self.snapshots.cut(length)
        for i in fixed:
            before = (
                self.kinds[i].empty(1, self._dtype) if stand is None else self.snapshots[stand][i]
            )
            self.caches[i] = before
        self.stand = stand or 0
        return self.stand


def _cut(kept: Kept, room: int) -> Kept:
    """Arrays (1, *, C, *) with fewer slots, which hold nothing of the larger ones."""
    return tree_map(lambda array: mx.contiguous(array[:, :, :room]), kept)
