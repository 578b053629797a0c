"""Answers from an earlier run, taken into a training folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import OptionError
from mlx_redrafter.models import DecoderConfig
from mlx_redrafter.terminal import console
from mlx_redrafter.text.template import thought_ahead
from mlx_redrafter.training.prompts import KnownPrompts
from mlx_redrafter.training.shards import (
    Conversation,
    answer_tokens,
    batched,
    read_conversations,
    shards,
    write_lines,
)

PREFIX = "import"
_SIZE = 64  # conversations per file


def take(file: Path, folder: Path, target: DecoderConfig, tokenizer: TokenizerWrapper) -> None:
    """Split the answers in ``file`` into shards of the folder, unless that was done before.

    Answers to evaluation prompts are left out. Raises OptionError: not such a file, or tokens that
    the model does not have.
    """
    first = _shard(folder, 0)
    if first.is_file():
        return
    if not file.is_file():
        raise OptionError(f"there is no file {file}: give the answers of an earlier run")
    found = read_conversations(file)
    for number, conversation in enumerate(found, 1):
        _check(conversation, f"line {number} of {file}", target)
    kept = _without_evaluation(found, tokenizer)
    if not kept:
        raise OptionError(f"{file} holds answers to evaluation prompts only")
    if len(kept) < len(found):
        console.note(
            f"note: {len(found) - len(kept)} of {len(found)} conversations in {file} are left out: "
            "their prompts are kept for evaluation"
        )
    parts = list(batched(kept, _SIZE))
    # The first file is written last: where it is, all of them are.
    for number in reversed(range(len(parts))):
        write_lines(_shard(folder, number), map(asdict, parts[number]))


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    """The answer files that were taken in, and those written here."""
    files = [shard.file for shard in shards(folder)]
    ours = [f for f in files if not f.name.startswith(PREFIX)]
    return [f for f in files if f.name.startswith(PREFIX)], ours


def tokens(folder: Path) -> tuple[int, int]:
    """Answer tokens that were taken in, and those written here."""
    taken, written = (sum(map(answer_tokens, files)) for files in split(folder))
    return taken, written


def frame(prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many token ids different prompts share at their beginning and at their end."""
    different = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
    if len(different) < 2:
        return 0, 0
    head, tail = (_common([p[::step] for p in different]) for step in (1, -1))
    return head, tail


def _common(rows: Sequence[list[int]]) -> int:
    low, high = min(rows), max(rows)  # what these two share, all that lie between them share
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))


def _shard(folder: Path, number: int) -> Path:
    return folder / "answers" / f"{PREFIX}{number:04d}.jsonl"


def _check(conversation: Conversation, where: str, target: DecoderConfig) -> None:
    tokens = conversation.prompt + conversation.answer
    if not conversation.prompt or not conversation.answer:
        raise OptionError(f"{where} has an empty prompt or answer: leave it out")
    wrong = next((t for t in tokens if not 0 <= t < target.vocab_size), None)
    if wrong is not None:
        raise OptionError(
            f"{where} has the token {wrong}, and this model has {target.vocab_size} tokens: give "
            "answers of this very model"
        )
    if len(tokens) > target.max_positions:
        raise OptionError(
            f"{where} has {len(tokens)} tokens, and the model's context {target.max_positions}: "
            "leave it out"
        )


def _without_evaluation(
    found: Sequence[Conversation], tokenizer: TokenizerWrapper
) -> list[Conversation]:
    """Prompts that turn thinking off are framed otherwise than those that do not."""
    evaluation = KnownPrompts()
    silent = [thought_ahead(tokenizer, c.prompt) is None for c in found]
    frames = {
        mode: frame([c.prompt for c, m in zip(found, silent, strict=True) if m == mode])
        for mode in (True, False)
    }

    def asked(prompt: list[int], mode: bool) -> str:
        head, tail = frames[mode]
        return str(tokenizer.decode(prompt[head : len(prompt) - tail]))

    pairs = zip(found, silent, strict=True)
    return [c for c, mode in pairs if asked(c.prompt, mode) not in evaluation]
