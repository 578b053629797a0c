"""Requests at once over HTTP: our server beside mlx_lm's, on the same model."""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_redrafter.api import Model
from mlx_redrafter.errors import ModelError

_READY = 600.0  # seconds for a server to load a model
# mlx_lm's server with the matrix product that this program brings: MLX's own is many times slower.
_THEIRS = "import mlx_redrafter, mlx_lm.server; mlx_lm.server.main()"


def measure(
    model: Model,
    drafter: str,
    prompts: Sequence[str],
    widths: Sequence[int],
    max_tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Rows as of `row`, servers in turns.

    Raises:
        ModelError: a server that does not start.
    """
    folder, there = model.folder.resolve(), Path(drafter).expanduser()
    drafter = str(there.resolve()) if there.is_dir() else drafter  # they start in another folder
    own = ["-m", "mlx_redrafter", "serve", "-m", str(folder), "-d", drafter, "--port"]
    starts = {"mlx_lm.server": ["-c", _THEIRS, "--model", str(folder), "--port"], "serve": own}
    with contextlib.ExitStack() as stack:
        urls = {name: stack.enter_context(_running(args)) for name, args in starts.items()}
        return _measure(urls, str(folder), prompts, widths, max_tokens, rounds)


def _measure(
    urls: dict[str, str],
    model: str,
    prompts: Sequence[str],
    widths: Sequence[int],
    max_tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    found = []
    texts: dict[int, str] = {}
    for width in widths:
        taken: dict[str, list[float]] = {name: [] for name in urls}
        counts, others = dict.fromkeys(urls, 0), dict.fromkeys(urls, 0)
        for turn in range(rounds + 1):
            order = list(urls.items())
            for name, url in order if turn % 2 else reversed(order):
                start = time.perf_counter()
                with ThreadPoolExecutor(width) as pool:
                    asked = [(url, model, prompt, max_tokens) for prompt in prompts[:width]]
                    answers = list(pool.map(lambda one: _ask(*one), asked))
                if turn:
                    taken[name].append(time.perf_counter() - start)
                counts[name] = sum(count for _, count in answers)
                for i, (text, _) in enumerate(answers):
                    others[name] += texts.setdefault(i, text) != text
        found += [
            row(width, name, counts[name], statistics.median(taken[name]), others[name])
            for name in urls
        ]
    return found


def _ask(url: str, model: str, prompt: str, max_tokens: int) -> tuple[str, int]:
    """An answer's text and its tokens."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
    kind = {"Content-Type": "application/json"}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, kind)
    with urllib.request.urlopen(request, timeout=_READY) as answer:
        found = json.load(answer)
    return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]


@contextlib.contextmanager
def _running(arguments: list[str]) -> Iterator[str]:
    """A server on a free port, until it is no longer needed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = subprocess.Popen(
        [sys.executable, *arguments, str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path.home(),
    )  # fmt: skip
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + _READY
        while not _lives(url):
            if started.poll() is not None or time.monotonic() > end:
                raise ModelError(
                    f"{' '.join(arguments[:3])} did not start: run it by itself to see why"
                )
            time.sleep(0.2)
        yield url
    finally:
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(20)
        started.kill()


def _lives(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def row(width: int, way: str, tokens: int, seconds: float, other_texts: int) -> dict[str, Any]:
    """A line of the table: prompts are read within the seconds."""
    return {
        "at_once": width,
        "way": way,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "each": round(tokens / seconds / width, 2),
        "other_texts": other_texts,
    }
