"""Real text to read: Python's own manual, or a file."""

from __future__ import annotations

from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation.prompts import long_text


def tokens(tokenizer: TokenizerWrapper, file: Path | None, count: int) -> list[int]:
    """The first so many tokens.

    Raises:
        OptionError: see `long_text`; fewer tokens.
    """
    found = list(tokenizer.encode(long_text(file)))
    if len(found) < count:
        raise OptionError(
            f"the text has {len(found)} tokens and {count} are needed: give a longer --text, or "
            "shorter --lengths"
        )
    return found[:count]
