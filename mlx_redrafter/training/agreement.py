"""Whether answers are what the target itself says, and to prompts in its own chat template.

A drafter learns the model that wrote its training text. Another model, quantisation or template
gives no error anywhere, only fewer accepted drafts: so it is measured on a few conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from mlx_redrafter.models.sequences import Sequences
from mlx_redrafter.terminal import console
from mlx_redrafter.training import dates, imports
from mlx_redrafter.training.shards import Conversation, read_conversations
from mlx_redrafter.training.supply import Supply

LEAST = 0.9  # agreement of a model with what it wrote itself is 1, less what rounding changes
_COUNT = 8  # conversations
_TOKENS = 128  # of every answer
_DATE = 8  # tokens by which one date may be longer than another
# Of whatever a template prints of today, one of these has something else.
_OTHER_DAYS = (datetime(2001, 9, 3, 4, 5, 6), datetime(2018, 12, 25, 17, 38, 49))

Mode = dict[str, bool]  # variables of the chat template


@dataclass(frozen=True)
class Finding:
    """Agreement with the answers of one origin.

    Args:
        stored: share of the answer tokens that the target would choose after the prompts as they
            are stored.
        greedy: are those answers greedy? Else there is less agreement by their nature.
        own: the same share after the prompts in the target's own template; None where they are.
    """

    stored: float
    greedy: bool
    own: float | None = None

    def warning(self, what: str) -> str | None:
        """What to say about ``what``; None if all is well."""
        if self.own is not None:
            return (
                f"{what} were given to prompts in another chat template or system prompt than this "
                f"model's: asked in its own, it would say other tokens at {1 - self.own:.0%} of "
                f"the places (asked as they were: {1 - self.stored:.0%}), and a drafter trained on "
                "them loses about as much acceptance; write new ones in another folder"
            )
        if self.greedy and self.stored < LEAST:
            return (
                f"{what} are not what this model says: it would choose {self.stored:.0%} of their "
                "greedy tokens itself. Another model, quantisation or chat template wrote them, "
                f"and a drafter trained on them loses about {1 - self.stored:.0%} of its acceptance"
            )
        return None


def findings(supply: Supply) -> dict[str, Finding]:
    """What is found of the answers taken in and of those written in the folder."""
    taken, written = imports.split(supply.config.out)
    found = {}
    if taken:
        found[f"the answers of {supply.config.answers or taken[0].parent}"] = _of_taken(
            supply, taken
        )
    if written:
        found[f"the answers in {written[0].parent}"] = _of_written(supply, written)
    return found


def warn(supply: Supply) -> None:
    """Measure, and say what is wrong."""
    for what, finding in findings(supply).items():
        if text := finding.warning(what):
            console.warn(f"warning: {text}")


def agreement(target: Sequences, conversations: Sequence[Conversation]) -> float:
    """Share of the answers' first tokens that the target would choose."""
    agreed = total = 0
    for c in conversations:
        answer = c.answer[:_TOKENS]
        agreed += int((target.choices(c.prompt, answer) == np.array(answer)).sum())
        total += len(answer)
    return agreed / total


def frame_of(supply: Supply, mode: Mode | None = None) -> tuple[list[int], list[int]]:
    """Token ids that the model's chat template puts before and after a user turn."""
    probes = [supply.encode({"prompt": text}, mode) for text in ("", "Q")]
    head, tail = imports.frame(probes)
    return probes[0][:head], probes[0][len(probes[0]) - tail :]


def _undated(supply: Supply, mode: Mode, head: list[int]) -> tuple[list[int], list[int]]:
    """What is before the date in a template that prints it, and what is after it."""
    heads = [head]
    for moment in _OTHER_DAYS:
        with dates.at(supply.tokenizer, moment):
            heads.append(frame_of(supply, mode)[0])
    before, after = imports.frame(heads)
    return (head[:before], head[len(head) - after :]) if before + after else (head, [])


def _of_taken(supply: Supply, files: Sequence[Path]) -> Finding:
    """Answers of an earlier run: what most prompts begin and end with tells the template."""
    chosen, greedy = _some(files)
    stored = agreement(supply.target, chosen)
    prompts = [c.prompt for file in files[:4] for c in read_conversations(file)]
    frames = [_frame(supply, mode) for mode in supply.thinking.modes]
    alike = sum(any(_framed(prompt, *frame) for frame in frames) for prompt in prompts)
    if not supply.tokenizer.has_chat_template or alike >= len(prompts) / 2:
        return Finding(stored, greedy)
    first, last = imports.frame(prompts)
    texts = [supply.tokenizer.decode(c.prompt[first : len(c.prompt) - last]) for c in chosen]
    again = [supply.encode({"prompt": text}) for text in texts]
    return Finding(stored, greedy, _asked(supply.target, chosen, again))


def _of_written(supply: Supply, files: Sequence[Path]) -> Finding:
    """Answers written here: the prompts of the first file can be rendered again, exactly."""
    chosen, greedy = _some(files)
    stored = agreement(supply.target, chosen)
    batch = supply.config.batch
    pool = next(supply.batches(batch), None)
    first = read_conversations(files[0])
    if pool is None or files[0].stem != "00000":
        return Finding(stored, greedy)
    again = [list(r.prompt) for r in supply.requests(*pool, batch)[0]]
    pairs = [(c, p) for c, p in zip(first, again, strict=False) if c.prompt != p]
    if not pairs:
        return Finding(stored, greedy)
    pairs = ([(c, p) for c, p in pairs if c.temp == 0] or pairs)[:_COUNT]
    chosen = [c for c, _ in pairs]
    own = _asked(supply.target, chosen, [p for _, p in pairs])
    return Finding(agreement(supply.target, chosen), greedy, own)


def _asked(
    target: Sequences, chosen: Sequence[Conversation], prompts: Sequence[list[int]]
) -> float:
    """Agreement with the answers after other prompts."""
    pairs = zip(chosen, prompts, strict=True)
    return agreement(target, [replace(c, prompt=prompt) for c, prompt in pairs])


def _some(files: Sequence[Path]) -> tuple[list[Conversation], bool]:
    """A few conversations of files that are evenly apart: greedy ones (True), else any."""
    spread = files[:: max(1, len(files) // _COUNT)][:_COUNT]
    each = -(-_COUNT // len(spread))
    found = [read_conversations(file) for file in spread]
    greedy = [c for part in found for c in [c for c in part if c.temp == 0][:each]]
    return (greedy or [c for part in found for c in part[:each]])[:_COUNT], bool(greedy)


def _frame(supply: Supply, mode: Mode) -> tuple[list[int], int, list[int], list[int]]:
    """What is before a date and behind it, the tokens between, and what is behind the turn."""
    head, tail = frame_of(supply, mode)
    before, after = _undated(supply, mode, head)
    return before, len(head) + _DATE - len(before) - len(after), after, tail


def _framed(
    prompt: list[int], before: list[int], room: int, after: list[int], tail: list[int]
) -> bool:
    """Is it framed so? A date of at most `room` tokens may stand between `before` and `after`."""
    start, end = len(before), len(prompt) - len(tail)
    follows = any(prompt[i : i + len(after)] == after for i in range(start, start + room + 1))
    return prompt[:start] == before and (not after or follows) and prompt[end:] == tail
