"""Which tokens end an answer: by their well-known names, and by the model's own chat template."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# The names that llama.cpp stops at (src/llama-vocab.cpp), and those of a few more families.
_NAMES = frozenset(
    (
        "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|im_end|>", "<|end|>", "<end_of_turn>",
        "<turn|>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>",
        "<|assistant_end|>", "<EOT>", "_<EOT>", "[EOT]", "<|EOT|>", "<|return|>", "<|call|>",
        "<|flush|>", "<|calls|>", "<|endoftext|>", "<|end_of_text|>", "<|tool_response>", "</s>",
        "<eos>", "[EOS]", "<｜end▁of▁sentence｜>",
    )
)  # fmt: skip
# Where these exist, <|end|> closes one message of several in an answer, and </s> is plain text.
_INNER = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|flush|>", "<|calls|>"}),
    ("</s>", {"<|tool_response>"}),
)
_QUESTION, _ANSWER, _NEXT = "Qz7question", "Qz7answer", "Qz7another"


def known(tokens: Collection[str]) -> set[str]:
    """Those of the tokens whose name says that an answer ends with them."""
    found = set(_NAMES.intersection(tokens))
    return found - {name for name, beside in _INNER if beside <= found}


def of_template(tokenizer: TokenizerWrapper) -> str | None:
    """The special token that the chat template puts behind an answer; None if it puts none.

    A template without an end of its own shows, before the next question, what a model trained
    with it says instead.
    """
    special = _special(tokenizer)
    if not tokenizer.has_chat_template or not special:
        return None
    longest_first = sorted(special, key=len, reverse=True)
    any_special = re.compile("|".join(map(re.escape, longest_first)))
    turn = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
    ]
    for messages in (turn, [*turn, {"role": "user", "content": _NEXT}]):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # whatever a template raises is said where an answer is asked for
            continue
        _, answer, rest = str(text).rpartition(_ANSWER)
        if answer and (found := any_special.search(rest.split(_NEXT)[0])):
            return found[0]
    return None


def unnamed(tokenizer: TokenizerWrapper) -> tuple[int, str] | None:
    """The end that only the chat template knows, id and text; None if generation stops there."""
    end = of_template(tokenizer)
    if end is None or (number := tokenizer.convert_tokens_to_ids(end)) in tokenizer.eos_token_ids:
        return None
    return number, end


def completed(tokenizer: TokenizerWrapper, folder: Path) -> TokenizerWrapper:
    """The tokenizer, stopping at that end too; a warning says where it should be named."""
    if end := unnamed(tokenizer):
        tokenizer.add_eos_token(str(end[0]))
        warnings.warn(
            f"the chat template in {folder} ends an answer with {end[1]}, which no configuration "
            "there names as an end: answers stop at it all the same (to name it, add "
            f"{end[0]} to eos_token_id in generation_config.json)",
            stacklevel=3,
        )
    return tokenizer


def _special(tokenizer: Any) -> set[str]:
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special}
    return names | known({token.content for token in added})
