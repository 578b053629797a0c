"""Values that a caller hands in: brought into one form, or refused in one style."""

from __future__ import annotations

import numbers
import reprlib
from typing import Any

from mlx_redrafter.errors import OptionError


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number from ``low`` to ``high``, NumPy's too. Raises OptionError."""
    given = _scalar(value)
    fits = isinstance(given, numbers.Real) and not isinstance(given, bool)
    if not fits:
        raise OptionError(f"{name} {shown(value)} is not a number: use {low} to {high}")
    if not low <= given <= high:  # also refuses NaN
        raise OptionError(f"{name} {given} is not possible: use {low} to {high}")
    return float(given)


def whole(name: str, value: Any, low: int, high: int | None = None, use: str = "") -> int:
    """A whole number, NumPy's or 3.0 too. ``use`` replaces the range in the message.

    Raises OptionError.
    """
    given = _scalar(value)
    use = use or (f"{low} or more" if high is None else f"{low} to {high}")
    fits = isinstance(given, numbers.Integral) or (isinstance(given, float) and given.is_integer())
    if isinstance(given, bool) or not fits:
        raise OptionError(f"{name} {shown(value)} is not a whole number: use {use}")
    if given < low or (high is not None and given > high):
        raise OptionError(f"{name} {given} is not possible: use {use}")
    return int(given)


def at_least(least: int, **given: int | None) -> None:
    """Refuse a whole number below ``least``; None is one that was not given. Raises OptionError."""
    for name, value in given.items():
        if value is not None:
            whole(name, value, least)


def checked_text(text: str, what: str) -> str:
    """The text, if all of it can be encoded. Raises OptionError."""
    try:
        text.encode()
    except UnicodeError:
        raise OptionError(f"the {what} is not UTF-8 text: convert it first (iconv)") from None
    return text


def shown(value: Any) -> str:
    """A value in a message: short, on one line."""
    return " ".join(reprlib.repr(value).split())


def _scalar(value: Any) -> Any:
    """The plain number of NumPy's and MLX's, anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value
