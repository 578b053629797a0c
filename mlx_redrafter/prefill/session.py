"""The KV cache of a conversation, and how it was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx


@dataclass
class Session:
    """The KV cache of a conversation and the tokens that are in it.

    Give the same session to the next request: the beginning that both prompts share is not read
    again. Not to be used by two requests at a time.

    ``tag`` names the sparse prefill that read it from position ``sparse_from`` on; it is empty
    where everything was read densely.
    """

    tokens: list[int] = field(default_factory=list)
    kv: list[mx.array] = field(default_factory=list)
    tag: str = ""
    sparse_from: int = 0

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
