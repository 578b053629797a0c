"""Talks of many users at once, with branches, edits and turns that are cancelled: over sessions of
earlier requests each text is that of a run without any."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tiny_chat import words, write_chat_model

from mlx_redrafter import load, stream_generate
from mlx_redrafter.api import Model
from mlx_redrafter.cache.prefixes import Prefixes
from mlx_redrafter.cache.session import Session
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.server import worker as workers
from mlx_redrafter.server.engine import ModelEngine
from mlx_redrafter.server.events import Event, Finished, Text, Usage
from mlx_redrafter.server.requests import Generation
from mlx_redrafter.server.worker import Job, Worker
from mlx_redrafter.text.template import render

N, LIMIT, MOST = 8, 300_000, 12
SYSTEM = {"role": "system", "content": words(*range(6, 30))}


class Watched(Prefixes):
    """Tells what ought to be served, by a search in plain Python, and the most bytes held."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.due: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self.most_bytes = 0

    def take(self, prompt: Sequence[int], tag: str = "", drafted: bool = False) -> Session:
        alike = [_alike(session.tokens, prompt) for session in self._kept]
        self.due[tuple(prompt)].append(min(max(alike, default=0), len(prompt) - 2))
        return super().take(prompt, tag, drafted)

    def give(self, session: Session) -> None:
        super().give(session)
        assert len(self) <= MOST
        self.most_bytes = max(self.most_bytes, self.nbytes)


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    both = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(one), len(other)))


@dataclass
class Turn:
    """One request, and what came of it."""

    prompt: list[int]
    sampling: SamplingParams
    cancelled: bool
    text: str = ""
    usage: Usage | None = None


@dataclass
class Users:
    """They ask in turns, several at a time, and go on from what they were told."""

    worker: Worker
    tokenizer: Any
    dice: Random
    talks: list[list[dict[str, str]]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def ask(self, talk: list[dict[str, str]]) -> threading.Thread:
        """The next turn of a talk, in a thread that adds the answer to it."""
        said = words(*(self.dice.randrange(6, 31) for _ in range(self.dice.randrange(2, 9))))
        talk.append({"role": "user", "content": said})
        seed = self.dice.randrange(100)
        sampling = SamplingParams(temp=0.9 * (seed % 2), seed=seed, logit_bias={1: -1e30})
        turn = Turn(render(self.tokenizer, talk), sampling, self.dice.random() < 0.2)
        self.turns.append(turn)
        thread = threading.Thread(target=self._answered, args=(turn, talk))
        thread.start()
        return thread

    def _answered(self, turn: Turn, talk: list[dict[str, str]]) -> None:
        ended = threading.Event()

        def deliver(row: int, event: Event) -> None:
            if isinstance(event, Text):
                turn.text += event.text
                if turn.cancelled:
                    job.cancel()
                    ended.set()
            elif isinstance(event, Finished):
                turn.usage = event.usage
                ended.set()

        job = Job("j", [Generation(turn.prompt, turn.sampling, N)], deliver)
        self.worker.submit(job)
        assert ended.wait(60)
        talk.append({"role": "assistant", "content": turn.text.strip()})

    def branch(self) -> list[dict[str, str]]:
        """A talk that goes another way from one of its turns on, or a new one."""
        if not self.talks or self.dice.random() < 0.5:
            return [SYSTEM]
        other = self.dice.choice(self.talks)
        return other[: 1 + 2 * self.dice.randrange(len(other) // 2)]

    def edit(self, talk: list[dict[str, str]]) -> None:
        """The last turn is asked anew, in other words."""
        if len(talk) > 2 and self.dice.random() < 0.2:
            del talk[-2:]


def talks(
    loaded: tuple[Model, Any], count: int, turns: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Users, Watched]:
    """So many talks of so many turns, four at a time."""
    monkeypatch.setattr(workers, "Prefixes", Watched)
    engine, ready = ModelEngine(*loaded), threading.Event()
    worker = Worker(
        lambda: engine, on_ready=ready.set, parallel=3, cache_bytes=LIMIT, cache_size=MOST
    )
    worker.start()
    assert ready.wait(60) and worker.failure is None
    users = Users(worker, loaded[1], Random(11))
    for _ in range(0, count, 4):
        some = [users.branch() for _ in range(4)]
        users.talks += some
        for _ in range(turns):
            for talk in some:
                users.edit(talk)
            for asked in [users.ask(talk) for talk in some]:
                asked.join()
    while worker.load != (0, 0):
        time.sleep(0.001)
    worker.stop()
    assert worker.join(20)
    assert isinstance(worker.prefixes, Watched)
    return users, worker.prefixes


def check(users: Users, kept: Watched, loaded: tuple[Model, Any]) -> None:
    model, tokenizer = loaded
    cached, whole = defaultdict(list), 0
    for turn in users.turns:
        given = {"temp": turn.sampling.temp, "seed": turn.sampling.seed, "logit_bias": {1: -1e30}}
        alone = stream_generate(model, tokenizer, turn.prompt, N, draft=False, **given)
        text = "".join(each.text for each in alone)
        if turn.usage is None:
            assert turn.cancelled and text.startswith(turn.text)
            continue
        whole += 1
        assert turn.text == text
        cached[tuple(turn.prompt)].append(turn.usage.cached)
    for prompt, found in cached.items():
        if len(found) == len(kept.due[prompt]):
            assert sorted(found) == sorted(kept.due[prompt])
    assert LIMIT / 2 < kept.most_bytes <= LIMIT
    assert whole > len(users.turns) / 2 and kept.evictions > 0
    total = sum(len(turn.prompt) for turn in users.turns)
    assert kept.tokens > total / 2, "what was read before is read again"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    folder: Path = tmp_path_factory.mktemp("talks")
    model, tokenizer = load(write_chat_model(folder, max_position_embeddings=2000))
    return Model.of(model.name, model.folder, model.target, compiled=False), tokenizer


def test_talks(loaded: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check(*talks(loaded, 8, 3, monkeypatch), loaded)


@pytest.mark.slow
def test_fifty_talks(loaded: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check(*talks(loaded, 50, 5, monkeypatch), loaded)
