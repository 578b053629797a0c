"""Sessions of past requests, for the next one that begins as one of them did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_redrafter.cache.session import Session

_TAIL = 1024  # tokens behind the shared ones that are given up rather than copied beside,
_SHARE = 4  # if that is at most a quarter of the session


@dataclass
class Prefixes:
    """Sessions that nobody uses, the one used last at the end.

    A request that goes on with a whole session gets that one, and nothing is copied; of one whose
    beginning it shares it gets a copy of that part. Models with recurrences go on from the nearest
    snapshot.

    Args:
        limit: bytes of all sessions together.
        most: sessions.

    ``queries`` counts requests, ``hits`` those that were served, ``tokens`` what these need not
    read, ``evictions`` sessions that made room, and ``held`` is `nbytes` as other threads may read
    it.
    """

    limit: int
    most: int = 32
    queries: int = 0
    hits: int = 0
    tokens: int = 0
    evictions: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        self._kept: list[Session] = []
        self._branched: set[Session] = set()  # whose beginning others share

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return sum(session.nbytes for session in self._kept)

    def take(self, prompt: Sequence[int], tag: str = "", drafted: bool = False) -> Session:
        """The session that serves a prompt best, a new one if none does; it is the request's.

        Args:
            tag: of the sparse prefill that the request asks for.
            drafted: are rows of drafters needed too?
        """
        self.queries += 1
        served = [
            (session.reach(session.shared(prompt, tag, drafted)), at)
            for at, session in enumerate(self._kept)
        ]
        best, at = max(served, default=(0, 0))
        if not best:
            return Session()
        self.hits, self.tokens = self.hits + 1, self.tokens + best
        session = self._kept.pop(at)
        behind = len(session.tokens) - best
        if behind <= min(_TAIL, len(session.tokens) // _SHARE):
            self._branched.discard(session)
            self.held = self.nbytes
            return session
        self._kept.append(session)
        self._branched.add(session)
        return session.fork(best)

    def give(self, session: Session) -> None:
        """What a request left, for others. Those that were used longest ago make room, whose
        beginning others share after the others."""
        if session.tokens and session.nbytes <= self.limit:
            self._kept.append(session)
        while len(self._kept) > self.most or self.nbytes > self.limit:
            alone = [one for one in self._kept[:-1] if one not in self._branched]
            oldest = alone[0] if alone else self._kept[0]
            self._kept.remove(oldest)
            self._branched.discard(oldest)
            self.evictions += 1
        self.held = self.nbytes

    def clear(self) -> None:
        self._kept.clear()
        self._branched.clear()
        self.held = 0
