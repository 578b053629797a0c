"""Whole inputs of every kind, tiny ones, for a test to break; and what may come of a broken one."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import gguf_files
import mlx.core as mx
from conftest import random_drafter
from tiny_gguf import write_gguf

from mlx_redrafter.cli import main as cli
from mlx_redrafter.drafters.loading import save_drafter
from mlx_redrafter.models import load_model

SEED = int(os.environ.get("MLX_REDRAFTER_TEST_SEED", "0"))
# How many times the usual number of inputs: a longer search, by hand.
TIMES = int(os.environ.get("MLX_REDRAFTER_TEST_TIMES", "1"))
SECONDS = 120  # no input may take longer, on a busy machine either
LETTERS = 8000  # nor say more than a long name that was given

# Enough for a run of every stage of training, each within a second.
SMALL_RUN = (
    "--answer-tokens 60 --max-tokens 4 --prompt-tokens 8 --batch 4 --positions 64 --segment 8"
    " --batch-positions 32 --candidates 16 --draft-vocab-size 0"
)
SMALL_EVALUATION = "--eval-prompts 1 --eval-tokens 3"
PATTERNS = [{str(head): ["vertical_and_slash", 30, 100, 0.5] for head in range(2)}] * 2


def write_world(folder: Path) -> Path:
    """A folder with everything that a command reads; names are those of `Broken.path`."""
    write_gguf(folder / "model.gguf")
    gguf_files.run(folder / "model.gguf", folder / "model", dtype=mx.float32)
    (folder / "drafter").mkdir()
    save_drafter(folder / "drafter", random_drafter(load_model(folder / "model")))
    questions = [{"prompt": f"question {i} of all", "category": "chat"} for i in range(6)]
    answers = [
        {"prompt": [1, 40 + i, 2], "answer": [50, 60, 70, 2], "temp": 0.0} for i in range(20)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (folder / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 400)
    (folder / "patterns.json").write_text(json.dumps(PATTERNS))
    (folder / "train.yaml").write_text("answer_tokens: 60\nmax_tokens: 4\nlearning_rate: 1e-3\n")
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (folder / "talk.json").write_text(json.dumps({"model": "m", "messages": talk}))
    return folder


def write_runs(folder: Path) -> None:
    """Folders that commands leave behind and read again: of a training and of a measurement."""
    model, drafter = folder / "model", folder / "drafter"
    train = f"train -m {model} -o {folder / 'run'} --prompts {folder / 'prompts.jsonl'}"
    bench = f"bench speed -m {model} -d {drafter} -o {folder / 'bench'} --no-perfect"
    for line in (
        f"{train} {SMALL_RUN} {SMALL_EVALUATION}",
        f"{bench} --count 1 --rounds 1 --max-tokens 12 --temp 0",
    ):
        done = run(line.split())
        assert done.code == 0, done.err


def content(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, links not followed; folders count, empty ones too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = b"link to " + os.fsencode(path.readlink())
        else:
            found[name] = b"folder" if path.is_dir() else path.read_bytes()
    return found


@dataclass
class Broken:
    """One broken input: what is run, on which files, and what was done to them."""

    random: random.Random
    folder: Path
    arguments: list[Any] = field(default_factory=list)
    stdin: bytes = b""
    what: str = ""
    encoding: tuple[str, str] = ("utf-8", "strict")
    # Commands that can go on keep what they have made until then.
    keeps: tuple[str, ...] = ()

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def outcome(self) -> Outcome:
        return run(self.arguments, self.stdin, self.folder, self.encoding)

    def __str__(self) -> str:
        line = " ".join(repr(str(a)) if not str(a).isascii() else str(a) for a in self.arguments)
        return f"{self.what}\n  $ {line[:1500]}\n  standard input {self.stdin[:80]!r}"


@dataclass
class Outcome:
    """What a program left on its two streams, and how it ended."""

    code: int | str | None
    out: str
    err: str
    trace: str = ""


def start(arguments: Sequence[Any]) -> Callable[[], object]:
    """The program that a command line names: a command, or -m and a module."""
    if arguments and arguments[0] == "-m":
        return lambda: runpy.run_module(str(arguments[1]), run_name="__main__", alter_sys=True)
    return cli.main


class TooSlow(BaseException):
    """An input that takes too long: no handler of the program may catch it."""


def _too_slow(*_: Any) -> None:
    raise TooSlow


def run(
    arguments: Sequence[Any],
    stdin: bytes = b"",
    folder: Path | None = None,
    encoding: tuple[str, str] = ("utf-8", "strict"),
) -> Outcome:
    """Run a program in this process, as its own process would, on files as its streams."""
    import tempfile

    code: int | str | None = 0
    trace, words = "", [str(a) for a in arguments]
    with contextlib.ExitStack() as stack:
        raw = [stack.enter_context(tempfile.TemporaryFile("w+b", buffering=0)) for _ in range(3)]
        raw[0].write(stdin)
        raw[0].seek(0)
        source = open(os.dup(raw[0].fileno()), encoding=encoding[0], errors=encoding[1])  # noqa: SIM115
        out = open(os.dup(raw[1].fileno()), "w", encoding=encoding[0], errors=encoding[1])  # noqa: SIM115
        err = open(os.dup(raw[2].fileno()), "w", encoding=encoding[0], errors="backslashreplace")  # noqa: SIM115
        rest = words[2:] if words[:1] == ["-m"] else words
        stack.enter_context(mock.patch.multiple(sys, stdin=source, stdout=out, stderr=err))
        stack.enter_context(mock.patch.object(sys, "argv", ["mlx-redrafter", *rest]))
        stack.enter_context(mock.patch.dict(os.environ))
        stack.enter_context(mock.patch.object(os, "execv", side_effect=SystemExit(0)))
        stack.enter_context(in_time())
        here = Path.cwd()
        try:
            os.chdir(folder or here)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*found in sys.modules.*")
                start(words)()
        except SystemExit as end:
            code = end.code
        except BaseException:
            code, trace = "exception", traceback.format_exc()
        finally:
            os.chdir(here)
            for stream in (source, out, err):
                with contextlib.suppress(Exception):
                    stream.close()
        texts_out = []
        for file in raw[1:]:
            file.seek(0)
            texts_out.append(file.read().decode("utf-8", "replace"))
    return Outcome(0 if code is None else code, *texts_out, trace)


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """No longer than SECONDS; signal handlers as they were before, whatever the program sets."""
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGTSTP)
    kept = {kind: signal.getsignal(kind) for kind in kinds}
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        for kind, handler in kept.items():
            signal.signal(kind, handler)


PROGRESS = re.compile(
    r"\.\.\.$|^note: |^warning: |^\s"
    r"|^(Ready|prompts?|answers|drafts|fit|evaluat(e|ion)|incomplete|model|written)\b"
)


def fault(outcome: Outcome, reports: bool = False) -> str | None:
    """What is wrong with an outcome; None where it is one line, or an answer.

    Args:
        outcome: of a broken input.
        reports: the command says by its exit code 1 what it found, in its report.
    """
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    everything = outcome.out + outcome.err
    if outcome.trace or "Traceback (most" in everything:
        return f"a traceback: {where(outcome.trace or outcome.err)}"
    if outcome.code == 0:
        return "exit code 0 and an error" if errors else None
    if outcome.code == 2:
        usage = "Usage: " in everything or "─ Error ─" in outcome.err
        return None if usage or len(errors) == 1 else "exit code 2 without a word about usage"
    if outcome.code != 1:
        return f"exit code {outcome.code}"
    if reports and not errors and outcome.out.strip():
        return None
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"{len(errors)} error lines instead of one at the end"
    return unlike_ours(errors[0]) or next(
        (f"a line besides: {line!r}" for line in lines[:-1] if not PROGRESS.search(line)), None
    )


def where(trace: str) -> str:
    """The last line of a traceback, and the last of our own in it."""
    ours = re.findall(r"(?:mlx_redrafter|convert)/([\w/]+\.py)\", line (\d+)", trace)
    return f"{trace.strip().splitlines()[-1][:150]} at {':'.join(ours[-1]) if ours else '?'}"


def unlike_ours(line: str) -> str | None:
    """What is wrong with the line of an error."""
    says = line.removeprefix("error: ")
    if says.endswith(".") and not says.endswith("..."):
        return "a full stop"
    if re.match(r"(internal|unexpected)\b", says):
        return "an error that nobody foresaw"
    if len(line) > LETTERS:
        return f"an error of {len(line)} letters"
    if not says.strip() or re.fullmatch(r"\w+(Error|Exception):?\s*", says):
        return "an error without a word"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line):
        return "control characters in an error"
    return None


def unanswered(broken: Broken, outcome: Outcome) -> str | None:
    """What is wrong with a chat: every message of its input gets an answer or an error."""
    lines = [line.decode("utf-8", "replace").strip() for line in broken.stdin.split(b"\n")]
    messages = [line for line in lines if line and not line.startswith("/")]
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    answers = sum(" tokens/s " in line for line in outcome.err.splitlines())
    if outcome.trace or "Traceback (most" in outcome.err:
        return f"a traceback: {where(outcome.trace or outcome.err)}"
    if outcome.code not in (0, 1):
        return f"exit code {outcome.code}"
    if not broken.stdin.startswith(b'"""') and answers + len(errors) < len(messages):
        return f"{answers} answers and {len(errors)} errors to {len(messages)} messages"
    return next((wrong for wrong in map(unlike_ours, errors) if wrong), None)


def lost(broken: Broken, before: dict[str, bytes], code: Any) -> str | None:
    """A file that was there and is another now, or one that a failure left behind."""
    after = content(broken.folder)
    for name, data in before.items():
        if after.get(name) != data and not name.startswith(broken.keeps or "\0"):
            return f"{name} is gone or another"
    if "run2" in after and "run2/train.yaml" not in after:
        return "left behind: a folder of a training that did not begin"
    new = [n for n in after if n not in before and not n.startswith(broken.keeps or "\0")]
    return f"left behind: {new[:5]}" if code != 0 and new else None


@functools.cache
def help_of(program: tuple[str, ...]) -> str:
    """The help of a command, wide enough that no line wraps."""
    with mock.patch.dict(os.environ, {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}):
        return run([*program, "--help"]).out


def copy_of(world: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (world / name).is_dir():
            shutil.copytree(world / name, folder / name)
        else:
            shutil.copy(world / name, folder / name)
