"""From the text of an answer to events: thoughts, text, and calls of tools.

The markers are matched on text, so that they may come in any pieces; whatever may still become one
is held back. The automaton is mlx_lm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import TextStateMachine

from mlx_redrafter.server.events import Call, Event, Reasoning, Text
from mlx_redrafter.server.tools import Tool, ToolFormat

TEXT, THOUGHT, TOOL = "text", "thought", "tool"


@dataclass(frozen=True)
class Reading:
    """What the text of an answer means.

    Args:
        thoughts: what opens and closes a thought; None: nothing does.
        opened: the prompt ended within a thought.
        tools: those that may be called; none: no call is looked for.
        calls: how they are written.
        one_call: the answer ends with the first call.
    """

    thoughts: tuple[str, str] | None = None
    opened: bool = False
    tools: Sequence[Tool] = ()
    calls: ToolFormat | None = None
    one_call: bool = False


class Reader:
    """Reads one answer, piece by piece."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.format = reading.calls if reading.tools else None
        self.called = False  # was a call found?
        self.thinking = reading.opened and reading.thoughts is not None
        self._automaton: Any = self._machine().make_state(THOUGHT if self.thinking else TEXT)
        self._state = self._automaton[0]
        self._call = ""  # text since the call was opened
        self._held = ""  # white space that is dropped if a call or nothing follows
        self._whole = self.format is not None and not self.format.start
        self._fresh = self.thinking  # white space comes to nothing here
        self._events: list[Event] = []

    def _machine(self) -> TextStateMachine:
        to: dict[str, list[tuple[str, str]]] = {TEXT: [], THOUGHT: [], TOOL: []}
        if self.reading.thoughts is not None:
            opening, closing = self.reading.thoughts
            to[TEXT].append((opening, THOUGHT))
            to[THOUGHT].append((closing, TEXT))
        if self.format is not None and self.format.start:
            to[TEXT].append((self.format.start, TOOL))
            if self.format.end:
                to[TOOL].append((self.format.end, TEXT))
        return TextStateMachine(to)

    @property
    def done(self) -> bool:
        """Has the answer all that it may have?"""
        return self.called and self.reading.one_call

    def add(self, text: str) -> None:
        """The next piece of text."""
        self._automaton, segments = TextStateMachine.split(self._automaton, text)
        for state, piece in segments:
            self._enter(state)
            self._take(piece)
        self.thinking = self._state == THOUGHT

    def end(self) -> None:
        """The answer is over: nothing is held back any more."""
        self._automaton, rest, _ = TextStateMachine.flush(self._automaton)
        self._take(rest)
        if self._state == TOOL:
            assert self.format is not None
            if self.format.end:
                self._emit(Text, self.format.start + self._call)  # a call that was cut off
            else:
                self._close_call()
        elif self._whole:
            self._close_call()
        elif self._held and not self.called:
            self._emit(Text, self._held)
        self._held = ""

    def taken(self) -> list[Event]:
        """What has been read since the last time."""
        events, self._events = self._events, []
        return events

    def _enter(self, state: str) -> None:
        if state == self._state:
            return
        before, self._state = self._state, state
        if before == TOOL:
            self._close_call()
        if state == TOOL:
            self._held = ""
        self._fresh = self._fresh or TOOL not in (before, state) or before == TOOL

    def _take(self, piece: str) -> None:
        if self._state == TOOL or (self._whole and self._state == TEXT):
            self._call += piece
            if self._whole and not _may_be_call(self._call):
                self._whole, text, self._call = False, self._call, ""
                self._shown(text)
        elif piece:
            self._shown(piece)

    def _shown(self, piece: str) -> None:
        if self._fresh:
            piece = piece.lstrip()
            self._fresh = not piece
        if self._state == THOUGHT:
            self._emit(Reasoning, piece)
            return
        if self.format is not None:
            piece = self._held + piece
            kept = piece.rstrip()
            self._held, piece = piece[len(kept) :], kept
        self._emit(Text, piece)

    def _emit(self, kind: type[Text] | type[Reasoning], piece: str) -> None:
        if not piece:
            return
        if self._events and type(last := self._events[-1]) is kind:
            self._events[-1] = kind(last.text + piece)
        else:
            self._events.append(kind(piece))

    def _close_call(self) -> None:
        assert self.format is not None
        text, self._call = self._call, ""
        calls: list[Call] = self.format.calls(text, self.reading.tools) if text else []
        if calls:
            self.called = True
            self._events += calls[:1] if self.reading.one_call else calls
        elif text:
            self._emit(Text, self.format.start + text + self.format.end)


def _may_be_call(text: str) -> bool:
    """Where a whole answer is a call: may this be the beginning of one?"""
    start = text.lstrip()
    return any(start.startswith(mark) or mark.startswith(start) for mark in ("{", "<|python_tag|>"))
