"""A chat template that prints the date prints that of the day on which the folder was begun.

Otherwise a run over midnight would ask the rest of its prompts in another template. The clock of a
template is a function that it calls, `strftime_now`; a macro of that name takes its place.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

_CLOCK = "strftime_now"
# The line break at the end is what a Jinja block swallows, instead of one of the template's own.
_MACRO = re.compile(r"\{% macro strftime_now\(format\) %\}.*?\{% endmacro %\}\n", re.DOTALL)


def is_dated(tokenizer: Any) -> bool:
    """Does the chat template ask for the time?"""
    return _CLOCK in str(getattr(tokenizer, "chat_template", None))


def settle(tokenizer: Any, moment: datetime) -> None:
    """From now on the tokenizer's chat template, if it is dated, is rendered as at `moment`."""
    if is_dated(tokenizer):
        found = tokenizer.chat_template
        named = isinstance(found, dict)
        tokenizer.chat_template = (
            {name: _at(text, moment) for name, text in found.items()}
            if named
            else _at(found, moment)
        )


@contextmanager
def at(tokenizer: Any, moment: datetime) -> Iterator[None]:
    """The tokenizer's chat template as at another time."""
    before = getattr(tokenizer, "chat_template", None)
    settle(tokenizer, moment)
    try:
        yield
    finally:
        if is_dated(tokenizer):
            tokenizer.chat_template = before


def _at(template: str, moment: datetime) -> str:
    """The template with a clock that stands still."""
    if _CLOCK not in template:
        return template
    steps = "".join(
        f".replace({json.dumps(sign)}, {json.dumps(value)})"
        for letter in string.ascii_letters
        for sign in (f"%-{letter}", f"%{letter}")
        if (value := moment.strftime(sign)) != sign
    )
    clock = f"{{{{ format{steps}.replace('%%', '%') }}}}"
    return f"{{% macro {_CLOCK}(format) %}}{clock}{{% endmacro %}}\n{_MACRO.sub('', template)}"
