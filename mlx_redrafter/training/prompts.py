"""Where training prompts come from: a file, or the model itself.

An instruct model that is given only the opening of a user turn in its chat template writes the user
turn (Magpie, arXiv 2406.08464). A model without a template continues from its first token.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import OptionError
from mlx_redrafter.evaluation.prompts import read_prompts
from mlx_redrafter.models.sequences import Request, Sequences
from mlx_redrafter.text.template import has_template, render, render_text
from mlx_redrafter.training.shards import read_lines

_MARK = "\u2402MARK\u2402"
_SHORTEST = 3  # tokens of a prompt


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


def user_header(tokenizer: TokenizerWrapper) -> tuple[list[int], set[int]]:
    """Token ids that open a user turn, and the ids that end one.

    Raises OptionError: a template in which a user turn cannot be found.
    """
    ends = set(tokenizer.eos_token_ids)
    first = tokenizer.bos_token_id
    bare = [first if first is not None else min(ends, default=0)]
    if not has_template(tokenizer):
        return bare, ends
    opening = [{"role": "user", "content": _MARK}]
    text = render_text(tokenizer, opening, {"add_generation_prompt": False})
    head, found, tail = text.partition(_MARK)
    if not found:
        raise OptionError(
            "this model's chat template does not show what the user says, so the model cannot "
            "write prompts: give some with --prompts FILE"
        )
    closing = tokenizer.encode(tail.strip(), add_special_tokens=False)
    ids = list(tokenizer.encode(head, add_special_tokens=False))
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


def encode(tokenizer: TokenizerWrapper, messages: list[dict[str, str]]) -> list[int]:
    """Token ids with the opening of the answer, in the template if there is one."""
    if has_template(tokenizer):
        return render(tokenizer, messages)
    return list(tokenizer.encode(messages[-1]["content"]))


def write_own(
    target: Sequences,
    tokenizer: TokenizerWrapper,
    *,
    count: int,
    batch: int,
    max_tokens: int,
    temp: float,
    seed: int,
) -> list[str]:
    """``count`` user turns in the model's own words; those cut off or too short are left out.

    Where the model goes on with a token of its chat template, the turn is over. A turn with any
    other control token in it is left out, spelled out in plain letters too.
    """
    head, ends = user_header(tokenizer)
    framing, control = control_tokens(tokenizer)
    ends |= framing
    requests = [Request(head, temp, seed + i) for i in range(batch)]
    texts, bare = [], not tokenizer.has_chat_template
    for answer in target.write(requests, max_tokens, ends):
        whole = answer.tokens[-1] in ends
        tokens = answer.tokens[:-1] if whole else answer.tokens
        if len(tokens) < _SHORTEST or not (whole or bare):
            continue
        text = tokenizer.decode(tokens).strip()
        if control.isdisjoint(tokenizer.encode(text, add_special_tokens=False)):
            texts.append(text)
    return texts[:count]
