"""Is a text that a model wrote as a user's turn one that a user might ask?"""

from __future__ import annotations

import re

# A sentence's end: not that of "1." or of "e.g.", and with nothing but space behind it.
_END = re.compile(r"(?<![\s\d.])(?<!\b\w)[.!?…][\"'”’)\]*]*(?=\s|$)|[。！？؟।]")
_FENCE = "```"
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

    What is not ``whole`` was cut off, and is cut back to its last whole sentence. A fragment is
    left out: hardly a word or a letter, one thing again and again, the middle of a text, code that
    is opened and not closed; and what goes on as the assistant.
    """
    text = text.strip()
    if not whole:
        ends = [m.end() for m in _END.finditer(text)]
        text = text[: ends[-1]] if ends else ""
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


def _repeats(text: str) -> bool:
    """Does it say one thing again and again? Seen by its pieces, in any language."""
    pieces = [text[i : i + _WINDOW] for i in range(len(text) - _WINDOW + 1)]
    return len(set(pieces)) < _LEAST_DIFFERENT * len(pieces)
