"""Prompt sets for measuring. Never to be trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.paths import ASSETS, user_path
from mlx_redrafter.text.template import prompt_ids

MANUAL = "pydoc_data.topics"  # ships with every CPython, some 100,000 tokens
DEV, COPY = ASSETS / "prompts_dev.jsonl", ASSETS / "prompts_copy.jsonl"


@dataclass(frozen=True)
class Prompt:
    """A user turn and its group: chat, writing, code or copy."""

    text: str
    group: str

    def encode(self, tokenizer: TokenizerWrapper) -> list[int]:
        """Token ids in the model's chat template, or of the bare text if it has none."""
        return prompt_ids(tokenizer, [{"role": "user", "content": self.text}])


def prompt_file(name: str) -> Path:
    """``dev`` and ``copy`` are in the package; anything else is a file."""
    return {"dev": DEV, "copy": COPY}.get(name) or user_path(name)


def read_prompts(file: Path = DEV, count: int | None = None) -> list[Prompt]:
    """The prompts of a jsonl file: objects with "prompt" and, if known, "category".

    With a ``count`` the groups are taken in turn, so that a few prompts are of every kind.

    Raises:
        OptionError: no file, or a line that is not such an object.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        prompts = [Prompt(row["prompt"], _group(row)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OptionError(
            f"{file} is not a prompt file ({error}): give one JSON object per line with a "
            '"prompt" and, if you like, a "category"'
        ) from None
    if not prompts:
        raise OptionError(f"{file} holds no prompts: give one JSON object per line")
    groups = {group: [p for p in prompts if p.group == group] for group in _groups(prompts)}
    mixed = [
        members[i] for i in range(len(prompts)) for members in groups.values() if i < len(members)
    ]
    return mixed[:count]


def _group(row: dict[str, str]) -> str:
    if not isinstance(group := row.get("category", "prompts"), str):
        raise ValueError(f"the category {group!r} is no text")
    return group.split(":")[0]


def _groups(prompts: list[Prompt]) -> list[str]:
    return list(dict.fromkeys(p.group for p in prompts))


def long_text(file: Path | None) -> str:
    """What a file says, or the topics of Python's help() in alphabetical order.

    Raises:
        OptionError: no such file, not UTF-8.
    """
    if file is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{file} cannot be read ({error.strerror}): give a text file") from None
    except UnicodeError:
        raise OptionError(f"{file} is not UTF-8 text: convert it first (iconv)") from None
