"""The commands and what they read: every file that a command opens is broken in its turn."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import broken_files as files
from broken_world import SMALL_EVALUATION, SMALL_RUN, Broken, copy_of, help_of

TRAIN = f"-o run2 {SMALL_RUN}"
FEW = "--max-tokens 2"
BENCH = "bench speed -m model -d drafter --count 1 --rounds 1 --no-perfect --max-tokens 12"
PATTERNS = "--sparse-prefill minference --sparse-prefill-config patterns.json"

# What is read, what breaks it, and every command line that reads it.
Breaks = Callable[[random.Random, Path], str]
READS: dict[str, tuple[Breaks, list[str]]] = {
    "model": (
        files.of_model,
        [
            f"generate hi -m model --no-draft {FEW}",
            f"generate hi -m model -d drafter {FEW} --json",
            f"chat -m model -d drafter {FEW}",
            "info model -d drafter",
            "info model --json",
            "shard model --out new --ranks 2",
            "bench hosts -m model",
            "convert model --out new",
            "convert model --out new -q --q-bits 8 --q-group-size 32",
            "convert model --out new --dry-run",
            "convert drafter --out new --target model",
            f"race hi -m model -d drafter {FEW}",
            f"demo hi -m model -d drafter {FEW}",
            f"bench acceptance -m model -d drafter --count 1 {FEW}",
            "bench budget -m model -d drafter",
            "bench parallel -m model -d drafter --widths 2 --rounds 1 --max-tokens 3",
            "bench patterns model --out new.json --text text.txt --length 3072 --density 0.9",
            f"{BENCH} -o new",
            "bench prefill -m model --lengths 512 --modes trianglemix --text text.txt",
            f"train -m model --prompts prompts.jsonl {TRAIN} {SMALL_EVALUATION}",
            f"train prompts -m model --prompts prompts.jsonl {TRAIN}",
            f"train answers -m model --prompts prompts.jsonl {TRAIN}",
            f"train fit -m model --answers answers.jsonl {TRAIN}",
            f"train --estimate -m model {TRAIN}",
            "bench needles -m model --lengths 512 --tasks single --depths 0.5",
            "bench exactness -m model -d drafter --count 1 --sampled 1"
            " --max-tokens 2 --sampled-tokens 2",
            "bench counts -m model -d drafter",
            "-m mlx_redrafter.convert model --out new",
        ],
    ),
    "drafter": (
        files.of_drafter,
        [
            f"generate hi -m model -d drafter {FEW}",
            f"chat -m model -d drafter {FEW}",
            "info model -d drafter",
            "convert drafter --out new --to apple",
            "convert drafter --out new --to tensorrt-llm",
            "convert drafter --out new --target model -q --q-group-size 32",
            "convert drafter --out new --dry-run",
            f"race hi -m model -d drafter {FEW}",
            f"{BENCH} --against drafter",
            f"train fit -m model --answers answers.jsonl --warm-start drafter {TRAIN}",
            "bench counts -m model -d drafter",
            f"bench acceptance -m model -d drafter --count 1 {FEW}",
        ],
    ),
    "model.gguf": (
        files.gguf,
        [
            "convert model.gguf --out new",
            "convert model.gguf --out new -q --q-bits 4 --q-group-size 32",
            "convert model.gguf --out new --dtype float16",
            "convert model.gguf --out new --dry-run",
            "-m mlx_redrafter.convert model.gguf --out new",
            "info model.gguf",
            f"generate hi -m model.gguf {FEW}",
        ],
    ),
    "talk.json": (files.of_any, [f"chat -m model --no-draft {FEW}"]),
    "train.yaml": (
        files.of_any,
        [
            f"train -c train.yaml -m model --prompts prompts.jsonl {TRAIN} {SMALL_EVALUATION}",
            f"train answers -c train.yaml -m model --prompts prompts.jsonl {TRAIN}",
            f"train --estimate -c train.yaml -m model {TRAIN}",
        ],
    ),
    "patterns.json": (
        files.of_any,
        [
            f"generate hi -m model --no-draft {FEW} {PATTERNS} --sparse-prefill-min-context 0",
            f"chat -m model --no-draft {FEW} {PATTERNS}",
            f"race hi -m model -d drafter {FEW} {PATTERNS}",
            "bench needles -m model --lengths 512 --tasks single --depths 0.5"
            " --patterns patterns.json",
        ],
    ),
    "prompts.jsonl": (
        files.of_any,
        [
            f"bench acceptance -m model -d drafter --prompts prompts.jsonl {FEW}",
            f"{BENCH} --prompts prompts.jsonl",
            f"train prompts -m model --prompts prompts.jsonl {TRAIN}",
            "bench exactness -m model -d drafter --prompts prompts.jsonl"
            " --sampled 1 --max-tokens 2 --sampled-tokens 2",
        ],
    ),
    "answers.jsonl": (
        files.of_any,
        [
            f"train fit -m model --answers answers.jsonl {TRAIN}",
            f"train answers -m model --answers answers.jsonl --prompts prompts.jsonl {TRAIN}",
        ],
    ),
    "text.txt": (
        files.of_any,
        [
            "bench patterns model --out new.json --text text.txt --length 3072 --density 0.9",
            "bench prefill -m model --lengths 512 --modes trianglemix --text text.txt",
        ],
    ),
    "run": (
        files.inside,
        [
            f"train -o run {SMALL_EVALUATION}",
            "train answers -o run --answer-tokens 90",
            "train fit -o run",
            f"train evaluate -o run {SMALL_EVALUATION}",
            f"generate hi -m model -d run/drafter {FEW}",
            "info model -d run/drafter",
        ],
    ),
    "bench": (files.inside, ["bench speed --plot-only bench"]),
}
LINES = [(kind, line) for kind, (_, lines) in READS.items() for line in lines]
# What a command goes on with when it is called again, or shows again.
KEPT = {"train": ("run2", "run", "run/"), "bench speed": ("new", "bench/")}
BESIDE = ["model", "drafter", "prompts.jsonl", "answers.jsonl", "text.txt", "patterns.json"]


def broken_file(random: random.Random, world: Path, folder: Path, kind: str, line: str) -> Broken:
    """One command line, with something wrong in the files of that kind."""
    copy_of(world, folder, [name for name in BESIDE if name in line or name == kind])
    if kind not in BESIDE:
        copy_of(world, folder, [kind])
    if kind == "run":
        copy_of(world, folder, [n for n in ("model", "drafter", "prompts.jsonl") if n not in line])
    given = line.split()
    broken = Broken(random, folder, given, keeps=kept(given))
    broken.what = READS[kind][0](random, folder / kind)
    if given[0] == "chat":
        broken.stdin = b"one\n/load talk.json\ntwo\n/stats\n" if kind == "talk.json" else b"one\n"
    return broken


def program_of(given: Sequence[Any]) -> tuple[str, ...]:
    """The command of a line, in as many words as its name has."""
    words = 2 if given and given[0] in ("-m", "bench") else 1
    return tuple(map(str, given[:words]))


def kept(given: Sequence[Any]) -> tuple[str, ...]:
    """What a line may leave behind although it fails."""
    return KEPT.get(" ".join(program_of(given)), ())


def commands() -> list[tuple[str, ...]]:
    """Every command as its words; the stages of training count, and what can be measured."""
    named = re.compile(r"^  ([a-z][a-z-]*)  ", re.MULTILINE)
    alone = [name for name in named.findall(help_of(())) if name != "bench"]
    groups = {group: named.findall(help_of((group,))) for group in ("train", "bench")}
    inner = [(group, name) for group, names in groups.items() for name in names]
    return [*((name,) for name in alone), *inner, ("-m", "mlx_redrafter.convert")]


OPTION = re.compile(
    r"^  (?:-\w, )?(--[a-z0-9-]+)(?:, --no-[a-z-]+)?(?: (\S+))?(?:  |$)", re.MULTILINE
)
TYPES = {"": "bool", "N": "int", "X": "float"}


def options_of(program: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, type) of every option in a command's help."""
    for name, kind in OPTION.findall(help_of(program)):
        if name not in ("--help", "--install-completion", "--show-completion"):
            yield name, TYPES.get(kind, kind)


def prints_json(program: tuple[str, ...]) -> bool:
    """Is --json a switch of this command, and not the name of a file?"""
    return ("--json", "bool") in options_of(program)
