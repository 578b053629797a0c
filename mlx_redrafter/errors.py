"""What a user can get wrong. A message says what was given, what is needed and what to run."""

from __future__ import annotations

import errno


class RedrafterError(ValueError):
    """Base of all errors that the command line shows as one line (exit code 1)."""


class ModelError(RedrafterError):
    """A target model that cannot be loaded or is not supported."""


class DrafterError(RedrafterError):
    """A drafter that cannot be loaded or does not fit the target model."""


class OptionError(RedrafterError):
    """An option with an impossible value, or a prompt that cannot be answered."""


class HubError(RedrafterError):
    """A model or drafter that cannot be found, downloaded or stored."""


class ConvertError(RedrafterError):
    """A checkpoint that cannot be read, recognised or written in another format."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def one_line(error: BaseException) -> str:
    """An error's text, short and without line breaks, to quote inside a message of ours."""
    return " ".join(str(error).split())[:160] or type(error).__name__
