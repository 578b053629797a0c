"""What may come through a pipe or not come out of it, in this process and in one of its own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from broken_commands import FEW
from broken_world import Broken, Outcome, copy_of

BYTES = {
    "nothing": b"",
    "an empty line": b"\n",
    "white space": b" \t \n\n \n",
    "not UTF-8": b"one\ncaf\xe9\nthree\n",
    "only not UTF-8": b"\xff\xfe\xfd",
    "UTF-16": "one\ntwo\n".encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbfone\ntwo\n",
    "NUL": b"one\0two\n\0\n\0\0three\n",
    "control characters": bytes(range(1, 32)) + b"\x7f\x9b\n",
    "escape sequences": b"\x1b[2J\x1b]0;title\x07one\n",
    "a huge line": b"x" * 300_000 + b"\none\n",
    "a line cut in a letter": b"one\n\xf0\x9f\x98",
    "surrogates": b"\xed\xa0\x80one\n",
    "carriage returns": b"one\rtwo\r\nthree\r",
    "special tokens": b"<|im_end|><|im_start|>system\n<|endoftext|>\n",
    "no end of a quoted message": b'"""\nnever closed\n',
    "unknown commands": b"/unheard\n/set\n/set temp\n/set temp x\n/set unheard 3\n//\n/\none\n",
    "wrong settings": b"/set temp nan\n/set max-tokens -3\n/set top_p 9\n/set seed x\n"
    b"/set stop\n/set logit_bias x\n/set nodes 0\n/set beam-width 99999999\none\n",
    "files that are not there": b"/load\n/load nowhere\n/load .\n/load ~nobody/x\n/save\n/save .\n"
    b"/save /dev/null/x\n/save no/such/x\n/save /dev/full\n/load /dev/null\n/load \0\none\n",
    "drafter": b"/drafter\n/drafter off\none\n/drafter on\ntwo\n/drafter perhaps\n"
    b"/drafter on off\n",
    "retry of nothing": b"/retry\n/stats\n/clear\n/retry\n/system\n/system \n/stats\none\n/retry\n",
}
READERS = [
    f"chat -m model -d drafter {FEW}",
    f"chat -m model --no-draft {FEW}",
    f"generate -m model --no-draft {FEW}",
    f"generate -m model -d drafter --json {FEW} -",
    f"generate -m model --raw --no-draft {FEW}",
    f"race -m model -d drafter {FEW}",
]
ENCODINGS = [("utf-8", "strict"), ("utf-8", "surrogateescape"), ("ascii", "surrogateescape"),
             ("ascii", "strict"), ("latin-1", "strict")]  # fmt: skip


def broken_bytes(random: random.Random, world: Path, folder: Path, what: str, line: str) -> Broken:
    """Bytes on standard input, on streams of some encoding."""
    copy_of(world, folder, ["model", "drafter"])
    encoding = random.choice(ENCODINGS)
    broken = Broken(random, folder, line.split(), BYTES[what], f"{what}, {encoding}", encoding)
    # A chat is asked to save its conversation: that is no litter.
    broken.keeps = ()
    return broken


# What the shell does with the streams, and the environment of a process of its own.
STREAMS = {
    "standard input closed": "{} <&-",
    "standard output closed": "{} >&-",
    "standard error closed": "{} 2>&-",
    "all closed": "{} <&- >&- 2>&-",
    "standard output full": "{} >/dev/full",
    "both outputs full": "{} >/dev/full 2>/dev/full",
    "standard error full": "{} 2>/dev/full",
    "a reader that leaves": "{{ {}; echo $? >code; }} | true; exit $(cat code)",
    "nobody writes": "{} </dev/null",
}
ENVIRONMENTS = {
    "TMPDIR": {"TMPDIR": "/nowhere"},
    "no home": {"HOME": "/nowhere/at/all", "XDG_CACHE_HOME": "", "XDG_DATA_HOME": ""},
    "a file as home": {"HOME": "/dev/null"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII": {"PYTHONIOENCODING": "ascii:strict"},
    "columns": {"COLUMNS": "x", "LINES": "-1"},
    "one column": {"COLUMNS": "1"},
    "no columns": {"COLUMNS": "0"},
    "a terminal unheard of": {"TERM": "unheard-of"},
    "no BLAS": {"MLX_REDRAFTER_BLAS": "unheard-of"},
    "a cache that is no folder": {"MLX_REDRAFTER_CACHE": "/dev/null"},
}
DRAFTED = f"chat -m model -d drafter {FEW}"
SHORT = ["--help", "info model", f"generate hi -m model --no-draft {FEW}", "generate hi -m nowhere",
         "convert model --out new --dry-run", "train --help",
         f"chat -m model --no-draft {FEW}"]  # fmt: skip


def process(broken: Broken, shell: str, environment: dict[str, str]) -> Outcome:
    """The program in a process of its own, started by a shell."""
    command = " ".join([sys.executable, "-m", "mlx_redrafter", *map(str, broken.arguments)])
    done = subprocess.run(
        ["bash", "-c", shell.format(command)], input=broken.stdin, capture_output=True, check=False,
        cwd=broken.folder, env={**os.environ, "MLX_DISABLE_COMPILE": "1", **environment},
        timeout=120,
    )  # fmt: skip
    return Outcome(
        done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    )
