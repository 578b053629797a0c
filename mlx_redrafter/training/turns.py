"""Is a text that a model wrote as a user's turn one that a user might ask?"""

from __future__ import annotations

import re

# A sentence's end: not that of "1." or of "e.g.", and with nothing but space behind it.
_END = re.compile(r"(?<![\s\d.])(?<!\b\w)[.!?…][\"'”’)\]*]*(?=\s|$)|[。！？؟।]")
_LINE_OVER = re.compile(r"[ \t]*\n")
_FENCE = "```"
_CODE = re.compile(
    r"\s*(import|from|def|class|return|public|private|package|assert|if|for|#include|//)\b"
    r"|.*[;{}()\[\],]\s*$|\s*[\w.\[\]]+ = "
)
_LETTERS = 4  # in a turn, at least
_WORDS = 3
_WINDOW = 8  # characters of the pieces that are counted
_LEAST_LETTERS, _LEAST_DIFFERENT = 0.4, 0.5  # shares
_BEGINS_INSIDE = ",.;:!?)]}%&|=+»”"
_ANSWERS = re.compile(
    r"(sure|certainly|of course|absolutely|here is|here's|here are|below is|as an ai|"
    r"i'd be happy|i'm happy to|i am happy to|i'm sorry|i am sorry|i apologi[sz]e|"
    r"thank you for your (question|message)|great question|yes, |no, )\b",
    re.IGNORECASE,
)
_SPEAKER = re.compile(
    r"^\W*(assistant|user|system|human|ai|bot|answer|response)\W*(:|$)", re.I | re.M
)


def usable(text: str, whole: bool) -> str | None:
    """The turn; None if nobody would ask that.

    What is not ``whole`` was cut off, and is cut back to whole sentences. A fragment is left out:
    hardly a word or a letter, one thing again and again, the middle of a text, code that is opened
    and not closed or was cut off; and what begins as the assistant would.
    """
    text = text.strip()
    if not whole:
        text = "" if _is_code(text) else _cut(text)
    letters = sum(c.isalpha() for c in text)
    if letters < _LETTERS or letters < _LEAST_LETTERS * len("".join(text.split())):
        return None
    if text.isascii() and len(re.findall(r"\w+", text)) < _WORDS:
        return None
    if text[0] in _BEGINS_INSIDE or text.count(_FENCE) % 2 or _repeats(text):
        return None
    if _ANSWERS.match(text) or _SPEAKER.search(text):
        return None
    return text


def _cut(text: str) -> str:
    """The first lines that end with a sentence, for a model that does not find an end goes on with
    the answer; else as many sentences as are whole."""
    ends = [m.end() for m in _END.finditer(text)]
    of_lines = [end for end in ends if _LINE_OVER.match(text, end)]
    return text[: of_lines[0] if of_lines else ends[-1]] if ends else ""


def _is_code(text: str) -> bool:
    """Is it code, most of it, that nobody says anything about?"""
    lines = [line for line in text.split(_FENCE)[0].splitlines() if line.strip()]
    return len(lines) > 2 and sum(map(bool, map(_CODE.match, lines))) > len(lines) / 2


def _repeats(text: str) -> bool:
    """Does it say one thing again and again? Seen by its pieces, in any language."""
    pieces = [text[i : i + _WINDOW] for i in range(len(text) - _WINDOW + 1)]
    return len(set(pieces)) < _LEAST_DIFFERENT * len(pieces)
