"""The prompts of a training folder, in one endless order: from a file, or in the model's words.

Every file below ``prompts`` is whole, and each depends on those before it alone. So the prompt with
a number, and the batch of answers with a number, are the same wherever a run was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import OptionError
from mlx_redrafter.models.sequences import Answer, Request, Sequences, Told
from mlx_redrafter.terminal import console
from mlx_redrafter.text.template import prompt_ids
from mlx_redrafter.training import prompts, thoughts, waves
from mlx_redrafter.training.answers import POOL, plan
from mlx_redrafter.training.config import TrainConfig
from mlx_redrafter.training.memory import LONGEST, wave
from mlx_redrafter.training.shards import read_lines, reading, write_lines

_FIRST_SEED, _SEEDS = 5_000_000, 1000  # seeds of the prompts, apart from those of the answers
_AGAIN_TEMP = 0.8  # instead of greedy, where a prompt is answered again
_FRUITLESS = 3  # waves in a row without a new prompt

Row = dict[str, Any]
OnMore = Callable[[int, int], None]


class _Own(Told):
    """Gathers the turns of a wave that are of use; ``on_more`` gets their number and all tokens."""

    def __init__(self, own: prompts.OwnTurns, requests: Sequence[Request], on_more: OnMore) -> None:
        self.own, self.requests, self.on_more = own, requests, on_more
        self.written, self.found = 0, dict[int, str]()

    def tokens(self, count: int) -> None:
        self.written += count
        self.on_more(len(self.found), self.written)

    def answer(self, index: int, answer: Answer) -> None:
        if text := self.own.text(self.requests[index].seed, answer):
            self.found[index] = text


class Supply:
    """Prompts as they are needed.

    Args:
        target: to write prompts with.
    """

    def __init__(self, config: TrainConfig, target: Sequences, tokenizer: TokenizerWrapper) -> None:
        self.config, self.target, self.tokenizer = config, target, tokenizer
        self.folder = config.out / "prompts"
        self.sizes: list[int] = []  # prompts per file
        self.rows: list[Row] = []
        for file in sorted(self.folder.glob("*.jsonl")):
            with reading(file, f"delete {self.folder.parent} and begin anew"):
                rows = read_lines(file)
                for row in rows:
                    conversation(row, None)
            self._take(rows)
        self.thinking = thoughts.Thinking(config, tokenizer)
        self.known = prompts.KnownPrompts()
        if config.prompts is None:
            for row in self.rows:
                self.known.add(row["prompt"])

    def extend(self, count: int, on_more: OnMore = lambda n, tokens: None) -> None:
        """Have at least so many prompts; ``on_more`` gets their number, and how many tokens of the
        next ones are written.

        Raises OptionError: no usable prompt in the file, or a model that writes none.
        """
        while len(self.rows) < count:
            if self.config.prompts is None:
                rows = self._own(on_more)
            elif not self.rows:
                rows = self._given(self.config.prompts)
                if len(rows) < count:
                    console.note(
                        f"note: {self.config.prompts} holds {len(rows)} prompts and {count} are "
                        "needed: they are answered several times, with other seeds"
                    )
            else:
                rows = self._again()
            write_lines(self._file(), rows)
            waves.forget(self._file().with_suffix(waves.SUFFIX))
            self._take(rows)
            on_more(len(self.rows), 0)

    def batches(self, batch: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the pools of whole batches that the prompts of now make."""
        start = total = 0
        for size in self.sizes:
            total += size
            whole = total // batch * batch
            while start < whole:
                stop = min(start + POOL * batch, whole)
                yield start, stop
                start = stop

    def requests(self, start: int, stop: int, batch: int) -> list[list[Request]]:
        """The batches of a pool, prompts of like length together."""
        ids = [self.encode(self.rows[i], self.thinking.mode(i)) for i in range(start, stop)]
        found = [list(part) for part in plan(ids, batch, self.config.seed + start)]
        for part in found:
            for i, request in enumerate(part):
                row = self.rows[request.seed - self.config.seed]
                temp = _AGAIN_TEMP if row.get("again") and not request.temp else request.temp
                part[i] = replace(request, temp=temp, thought=self.thinking.thought(request.prompt))
        return found

    def encode(self, row: Row, mode: dict[str, bool] | None = None) -> list[int]:
        """Token ids as the chat renders them, with the system prompt unless there is one.

        ``mode`` has the variables of the chat template, by default those of the last one.
        """
        messages = conversation(row, self.config.system_prompt)
        return prompt_ids(
            self.tokenizer, messages, self.thinking.modes[-1] if mode is None else mode
        )

    def _file(self) -> Path:
        """Of the next prompts."""
        return self.folder / f"{len(self.sizes):05d}.jsonl"

    def _take(self, rows: list[Row]) -> None:
        self.sizes.append(len(rows))
        self.rows += rows

    def _own(self, on_more: OnMore) -> list[Row]:
        """A wave of new prompts in the model's words."""
        if self.sizes[-_FRUITLESS:] == [0] * _FRUITLESS:
            raise OptionError(
                f"{self.config.model} writes no new prompts by itself (see {self.folder}): give "
                "some with --prompts FILE"
            )
        own, first = prompts.OwnTurns(self.tokenizer), self.config.seed + _FIRST_SEED
        first += _SEEDS * len(self.sizes)
        requests = [own.request(first + i) for i in range(wave(self.config))]
        told = _Own(own, requests, lambda found, tokens: on_more(len(self.rows) + found, tokens))
        waves.write(
            self.target, requests, self.config.prompt_tokens, own.ends,
            self._file().with_suffix(waves.SUFFIX), told,
        )  # fmt: skip
        texts = (told.found.get(i) for i in range(len(requests)))
        return [{"prompt": text} for text in texts if text and self.known.add(text)]

    def _given(self, file: Path) -> list[Row]:
        """The prompts of a file that are not too long."""
        longest = thoughts.lengths(self.config, self.tokenizer).most
        limit = min(LONGEST, self.target.target.config.max_positions - longest)
        found = [
            {"prompt": messages[0]["content"]} if len(messages) == 1 else {"messages": messages}
            for messages in prompts.from_file(file)
        ]
        rows = [row for row in found if self._fits(row, limit)]
        if len(rows) < len(found):
            console.note(
                f"note: {len(found) - len(rows)} of {len(found)} prompts in {file} are left out: "
                f"they have more than {limit} tokens"
            )
        if not rows:
            raise OptionError(f"no prompt in {file} has {limit} tokens or less")
        return rows

    def _fits(self, row: Row, limit: int) -> bool:
        # A token is a byte or more: most prompts need no look.
        size = sum(len(m["content"].encode()) for m in conversation(row, None))
        return size < limit // 2 or len(self.encode(row)) <= limit

    def _again(self) -> list[Row]:
        """The prompts of the file once more, so often that they fill a batch."""
        first = self.rows[: self.sizes[0]]
        times = -(-self.config.batch // len(first))
        return [{**row, "again": True} for row in first] * times


def conversation(row: Row, system: str | None) -> list[dict[str, str]]:
    """The messages of a prompt file's line."""
    messages = (
        row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    )
    if system and messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages
