"""Threads that generate: every text is the right one, and the process ends with 0."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from tiny_chat import write_chat_model

from mlx_redrafter.runtime import threads

# Uncompiled, which for a few tokens is quicker. The last threads end as the process does.
PROGRAM = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from mlx_redrafter import Session, TreeShape, api, generate, load, stream_generate

api.parts._compiler_present = lambda: False
OPTIONS = {"max_tokens": 8, "logit_bias": {"0": float("-inf")}, "tree": TreeShape.chain(2)}
texts, wrong = [], []

def ask(model, **more):
    texts.append(generate(*model, "da da ba", **OPTIONS, **more))

def within(work, *given, **more):
    def watched():
        try:
            work(*given, **more)
        except Exception as error:
            wrong.append(error)
    thread = threading.Thread(target=watched)
    thread.start()
    thread.join()

model = load(sys.argv[1], drafter=None)
within(ask, model)
within(lambda: ask(load(sys.argv[1], drafter=None)))
ask(model)

session = Session()  # begun by an answer that is left, in a thread that ends
def begin():
    stream = stream_generate(*model, "da da ba", session=session, **OPTIONS)
    next(stream), next(stream), stream.close()
within(begin)
within(ask, model, session=session)
within(ask, model, session=session)

stream, pieces = stream_generate(*model, "da da ba", **OPTIONS), []
def take():
    pieces.append(next(stream, None))
while None not in pieces and not wrong:
    within(take)
texts.append("".join(piece.text for piece in pieces[:-1]))

with ThreadPoolExecutor(4) as pool:
    for _ in pool.map(lambda _: ask(model), range(8)):
        pass
print(len(texts), len(set(texts)), bool(texts[0]), wrong)
"""


@pytest.mark.parametrize("run", [1, 2, 3])
def test_worker_threads(tmp_path: Path, run: int) -> None:
    """Several times, because an abort at exit depends on who is quicker."""
    folder = write_chat_model(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "14 1 True []"), done.stderr[-2000:]


def test_a_threads_streams_are_cleared_in_it_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []
    began: list[int] = []
    monkeypatch.setattr(mx, "clear_streams", lambda: cleared.append(threading.get_ident()))

    def work() -> None:
        began.append(threading.get_ident())
        for _ in range(3):
            threads.clear_at_end()
        assert cleared == []

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    threads.clear_at_end()  # of the main thread: MLX's own exit does it
    assert cleared == began
