"""Impossible values for every option of every command, and options that contradict each other."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from broken_commands import BENCH, BESIDE, FEW, TRAIN, commands, kept, options_of, program_of
from broken_world import SMALL_EVALUATION, Broken, copy_of

# A short command line that works, for each; an option comes behind it.
LINES = {
    "generate": f"generate hi -m model -d drafter {FEW}",
    "chat": f"chat -m model -d drafter {FEW}",
    "info": "info model -d drafter",
    "drafters": "drafters model",
    "doctor": "doctor -m nowhere",  # a whole examination takes seconds
    "serve": "serve --show-config codex",
    "demo": f"demo hi -m model -d drafter {FEW}",
    "race": f"race hi -m model -d drafter {FEW}",
    "bench acceptance": f"bench acceptance -m model -d drafter --count 1 {FEW}",
    "bench budget": "bench budget -m model -d drafter",
    "bench parallel": "bench parallel -m model -d drafter --widths 1,2 --rounds 1 --max-tokens 3",
    "bench patterns": "bench patterns model --out new.json --text text.txt --length 3072"
    " --density 0.9",
    "bench hosts": "bench hosts -m model",
    "bench speed": BENCH,
    "bench prefill": "bench prefill -m model --lengths 512 --modes trianglemix --text text.txt"
    " --prefix 1024",
    "convert": "convert model --out new --format auto",
    "shard": "shard model --out new",
    "train": f"train -m model --prompts prompts.jsonl {TRAIN} --eval-prompts 1 --eval-tokens 2",
    "bench needles": "bench needles -m model --lengths 512 --tasks single --depths 0.5",
    "bench exactness": "bench exactness -m model -d drafter --count 1 --sampled 1"
    " --max-tokens 2 --sampled-tokens 2",
    "bench counts": "bench counts -m model -d drafter",
}
NUMBERS = ["0", "-1", "-7", "nan", "inf", "-inf", "1e308", "1e-320", "2", "x", "", "1.5", "1e3"]
HUGE = ["9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" + "0" * 40]
TEXTS = [
    "", " ", "é😀", "\udcff\udcfe", "nan", "-", "--", "0", "a b", "x" * 5000, "\n", "%s {0}",
    "\x1b[31m", "../..", "[bold]", "auto", "none",
]  # fmt: skip
PATHS = [
    "~nobody/x", "~", "model", "no/such/folder/x", "/dev/null/x", "/proc/x", "text.txt/x", "",
    "x" * 300, "\udcff/x", ".", "text.txt", "/dev/null", "é 😀", "link", "drafter", "*.json",
]  # fmt: skip
# Real runs need them to be small, and a value of millions is a request, not a mistake.
HARMLESS_HUGE = {
    "--seed", "--max-tokens", "--answer-tokens", "--positions", "--seeds", "--count", "--sampled",
    "--rounds",
}  # fmt: skip
FILE_OPTIONS = {"--model", "--drafter", "--target", "--against", "--mlx-lm-draft", "--prompts"}
TEXT_LISTS = {
    "--logit-bias": ["x", "=", "1=", "=1", "1=x", "-1=2", "999999=1", "1=nan", "1=inf", "1:2", ""],
    "--regex": ["((", "[", "\\", "(?=x)", "a{99999}", "x{2,1}", "", "\x00", "(a*)*"],
    "--shape": ["x", "3x", "x4", "0x0", "3x4/0", "3x4/999", "lookup", "lookup-1", "3,4", "1x1x1"],
    "--lengths": ["x", "0", "-128", "512,", ",", "512;1024", "1e3", "513", "1" + "0" * 12, "5 5"],
    "--modes": ["x", ",", "trianglemix,", "trianglemix,x", " "],
    "--tasks": ["x", ",", "single,", ""],
    "--depths": ["x", "2", "-1", "nan", ","],
    "--shard": ["x", "1/0", "0/0", "3/2", "-1/2", "1", "/"],
    "--context-layers": ["x", "99", "-1", "0,0", ",", "1.5", "nan"],
}  # fmt: skip


@cache
def every_option() -> list[tuple[tuple[str, ...], str, str]]:
    """(command, option, type); an option that all stages of training take comes once."""
    found: dict[tuple[str, str], list[tuple[tuple[str, ...], str, str]]] = {}
    for command in commands():
        for name, kind in options_of(command):
            found.setdefault((program_of(command)[-1], name), []).append((command, name, kind))
    rng = random.Random(7)
    return [rng.choice(same) for same in found.values()]


def value_of(random: random.Random, name: str, kind: str) -> str:
    """Something that is hardly meant."""
    if name in TEXT_LISTS and random.random() < 0.8:
        return random.choice(TEXT_LISTS[name])
    if name in FILE_OPTIONS or kind.lower() == "path":
        return random.choice(PATHS)
    if kind in ("int", "float"):
        return random.choice(NUMBERS if name in HARMLESS_HUGE else [*NUMBERS, *HUGE])
    return random.choice([*TEXTS, *PATHS[:4]])


def line_of(command: tuple[str, ...]) -> list[str]:
    if command[0] == "-m":
        return [*command, *LINES["convert"].split()[1:]]
    line = LINES[" ".join(program_of(command))].split()
    return [*command, *line[1:]] if command[0] == "train" else line


def broken_option(
    random: random.Random, world: Path, folder: Path, command: tuple[str, ...], name: str, kind: str
) -> Broken:
    """A command line that would work, with one wrong value behind, sometimes two."""
    copy_of(world, folder, BESIDE)
    (folder / "link").symlink_to("nowhere")
    given, said = line_of(command), []
    more = [other for other in options_of(command) if other[1] != "bool" and other[0] != "--debug"]
    wanted = [(name, kind)] + ([random.choice(more)] if more and random.random() < 0.2 else [])
    for option, of_kind in wanted:
        if of_kind == "bool":
            new = [option] if random.random() < 0.5 else [f"{option}={random.choice(TEXTS)}"]
        else:
            new = [option, value_of(random, option, of_kind)]
        if option != "--debug":
            given += new
            said.append(" ".join(map(repr, new)))
    # An output may replace a file that the user names for it.
    keeps = (*kept(given), *(["text.txt"] if given[-1] == "text.txt" else []))
    broken = Broken(random, folder, given, keeps=keeps, what=", ".join(said))
    broken.stdin = random.choice([b"", b"hi\n"])
    return broken


CONTRADICTIONS = [
    "generate hi -m model -d drafter --no-draft --beam-width 3 --nodes 4",
    "generate hi -m model -d drafter --nodes 1 --beam-width 3 --beam-length 4",
    "generate hi -m model -d drafter --beam-width 3 --beam-length 4 --nodes 4000",
    "generate hi -m model -d drafter --json --verbose --quiet",
    "generate hi -m model --raw --system-prompt x",
    "generate hi -m model --no-draft --lookup 5",
    "generate hi -m model --regex a --json-schema text.txt",
    "generate hi -m model --json-schema text.txt",
    "generate hi -m model --json-schema model",
    "generate hi -m model --json-schema nowhere",
    "generate hi -m model --grammar text.txt",
    "generate hi -m model --no-draft --sparse-prefill xattention --sparse-prefill-config text.txt",
    "generate hi -m model --no-draft --sparse-prefill minference",
    "generate hi -m model --no-draft --sparse-prefill-tau 0.5",
    "generate hi -m model/config.json --no-draft",
    "generate hi -m model -d model",
    "generate hi -m drafter -d drafter",
    "generate hi -m model -d model/config.json",
    "generate -m model",
    "generate hi there -m model",
    "generate",
    "chat hi -m model",
    "chat -m model --raw",
    "info drafter",
    "info model -d model",
    "info model drafter",
    "race hi -m model --no-draft",
    "race hi -m model",
    "race hi -m model -d drafter --save-svg model",
    "demo hi -m model --no-draft",
    "bench acceptance -m model --count 1 --max-tokens 2",
    "bench acceptance -m model -d drafter --count 0",
    "bench acceptance -m model -d drafter --count -3",
    "bench acceptance -m model -d drafter --prompts text.txt",
    "bench budget -m model -d model",
    "bench parallel -m model --widths 1,x",
    "bench parallel -m model --widths 0",
    "bench parallel -m model --rounds 0",
    "bench parallel -m model --beside -1",
    "bench budget -m model -d drafter --plot model",
    "bench budget -m model -d drafter --plot picture.xyz",
    "bench patterns model",
    "bench patterns model --out model --text text.txt",
    "bench speed -m model -d drafter --plot-only bench",
    "bench speed -m model -d drafter --sweep --divergence",
    "bench speed --plot-only text.txt",
    "bench prefill -m model --layer --quality --prefix 1024",
    "bench prefill -m model --rounds 0 --lengths 512",
    "convert model --out model",
    "convert model --out model --force",
    "convert model --out drafter",
    "convert model --out model/inside",
    "convert drafter --out .",
    "convert drafter --out new --q-bits 4",
    "convert drafter --out new --to apple -q",
    "convert model --out new --to apple",
    "convert model --out new --format gguf",
    "convert model --out new --keep-quantization",
    "convert drafter --out new --format base",
    "convert model --out new --target model",
    "convert model --out new -q --q-bits 3",
    "convert model --out new -q --q-group-size 128",
    "convert text.txt --out new",
    "convert . --out new",
    "convert nowhere --out new",
    "convert model",
    "convert model model --out new",
    "train fit -m model -o run2",
    "train evaluate -m model -o run2",
    f"train -m model --prompts prompts.jsonl {TRAIN} -o model {SMALL_EVALUATION}",
    "train nothing -m model",
    "shard model --out model",
    "shard model --out new --ranks 1",
    "shard model --out new --ranks 4000",
    "shard model --out new --shares 1",
    "shard drafter --out new",
    "generate hi -m model --hosts one",
    "generate hi -m model --hosts , --hostfile text.txt",
    "generate hi -m model --hostfile text.txt",
    "chat -m model --split tensor",
    "serve -m model --shares 2,1",
    "bench hosts -m model --chip x",
    "bench hosts -m model --sizes 1",
    "doctor --hostfile nowhere",
    "train -m model -o run2 --warm-start model --answers answers.jsonl",
    "train -m model -o run2 --prompts answers.jsonl",
    "train -m model -o run2 --answers prompts.jsonl",
    "train -m model -o run2 --config text.txt",
    "train -m model -o run2 --estimate --batch 0",
    "unheard",
    "--unheard",
    "",
    "generate --unheard",
    "train --unheard 3",
]  # fmt: skip


def contradiction(random: random.Random, world: Path, folder: Path, line: str) -> Broken:
    copy_of(world, folder, [*BESIDE, *(["bench"] if line.endswith(" bench") else [])])
    given = line.split()
    keeps = kept(given)
    return Broken(random, folder, given, what="a contradiction", keeps=keeps)
