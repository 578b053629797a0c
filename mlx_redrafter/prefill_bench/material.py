"""Real text to read: Python's own manual, or a file."""

from __future__ import annotations

from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import OptionError

TOPICS = "pydoc_data.topics"  # ships with every CPython, some 100,000 tokens


def text(file: Path | None) -> str:
    """What a file says, or the topics of Python's help() in alphabetical order.

    Raises:
        OptionError: no such file, not UTF-8.
    """
    if file is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"--text {file} cannot be read ({reason}): give a text file") from None


def tokens(tokenizer: TokenizerWrapper, file: Path | None, count: int) -> list[int]:
    """The first so many tokens.

    Raises:
        OptionError: see `text`; fewer tokens.
    """
    found = list(tokenizer.encode(text(file)))
    if len(found) < count:
        raise OptionError(
            f"the text has {len(found)} tokens and {count} are needed: give a longer --text, or "
            "shorter --lengths"
        )
    return found[:count]
