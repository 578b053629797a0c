"""What a person reads beside the text: statistics, warnings and errors, all on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from mlx_redrafter.errors import RedrafterError

if TYPE_CHECKING:
    from mlx_redrafter.api import GenerationResponse
    from mlx_redrafter.stats import DraftStats, PrefillStats

# Where the command line keeps, in its context, whether an error shows its traceback.
DEBUG = "mlx_redrafter.debug"
DIM_ON, DIM_OFF = "\x1b[2m", "\x1b[22m"


def _say(text: str, style: str) -> None:
    # Made anew each time, because stderr may have been replaced since.
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(text, style=style))


def error(text: str) -> None:
    """One red line on stderr."""
    _say(f"error: {' '.join(text.split())}", "red")


def warn(text: str) -> None:
    """One yellow line on stderr."""
    _say(text, "yellow")


def note(text: str) -> None:
    """One dim line on stderr."""
    _say(text, "dim")


def facts(known: Mapping[str, Any], *names: str) -> str:
    """The conditions of a measurement, all or those named, in one line; what is None is left out:
    no drafter, or no BLAS where the GPU multiplies."""
    shown = {name: known.get(name) for name in names or known}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)


def run(command: Callable[..., None]) -> None:
    """Run a module's command line; what a user can get wrong is one line and exit code 1."""
    import typer

    try:
        typer.run(command)
    except RedrafterError as wrong:
        error(str(wrong))
        sys.exit(1)


def write(text: str) -> None:
    """A piece of an answer, as it is, to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def summary(last: GenerationResponse) -> str:
    """Tokens, tokens per second and tokens per step of an answer, in one line."""
    read = last.stats.prefill_tokens
    new = f" ({read} new)" if 0 < read < last.prompt_tokens else ""
    parts = [
        f"{last.generation_tokens} token{'' if last.generation_tokens == 1 else 's'}",
        f"{last.generation_tps:.1f} tokens/s",
        f"{last.stats.tokens_per_step:.2f} tokens per step",
        f"prompt {last.prompt_tokens} tokens{new}, {last.prompt_tps:.1f} tokens/s",
    ]
    if last.peak_memory:
        parts.append(f"peak {last.peak_memory:.2f} GB")
    if last.finish_reason == "length":
        parts.append("ended by the token limit")
    return " · ".join(parts)


def details(stats: DraftStats) -> str:
    """Counts, acceptance and time split of an answer, one fact a line."""
    values = stats.as_dict()
    histogram = " ".join(f"{k}:{n}" for k, n in values["histogram"].items())
    depths = " ".join(f"{share:.0%}" for share in values["per_depth"])
    shapes = " · ".join(f"{name}: {n}" for name, n in values["shapes"].items())
    seconds = " · ".join(f"{name} {value:.2f}" for name, value in values["seconds"].items())
    rows = [
        ("prompt read", f"{stats.prefill_tokens} tokens"),
        ("steps", f"{stats.steps} (passes of the model), {stats.tokens} tokens"),
        ("tokens per step", f"{stats.tokens_per_step:.2f}"),
        (
            "drafts checked",
            f"{stats.drafted}, accepted {stats.accepted} ({stats.acceptance_rate:.1%})",
        ),
        ("steps by accepted", histogram or "-"),
        ("accepted by depth", depths or "-"),
        ("steps by shape", shapes or "-"),
        ("seconds", seconds),
    ]
    if stats.sparse_prefill is not None:
        rows.insert(1, ("sparse prefill", sparse_prefill(stats.sparse_prefill)))
    return "\n".join(f"  {name:<18}{value}" for name, value in rows)


def sparse_prefill(stats: PrefillStats) -> str:
    """What sparse prefill did with a prompt, in a few words."""
    text = f"{stats.mode}: {stats.sparse_chunks} of {stats.chunks} chunks"
    if stats.sparse_layers:
        text += f", in their sparse layers {stats.density:.0%} of the attention"
    reasons = ", ".join(f"{reason} {count}" for reason, count in stats.declined.most_common())
    return text + (f"; dense layer passes: {reasons}" if reasons else "")


class AnswerWriter:
    """Streams an answer to stdout; on a terminal what a model thinks before it answers is dim.

    `markers` are the texts that start and end the thinking, (None, None) where the model has none.
    """

    def __init__(self, markers: tuple[str | None, str | None], *, dim: bool) -> None:
        start, end = markers
        self.markers = (start, end) if dim and start and end else None
        self.pending = ""
        self.thinking = False

    def write(self, text: str) -> None:
        """Print a segment; what may be the first half of a marker waits for the next one."""
        if self.markers is None:
            write(text)
            return
        self.pending += text
        while True:
            marker = self.markers[self.thinking]
            head, found, tail = self.pending.partition(marker)
            if not found:
                break
            self.thinking = not self.thinking
            write(f"{head}{DIM_ON}{marker}" if self.thinking else f"{head}{marker}{DIM_OFF}")
            self.pending = tail
        held = _overlap(self.pending, marker)
        write(self.pending[: len(self.pending) - held])
        self.pending = self.pending[len(self.pending) - held :]

    def close(self) -> None:
        """Print what waits and leave the terminal as it was."""
        write(self.pending + (DIM_OFF if self.thinking else ""))
        self.pending, self.thinking = "", False


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`."""
    return next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)
