"""Many answers at once: top-p, who is told of them, and what is kept when they are stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import tiny_chat
from conftest import prompt_of
from tiny_chat import begin, contents, stop_at

from mlx_redrafter.models import Decoder
from mlx_redrafter.models.batched import BatchedTarget
from mlx_redrafter.models.sequences import Answer, OneByOne, Request, Sequences, Told, sample
from mlx_redrafter.training import progress, stages, supply, waves

model = tiny_chat.model
finished = tiny_chat.finished


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


class Listener(Told):
    """Writes down what it is told; Ctrl-C after so many tokens."""

    def __init__(self, most: float = float("inf")) -> None:
        self.count, self.most = 0, most
        self.found: dict[int, Answer] = {}

    def tokens(self, count: int) -> None:
        self.count += count
        if self.count > self.most:
            raise KeyboardInterrupt

    def answer(self, index: int, answer: Answer) -> None:
        assert index not in self.found
        self.found[index] = answer


def requests(temp: float = 0.9, top_p: float = 1.0) -> list[Request]:
    return [Request(prompt_of(3 + 2 * i, seed=i), temp, i, top_p) for i in range(6)]


def same(some: list[Answer], others: list[Answer]) -> bool:
    return all(
        a.tokens == b.tokens and np.array_equal(a.features, b.features)
        for a, b in zip(some, others, strict=True)
    )


def test_top_p_draws_from_the_nucleus_and_nothing_else() -> None:
    p = np.array([0.05, 0.4, 0.02, 0.3, 0.03, 0.2])
    draws = mx.array(np.random.default_rng(0).random((6000, 4)), mx.float32)
    logits = mx.broadcast_to(mx.log(mx.array(p, mx.float32)), (6000, 6))
    for top_p, kept in ((0.69, [1, 3]), (0.71, [1, 3, 5]), (1e-6, [1]), (1.0, range(6))):
        tokens = sample(logits, mx.ones(6000), draws, mx.full(6000, top_p))
        counts = np.bincount(np.array(tokens), minlength=6) / 6000
        nucleus = np.where(np.isin(np.arange(6), list(kept)), p, 0)
        assert np.abs(counts - nucleus / nucleus.sum()).sum() < 0.08
        assert set(np.flatnonzero(counts)) == set(kept)


def test_top_p_is_each_request_own_and_the_same_one_by_one(target: Decoder) -> None:
    wanted = requests(top_p=0.3)[:3] + requests()[3:]
    together = BatchedTarget(target, (1,)).write(wanted, 12, {5})
    assert [a.tokens for a in OneByOne(target, (1,)).write(wanted, 12, {5})] == [
        a.tokens for a in together
    ]
    greedy = BatchedTarget(target, ()).write(requests(0.0), 12, {5})
    least = BatchedTarget(target, ()).write(requests(0.9, 1e-9), 12, {5})
    assert [a.tokens for a in greedy] == [a.tokens for a in least] != [a.tokens for a in together]


@pytest.mark.parametrize("of", [BatchedTarget, OneByOne])
def test_every_token_and_every_answer_is_told(target: Decoder, of: type[Sequences]) -> None:
    listener = Listener()
    written = of(target, (1,)).write(requests(), 24, set(range(8)), listener)
    assert listener.count == sum(len(a.tokens) for a in written)
    assert same([listener.found[i] for i in range(6)], written)


@pytest.mark.bits
@pytest.mark.parametrize("of", [BatchedTarget, OneByOne])
def test_what_was_complete_when_it_was_stopped_is_not_written_again(
    tmp_path: Path, target: Decoder, of: type[Sequences], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, place, given = of(target, (1,)), tmp_path / "00000.kept", (24, set(range(8)))
    whole = writer.write(requests(), *given)
    lengths = [len(a.tokens) for a in whole]
    assert len(set(lengths)) > 2
    listener = Listener(most=sum(lengths) // 2)
    with pytest.raises(KeyboardInterrupt):
        waves.write(writer, requests(), *given, place, listener)
    complete = set(listener.found)
    assert 0 < len(complete) < 6
    asked: list[int] = []
    write = writer.write
    monkeypatch.setattr(
        writer, "write", lambda rs, *more: (asked.extend(r.seed for r in rs), write(rs, *more))[1]
    )
    again = Listener()
    assert same(waves.write(writer, requests(), *given, place, again), whole)
    assert set(asked) == set(range(6)) - complete
    assert again.count == sum(lengths) and len(again.found) == 6
    file = next(place.glob("*/*.npz"))
    file.write_bytes(file.read_bytes()[:99])
    asked.clear()
    assert same(waves.write(writer, requests(), *given, place, Told()), whole)
    assert asked == [int(file.stem)]
    asked.clear()
    others = waves.write(writer, requests(temp=0.5), *given, place, Told())
    assert len(asked) == 6 and not same(others, whole) and len(list(place.iterdir())) == 1
    waves.forget(place)
    assert not place.exists()


@pytest.mark.bits
@pytest.mark.parametrize("call", [25, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 33))])
def test_a_run_that_is_stopped_within_a_wave_makes_the_same_files(
    tmp_path: Path, model: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    for owner in (supply._Own, stages._Written):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, owner, "tokens", call)
            with pytest.raises(KeyboardInterrupt):
                stages.answers(begin(tmp_path / "run", model))
        assert list((tmp_path / "run").glob("*/*.kept"))
    stages.answers(begin(tmp_path / "run", model))
    parts = ("prompts", "answers", "features")
    assert contents(tmp_path / "run", *parts) == contents(finished, *parts)


def test_progress_moves_by_tokens_within_a_wave(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[float, str]]] = {"prompts": [], "answers": []}
    to = progress.Bar.to

    def listening(bar: progress.Bar, done: float, note: str = "") -> None:
        to(bar, done, note)
        seen[bar.title].append((bar.done, bar.note))

    monkeypatch.setattr(progress.Bar, "to", listening)
    run = begin(tmp_path / "run", model)
    stages.answers(run)
    assert len({done for done, _ in seen["answers"]}) > 4 * len(
        list(tmp_path.glob("run/answers/*"))
    )
    assert any(0 < done < 4 for done, _ in seen["prompts"])
    assert any(note.endswith(" tokens of the next") for _, note in seen["prompts"])
    total = sum(len(c.answer) for s in stages.shards(tmp_path / "run") for c in s.conversations())
    assert seen["answers"][-1][0] == total


def test_options_of_the_text_are_decided_once_some_of_it_is_kept(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, supply._Own, "tokens", 9)
    run: Any = begin(tmp_path / "run", model)
    with pytest.raises(KeyboardInterrupt):
        stages.prompts(run)
    said = tiny_chat.refusal(lambda: begin(tmp_path / "run", model, seed=3))
    assert said.startswith("seed 3 was given, but the text in ")
