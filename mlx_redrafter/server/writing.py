"""From the tokens of an answer to the events that its client is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_redrafter.server.events import Drawn, Event, Finished, Progress, Reason, Usage
from mlx_redrafter.server.reader import Reader
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.server.tally import Tally
from mlx_redrafter.server.trees import Spell, shown
from mlx_redrafter.text.answer import GenerationResponse


class Writing:
    """Makes events of one answer's tokens.

    Args:
        tell: takes them.
        tally: counts the answer.
        spell: makes text of tokens, where trees are wanted.
    """

    def __init__(
        self, asked: Generation, tell: Callable[[Event], None], tally: Tally, spell: Spell = str
    ) -> None:
        self.asked, self.tell, self.tally, self.spell = asked, tell, tally, spell
        self._tree: dict[str, Any] | None = None
        self._reader, self._thoughts = Reader(asked.reading), 0
        self._drawn: list[tuple[str, bool]] = []

    def take(self, last: GenerationResponse) -> Finished | None:
        """The next token; the end, where the answer is over."""
        reader = self._reader
        self.tally.take(last)
        self._thoughts += reader.thinking
        reader.add(last.text)
        self._drawn.append((last.text, last.from_draft))
        if last.tree is not None:
            self._tree = shown(last.tree, self.spell)
        ended = last.finish_reason is not None
        if last.from_draft and not ended:
            return None  # the step is not over
        if self.asked.tokens:
            clock = last.stats.decode_seconds if self.asked.alone else None
            self.tell(Drawn(tuple(self._drawn), self._tree, clock))
        self._drawn.clear()
        if ended:
            reader.end()
        for event in reader.taken():
            self.tell(event)
        if not ended and not reader.done:
            return None
        reason: Reason = "length" if last.finish_reason == "length" else "stop"
        usage = Usage(
            prompt=last.prompt_tokens,
            completion=last.generation_tokens,
            cached=self.tally.cached,
            reasoning=self._thoughts,
            prediction=len(self.asked.prediction) if last.stats.drafted else 0,
            seed=self.asked.sampling.seed,
            seconds=self.tally.decoding,
            stats=last.stats,
        )
        end = Finished("tool_calls" if reader.called else reason, usage, last.stop)
        self.tell(end)
        return end

    def progress(self, done: int, total: int) -> None:
        """So many tokens of the prompt are read."""
        self.tally.progress(done)
        self.tell(Progress(done, total))
