"""Where training prompts come from: a file, or the model itself.

An instruct model that is given only the opening of a user turn in its chat template writes the user
turn (Magpie, arXiv 2406.08464), here often behind its first words. A model without a template
continues from its first token.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation.prompts import read_prompts
from mlx_redrafter.models.sequences import Answer, Request
from mlx_redrafter.text.template import has_template, render_text
from mlx_redrafter.training import turns
from mlx_redrafter.training.openings import opening
from mlx_redrafter.training.shards import read_lines

_MARK = "\u2402MARK\u2402"
_SHORTEST = 3  # tokens of a prompt, besides its opening
_TEMP, _TOP_P = 1.0, 0.9


class KnownPrompts:
    """Which prompts were seen: evaluation prompts first, so that none of them is trained on."""

    def __init__(self) -> None:
        self.seen = {_key(p.text) for p in read_prompts()}

    def __contains__(self, text: str) -> bool:
        return _key(text) in self.seen

    def add(self, text: str) -> bool:
        """True the first time."""
        key = _key(text)
        if not key or key in self.seen:
            return False
        self.seen.add(key)
        return True


def _key(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def from_file(file: Path) -> list[list[dict[str, str]]]:
    """Conversations that end with a user turn.

    A line is a string, {"prompt"}, {"messages"} or ShareGPT's {"conversations"}; what follows the
    last user turn is dropped, for the model answers itself. Duplicates and evaluation prompts too.

    Raises:
        OptionError: an unreadable file, or a line of another form.
    """
    known, result = KnownPrompts(), []
    for number, row in enumerate(read_lines(file), 1):
        messages = _messages(row)
        if messages is None:
            raise OptionError(
                f'line {number} of {file} is no prompt: give a string, {{"prompt": ...}}, '
                '{"messages": [...]} or {"conversations": [...]}'
            )
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if messages and known.add(messages[-1]["content"]):
            result.append(messages)
    if not result:
        raise OptionError(f"{file} holds no prompt that could be trained on")
    return result


_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


def _messages(row: Any) -> list[dict[str, str]] | None:
    if isinstance(row, str):
        return [{"role": "user", "content": row}]
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        return None
    try:
        pairs = [(t.get("role", t.get("from")), t.get("content", t.get("value"))) for t in turns]
    except AttributeError:
        return None
    if not all(isinstance(text, str) and isinstance(role, str) for role, text in pairs):
        return None
    return [{"role": _ROLES.get(role, role), "content": text} for role, text in pairs]


def user_header(tokenizer: TokenizerWrapper, words: str = "") -> tuple[list[int], set[int]]:
    """Token ids that open a user turn, with its first words, and the ids that end one.

    Raises OptionError: a template in which a user turn cannot be found.
    """
    ends = set(tokenizer.eos_token_ids)
    first = tokenizer.bos_token_id
    bare = [first if first is not None else min(ends, default=0)]
    if not has_template(tokenizer):
        return bare, ends
    turn = [{"role": "user", "content": _MARK}]
    text = render_text(tokenizer, turn, {"add_generation_prompt": False})
    head, found, tail = text.partition(_MARK)
    if not found:
        raise OptionError(
            "this model's chat template does not show what the user says, so the model cannot "
            "write prompts: give some with --prompts FILE"
        )
    closing = tokenizer.encode(tail.strip(), add_special_tokens=False)
    ids = list(tokenizer.encode(head + words, add_special_tokens=False))
    return ids or bare, ends | set(closing[:1])


def control_tokens(tokenizer: TokenizerWrapper) -> tuple[set[int], set[int]]:
    """Ids of tokens that are no text: those of the chat template, and all special ones.

    Rendered inside a message, the text of one becomes the token again. Some models declare
    only their end token special, and other added tokens are ordinary text.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = dict(getattr(tokenizer, "added_tokens_decoder", {}))
    framing = {i for i, t in added.items() if t.content.strip() and t.content in template}
    special = {i for i, t in added.items() if t.special}
    return framing, framing | special | set(getattr(tokenizer, "all_special_ids", ()))


class OwnTurns:
    """User turns in the model's own words: how they are asked for, and which of them are of use.

    Raises OptionError: a template in which a user turn cannot be found.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self.tokenizer, self.chats = tokenizer, has_template(tokenizer)
        framing, self.control = control_tokens(tokenizer)
        self.ends = user_header(tokenizer)[1] | framing

    def request(self, seed: int) -> Request:
        head, _ = user_header(self.tokenizer, self._words(seed))
        return Request(head, _TEMP, seed, _TOP_P)

    def text(self, seed: int, answer: Answer) -> str | None:
        """What the model wrote for this request, with its opening; None if it is of no use.

        Where the model goes on with a token of its chat template, the turn is over. A turn with any
        other control token in it is left out, spelled out in plain letters too. A model without a
        template writes no turns: what it writes is cut off anywhere.
        """
        whole = answer.tokens[-1] in self.ends
        tokens = answer.tokens[:-1] if whole else answer.tokens
        if len(tokens) < _SHORTEST:
            return None
        words = self.tokenizer.encode(self._words(seed), add_special_tokens=False)
        found = turns.usable(self.tokenizer.decode([*words, *tokens]), whole or not self.chats)
        if found is None:
            return None
        ids = self.tokenizer.encode(found, add_special_tokens=False)
        return found if self.control.isdisjoint(ids) else None

    def _words(self, seed: int) -> str:
        """What the turn with this seed begins with, if this model's tokenizer can write it."""
        words = opening(seed) if self.chats else ""
        ids = self.tokenizer.encode(words, add_special_tokens=False)
        return words if self.control.isdisjoint(ids) else ""
