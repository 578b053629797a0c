"""The KV cache of a conversation, and how it was read."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_redrafter.errors import OptionError


@dataclass
class Session:
    """The KV cache of a conversation and the tokens that are in it.

    Give the same session to the next request: the prefix that both prompts share is not read
    again. It serves one model, and one request at a time.

    ``tag`` names the sparse prefill that read it from position ``sparse_from`` on; it is empty
    where everything was read densely.
    """

    tokens: list[int] = field(default_factory=list)
    kv: list[mx.array] = field(default_factory=list)
    tag: str = ""
    sparse_from: int = 0
    _target: weakref.ref[object] | None = field(default=None, init=False, repr=False, compare=False)
    _taken: bool = field(default=False, init=False, repr=False, compare=False)

    @contextlib.contextmanager
    def taken(self, target: object) -> Iterator[None]:
        """Within, the session is the request's that runs on ``target``.

        Raises:
            OptionError: another request has it, or it holds what another model computed.
        """
        self.check(target)
        self._target, self._taken = weakref.ref(target), True
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
        if self._target is not None and self._target() is not target and self.kv:
            raise OptionError(
                "the session belongs to another model: give every loaded model its own Session()"
            )

    def trim(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        del self.tokens[length:]
        if length <= self.sparse_from:
            self.tag, self.sparse_from = "", 0

    def clear(self) -> None:
        self.trim(0)
        self.kv.clear()

    def keep_shared(self, prompt: Sequence[int], tag: str) -> None:
        """Forget what does not serve a request."""
        self.trim(self.shared(prompt, tag))

    def shared(self, prompt: Sequence[int], tag: str) -> int:
        """Tokens that serve a request: the prompt begins with them, and they were not read by
        another sparse prefill. What was read densely serves every request."""
        # The drafter needs the hidden state before the root: one token is always read.
        limit = max(0, min(len(self.tokens), len(prompt) - 2))
        if self.tag not in ("", tag):
            limit = min(limit, self.sparse_from)
        pairs = zip(self.tokens[:limit], prompt, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), limit)

    def read_sparsely(self, tag: str, start: int) -> None:
        """Note that position ``start`` and what follows is about to be read so."""
        if not self.tag:
            self.tag, self.sparse_from = tag, start
