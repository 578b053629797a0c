"""An answer as it streams to stdout: byte for byte on a pipe; on a terminal words stay whole and a
thought is dim."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from rich.cells import cell_len

from mlx_redrafter.terminal import console
from mlx_redrafter.text.template import markers, opens_thought

DIM_ON, DIM_OFF = "\x1b[2m", "\x1b[22m"
# Line ends, spaces and words; a wide character (Chinese, Japanese) is a word by itself.
_PARTS = re.compile(
    r"\n|[^\S\n]+|[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uffe6]|."
)
FENCE = "```"


class WordWrap:
    """Breaks lines between words, as the text comes in; a block of code keeps its own lines.

    A word is held back until it ends, or is as wide as the terminal.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._column = 0
        self._gap = self._word = ""
        self._line = ""  # what was said of this line, to know a fence
        self._code = False

    def feed(self, text: str) -> str:
        """What can be printed now."""
        done = ""
        for part in _PARTS.findall(text):
            if part == "\n":
                done += self.flush() + part
                self._code ^= self._line.lstrip().startswith(FENCE)
                self._column, self._line = 0, ""
                continue
            self._line += part
            if self._code:
                done += part
            elif part.isspace():
                done += self._whole_word()
                self._gap += part
            elif cell_len(part) > 1:
                done += self._whole_word()
                self._word = part
                done += self._whole_word()
            else:
                self._word += part
                if cell_len(self._word) >= self._width():
                    done += self._whole_word()
        return done

    def flush(self) -> str:
        """What is held back."""
        done = self._whole_word() + self._gap
        self._column += cell_len(self._gap)
        self._gap = ""
        return done

    def _whole_word(self) -> str:
        if not self._word:
            return ""
        width, size = self._width(), cell_len(self._word)
        gap = self._gap
        if self._column and self._column + cell_len(gap) + size > width:
            gap, self._column = "\n", 0
        else:
            self._column += cell_len(gap)
        self._column = (self._column + size - 1) % width + 1
        word, self._gap, self._word = self._word, "", ""
        return gap + word


class AnswerWriter:
    """Streams an answer to stdout.

    Args:
        marks: the texts that start and end a thought; None where the model has none.
        thinking: does the answer begin inside a thought, which the prompt opened?
        terminal: is stdout one?
    """

    def __init__(
        self, marks: tuple[str, str] | None, *, thinking: bool = False, terminal: bool
    ) -> None:
        self.known, self.opened = marks, thinking
        self.markers = marks if terminal else None
        self.wrap = WordWrap(lambda: shutil.get_terminal_size().columns) if terminal else None
        self.pending = ""
        self.thinking = thinking and self.markers is not None
        self.begun = False

    @classmethod
    def after(cls, tokenizer: Any, prompt: str | Sequence[int], *, terminal: bool) -> AnswerWriter:
        """For the answer to a prompt."""
        opened = opens_thought(tokenizer, prompt)
        return cls(markers(tokenizer), thinking=opened, terminal=terminal)

    def in_thought(self, answer: str) -> bool:
        """Does the answer end before the thought does?"""
        if self.known is None:
            return False
        start, end = (answer.rfind(marker) for marker in self.known)
        return start > end or (self.opened and end < 0)

    def write(self, text: str) -> None:
        """Print a segment; what may be the first half of a marker waits for the next one."""
        if self.thinking and not self.begun:
            console.write(DIM_ON)
        self.begun = True
        if self.markers is None:
            self._print(text)
            return
        self.pending += text
        while True:
            marker = self.markers[self.thinking]
            head, found, tail = self.pending.partition(marker)
            if not found:
                break
            self._print(head if not self.thinking else head + marker)
            self._style(DIM_OFF if self.thinking else DIM_ON)
            if not self.thinking:
                self._print(marker)
            self.thinking = not self.thinking
            self.pending = tail
        held = _overlap(self.pending, marker)
        self._print(self.pending[: len(self.pending) - held])
        self.pending = self.pending[len(self.pending) - held :]

    def close(self) -> None:
        """Print what waits and leave the terminal as it was."""
        self._print(self.pending)
        self._style(DIM_OFF if self.thinking and self.begun else "")
        self.pending, self.thinking = "", False

    def _print(self, text: str) -> None:
        if shown := self.wrap.feed(text) if self.wrap is not None else text:
            console.write(shown)

    def _style(self, sequence: str) -> None:
        held = self.wrap.flush() if self.wrap is not None else ""
        if held + sequence:
            console.write(held + sequence)


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`."""
    return next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)
