"""mlx-lm's tokenizer of a model's folder, and the tokens at which its texts end."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_redrafter.errors import DrafterError, HubError, ModelError, one_line
from mlx_redrafter.runtime.paths import json_or_nothing
from mlx_redrafter.text import turn_ends

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_OTHER_NAMES = 0.005  # of all tokens
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")
_BESIDE = (
    *_TOKENIZER_FILES, "tokenizer_config.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.*", "generation_config.json",
)  # fmt: skip


def load_tokenizer(
    folder: Path, options: dict[str, Any] | None = None, *, complete: bool = True
) -> TokenizerWrapper:
    """mlx-lm's tokenizer with its streaming detokenizer.

    It stops at every end of text named in the folder's config.json or generation_config.json, by
    id or by its text. `options` are passed to transformers. `complete` adds the end of an answer
    that only the chat template knows, with a warning. Raises HubError.
    """
    refuse_stand_ins(folder)
    if not any(found for pattern in _TOKENIZER_FILES for found in folder.glob(pattern)):
        raise HubError(
            f"{folder} has no tokenizer; put the tokenizer.json and tokenizer_config.json of the "
            "model there"
        )
    # Without an answer given here, transformers would ask on the terminal whether to run code.
    # The context's length is ours to check: transformers would warn of errors that cannot happen.
    options = {"trust_remote_code": False, "model_max_length": 10**9, **(options or {})}
    try:
        loaded = _load_tokenizer(folder, options)
    except Exception as error:
        raise HubError(
            f"the tokenizer in {folder} cannot be loaded ({one_line(error)}); copy the tokenizer "
            "files of the model again"
        ) from error
    for end in end_ids(folder, loaded):
        loaded.add_eos_token(str(end))
    return turn_ends.completed(loaded, folder) if complete else loaded


def check_same(tokenizer: TokenizerWrapper, folder: Path) -> None:
    """Does a model in a folder read and write the same tokens? A few may have other names, as
    reserved ones of a family do: a token that is drafted in vain costs time only.

    Raises:
        DrafterError: it does not.
    """
    try:
        theirs = load_tokenizer(folder, complete=False).get_vocab()
    except HubError as error:
        raise DrafterError(str(error)) from None
    names = {number: name for name, number in theirs.items()}
    ours = tokenizer.get_vocab()
    wrong = [(name, n) for name, n in ours.items() if names.get(n, name) != name]
    if len(wrong) > len(ours) * _OTHER_NAMES:
        name, number = min(wrong, key=lambda pair: pair[1])
        raise DrafterError(
            f"the drafting model in {folder} has another tokenizer: token {number} is "
            f"{names[number]!r} there and {name!r} here; use a small model of the same family"
        )


def refuse_stand_ins(folder: Path) -> None:
    """HubError if a Git LFS pointer or a web page lies in place of a tokenizer's file."""
    from mlx_redrafter.models.weights import refuse_stand_in

    for path in sorted(path for pattern in _BESIDE for path in folder.glob(pattern)):
        try:
            refuse_stand_in(path)
        except ModelError as error:
            raise HubError(str(error)) from None


def end_ids(folder: Path, tokenizer: TokenizerWrapper | None = None) -> list[int]:
    """The ends of text that config.json and generation_config.json name; other values are left out.

    Those given as text need the tokenizer, which is loaded unless it is given.
    """
    given: list[Any] = []
    for file in ("config.json", "generation_config.json"):
        value = json_or_nothing(folder / file).get("eos_token_id")
        given += value if isinstance(value, list) else [value]
    ids = {v for v in given if isinstance(v, int) and not isinstance(v, bool) and v >= 0}
    if texts := sorted({v for v in given if isinstance(v, str)}):
        vocabulary = (tokenizer or load_tokenizer(folder, complete=False)).get_vocab()
        ids |= {int(t) for t in texts if t not in vocabulary and t.isdecimal()}
        ids |= {vocabulary[t] for t in texts if t in vocabulary}
        if unknown := [t for t in texts if t not in vocabulary and not t.isdecimal()]:
            warnings.warn(
                f"{folder} ends texts with {', '.join(unknown)}, which its tokenizer does not know",
                stacklevel=2,
            )
    return sorted(ids)


def _load_tokenizer(folder: Path, options: dict[str, Any]) -> TokenizerWrapper:
    from mlx_lm.utils import load_tokenizer as load

    try:
        return load(folder, options)
    except Exception:
        # transformers reads all of config.json before, and refuses it for values that no tokenizer
        # depends on: the end of text as text, for one.
        from transformers import AutoConfig

        raw = json_or_nothing(folder / "config.json")
        config = AutoConfig.for_model(str(raw.get("model_type")))
        config.tokenizer_class = raw.get("tokenizer_class")
        return load(folder, {**options, "config": config})
