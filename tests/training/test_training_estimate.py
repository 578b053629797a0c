"""How long training will take: what is measured of it, and the arithmetic."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import tiny_chat
from conftest import prompt_of
from test_training_adapted import chat_model
from test_training_thoughts import thinker  # noqa: F401
from tiny_chat import SMALL, begin, contents, lines_of
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.batched import BatchedTarget
from mlx_redrafter.models.sequences import Answer, Request, Told
from mlx_redrafter.training import estimate, memory, pace, stages, trial
from mlx_redrafter.training.config import Evaluating, TrainConfig
from mlx_redrafter.training.pace import Pace
from mlx_redrafter.training.trial import Fitted, Steps, Stopwatch, Trial, Written, completed

model = tiny_chat.model


# Steps of writing


def test_a_step_is_timed_without_the_prompt_and_what_interrupts_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])
    watch, waver = Stopwatch(3.0), [0.1, 0.1, 7.0, 0.1, 0.12, 0.08]
    now[0] += 100.0  # the prompts
    with pytest.raises(trial._EnoughError):
        for i in range(1000):
            watch.tokens(8)
            now[0] += 5.0 if i < 2 else waver[i % len(waver)]  # graphs are made first
    assert watch.step == pytest.approx(0.1)
    assert np.mean(np.diff(watch.times)) > 0.15  # the test can fail


def test_a_writer_tells_of_every_step_of_all_answers(target: Decoder) -> None:
    watch = Stopwatch(60.0)
    BatchedTarget(target, ()).write([Request([1, 2, 3], 0.0, 0)] * 3, 6, (), watch)
    assert len(watch.times) == 6


WAVERING = [
    [(1, 24, 0.10), (16, 24, 0.09), (64, 24, 0.12), (8, 256, 0.11)],  # as good as flat
    [(1, 24, 0.10), (16, 24, 0.05), (64, 24, 0.04), (8, 256, 0.03)],  # nothing makes sense
    [(1, 24, 0.2), (1, 256, 0.1)],  # one sequence at a time
]


@pytest.mark.parametrize("points", WAVERING)
def test_no_speed_is_negative_or_beyond_reason(points: list[tuple[int, int, float]]) -> None:
    (_, a, first), *_, (_, b, last) = points
    assert (last - first) / (b - a) < 1e-4  # what two single timings say: nothing at all, or less
    found = Steps.of(points)
    assert min(found.once, found.each, found.back) >= 0
    fastest = min(seconds for _, _, seconds in points)
    slowest = max(seconds for _, _, seconds in points)
    for rows in {1, points[-2][0]}:
        assert fastest / 70 < found.seconds(rows, 100) < 3 * slowest


def test_steps_that_follow_the_rule_are_found_exactly() -> None:
    true = Steps(0.05, 0.002, 1e-5)
    points = [(n, p, true.seconds(n, p)) for n, p in ((1, 16), (16, 16), (64, 16), (8, 256))]
    found = Steps.of([(n, p, s * (1 + 0.01 * (-1) ** i)) for i, (n, p, s) in enumerate(points)])
    for rows, before in ((1, 16), (64, 300), (192, 100)):
        assert found.seconds(rows, before) == pytest.approx(true.seconds(rows, before), rel=0.1)


def test_a_wave_shrinks_as_its_answers_end(
    target: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batched, sizes = BatchedTarget(target, ()), []
    real = batched.run

    def counted(tokens: np.ndarray, *rest: Any) -> Any:
        sizes.append(len(tokens))
        return real(tokens, *rest)

    monkeypatch.setattr(batched, "run", counted)
    requests = [Request(prompt_of(4, seed=i), 1.0, i) for i in range(24)]
    ends = {*range(0, 97, 12)}
    lengths = [len(a.tokens) for a in batched.write(requests, 24, ends)]
    rows = sum(sizes[1:])  # the first is the pass over the prompts
    simulated = Steps(0.0, 1.0, 0.0).wave(lengths, 24, 0)
    assert simulated == pytest.approx(rows + 24, rel=0.1)
    assert rows + 24 < 0.8 * 24 * max(lengths)  # the test can fail: all to the end
    assert Steps(0.0, 1.0, 0.0, together=False).wave(lengths, 24, 0) == pytest.approx(
        sum(lengths), rel=0.02
    )
    assert Steps(0.0, 0.0, 0.0, read=0.5).wave(lengths, 24, 10) == 120


def test_answers_that_were_cut_off_go_on() -> None:
    assert completed([5, 9, 20], [True, True, False], 0) == [5, 9, 20]  # none was cut off
    random = np.random.default_rng(0)
    true = np.minimum(random.geometric(1 / 150, size=2000), 256)
    for cut in (32, 100):
        found = completed(np.minimum(true, cut).tolist(), (true < cut).tolist(), 256 - cut)
        assert len(found) == 2000 and max(found) <= 256
        assert np.mean(found) == pytest.approx(true.mean(), rel=0.05)
        assert np.minimum(true, cut).mean() < 0.7 * true.mean()  # the test can fail
    assert completed([16] * 8, [False] * 8, 240)[-1] == 256  # none has ended


class Half:
    """A target of which every second answer ends; the others are cut off."""

    together, layers = True, ()

    def __init__(self, of: Decoder) -> None:
        self.target = of

    def write(self, requests: Sequence[Request], most: int, ends: Any, told: Told) -> list[Answer]:
        random = np.random.default_rng(requests[0].seed)
        tokens = random.integers(6, len(tiny_chat.WORDS), size=(len(requests), most)).tolist()
        none = np.zeros((most, 0, 0))
        answers = [
            Answer([*t[: most - 1], tiny_chat.END] if i % 2 else t, none)
            for i, t in enumerate(tokens)
        ]
        for i, answer in enumerate(answers):
            told.answer(i, answer)
        return answers


def test_the_share_of_usable_prompts_is_measured(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(tmp_path / "run", model)
    trials = Trial(run.target, run.tokenizer, run.config, tmp_path / "trial", (2,), False)
    monkeypatch.setattr(trial, "over", lambda *_: Half(cast(Decoder, run.target)))
    monkeypatch.setattr(trials, "_asking", lambda steps: steps)
    supply, written, usable = trials.prompts(Steps(1e-9, 0.0, 0.0))
    assert usable == 0.5 and len(supply.rows) == len(written.lengths) / 2
    assert set(written.lengths) == {run.config.prompt_tokens}  # what cannot be used takes time too


def test_prompts_are_timed_as_many_and_as_they_are_drawn(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = begin(tmp_path / "run", model), []
    trials = Trial(run.target, run.tokenizer, run.config, tmp_path / "trial", (2,), False)

    def step(writer: Any, requests: Sequence[Request]) -> tuple[int, int, float]:
        seen.append((len(requests), {r.top_p for r in requests}, writer.layers))
        return len(requests), 24, 0.05 + (0.01 + 24 * 1e-4) * len(requests)

    monkeypatch.setattr(trial, "_step", step)
    found = trials._asking(Steps(9.0, 9.0, 1e-4, read=0.5))
    assert seen == [(3, {0.9}, ()), (12, {0.9}, ())]
    assert found.seconds(12, 0) == pytest.approx(0.17) and found.read == 0.5
    assert found.seconds(12, 50) == pytest.approx(0.17 + 12 * 50 * 1e-4)


# Arithmetic


STEPS = Steps(0.0, 0.01, 0.0, read=0.001)
FOUND = estimate.Measured(
    expected=192.0, read=0.001, prompts=Written([32], STEPS), usable=0.5,
    answers=Written([128] * 4, STEPS), before=40.0, fitted=Fitted(2.0, 3.0, 0.25, 10), loading=1.0,
    pace=Pace(once=2.0, step=0.1, recorded=0.3, per_step=1.0, trial=7.0),
)  # fmt: skip


def rows(
    config: TrainConfig, found: estimate.Measured = FOUND, each: int = 6, **evaluating: int
) -> dict[str, estimate.Stage]:
    names = [name for stage in memory.STAGES for part in stage for name in part]
    parts = dict.fromkeys(("target", *names), 1)
    stages = estimate._stages(config, Evaluating(**evaluating), parts, each, found)
    return {stage.name: stage for stage in stages}


def small(out: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        out=out, answer_tokens=16_000, positions=5000, batch_positions=1000, batch=25
    )
    return replace(config, **changes)


def test_text_is_written_in_whole_waves_and_batches(tmp_path: Path) -> None:
    config = small(tmp_path / "run")
    found, wave = rows(config), 75 * 32 * 0.01 + 75 * 16 * 0.001  # what opens a turn is read
    # 16,000 tokens / (0.75 x 256) = 84, in whole batches 100; waves of 75, half of them usable
    assert found["prompts"].seconds == pytest.approx(3 * wave)
    # 5 batches of 25 x 128: 125 answers and 2 % need 15 prompts more than those, which is a wave
    answering = 5.5 * (25 * 128 * 0.01 + 25 * 40 * 0.001)
    assert found["answers"].seconds == pytest.approx(answering + wave)
    assert "50% of those written" in found["prompts"].detail
    slower = FOUND._replace(prompts=Written([32], STEPS, 2.0), answers=Written([128], STEPS, 3.0))
    again = rows(config, slower)
    assert again["prompts"].seconds == 2 * found["prompts"].seconds
    assert again["answers"].seconds == pytest.approx(3 * answering + 2 * wave)
    few = rows(config, FOUND._replace(usable=0.25))
    assert few["prompts"].seconds == pytest.approx(6 * wave)
    file = tmp_path / "prompts.jsonl"
    assert rows(small(tmp_path / "run", prompts=file))["prompts"].seconds == 0


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    usual, out = rows(small(tmp_path / "new")), tmp_path / "run"
    file = tmp_path / "old.jsonl"
    file.write_text(lines_of(*[{"prompt": [1], "answer": [2] * 1600}] * 4))
    some = rows(small(out, answers=file))
    assert some["answers"].seconds == pytest.approx(3.5 * 33)  # and enough prompts
    assert usual["fit"].seconds == pytest.approx(3 + 5 * 2 + 1.2 * 0.25 * 1.5128, rel=0.01)
    # their features are computed, with their prompts
    read = 6400 * (1 + 40 / 128) * 0.001
    assert some["fit"].seconds == pytest.approx(usual["fit"].seconds + read, rel=0.01)
    assert rows(small(out, answers=file, answer_tokens=1000))["answers"].seconds == 0
    (out / "answers").mkdir(parents=True)
    shutil.copy(file, out / "answers" / "00000.jsonl")  # a run that goes on
    (out / "prompts").mkdir()
    (out / "prompts" / "00000.jsonl").write_text(lines_of(*[{"prompt": "a"}] * 200))
    going = rows(small(out))
    assert going["answers"].seconds == pytest.approx(3.5 * 33)
    assert going["prompts"].seconds == 0


def test_features_that_do_not_fit_are_read_again(tmp_path: Path) -> None:
    config = small(tmp_path / "run", positions=48_000)
    fits = rows(config, each=1000)
    assert "again" not in fits["fit"].detail
    half = replace(config, cache_gb=8_000 * 1000 / 1e9)  # one of the 5 batches is always there
    found = rows(half, each=1000)
    passes, per_token = 48_000 / (16_000 * 31 / 32), (1 + 40 / 128) * 0.001
    once = 4 * 3200 * per_token  # 3 of 3.1 passes at once
    assert found["fit"].seconds - fits["fit"].seconds == pytest.approx(once * passes / 3)
    assert found["fit"].disk == fits["fit"].disk and found["answers"].disk > 8e6
    never = rows(replace(config, positions=1000, cache_gb=0.008), each=1000)
    assert never["fit"].seconds - rows(replace(config, positions=1000))["fit"].seconds < once / 10


def test_the_evaluation_is_the_one_that_will_be(tmp_path: Path) -> None:
    config = small(tmp_path / "run")
    given = rows(config, prompts=30, max_tokens=64)["evaluate"]
    assert "30 prompts of 64 tokens" in given.detail
    live, recorded = 30 * 3 * 0.1 / estimate._YIELD, 24 * 0.3
    assert given.seconds == pytest.approx(1 + 2 + (live + recorded) * 2 * 64)
    short = FOUND._replace(answers=Written([16], STEPS))  # shorter than they may be
    assert rows(config, short, prompts=30, max_tokens=64)["evaluate"].seconds == pytest.approx(
        1 + 2 + (live + recorded) * 2 * 16
    )
    long = rows(small(tmp_path / "run", positions=12_000_000), prompts=30, max_tokens=64)
    live /= 2.05 / estimate._YIELD
    assert long["evaluate"].seconds == pytest.approx(1 + 2 + (live + recorded) * 128, rel=0.01)
    chosen = rows(small(tmp_path / "run", positions=400_000))
    assert chosen["evaluate"].seconds < 0.4 * chosen["fit"].seconds
    assert chosen["evaluate"].seconds > 7  # it is tried first


@pytest.mark.slow
@pytest.mark.parametrize(
    "of, kind",
    [("llama", "redrafter"), ("llama", "eagle3"), ("lfm2", "medusa"), ("thinker", "redrafter")],
)
def test_estimate_measures_every_stage_and_writes_nothing(
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    of: str,
    kind: str,
    request: pytest.FixtureRequest,
) -> None:
    for name in ("SECONDS", "_WRITING"):
        monkeypatch.setattr(trial, name, 0.02)
    if of == "thinker":
        model = request.getfixturevalue(of)
    elif of != "llama":  # one sequence at a time
        model = chat_model(tmp_path / "model", of)
    out = tmp_path / "run"
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    options += ["--eval-prompts", "3", "--eval-tokens", "8", "--kind", kind]
    arguments = ["train", "--estimate", "-m", str(model), "-o", str(out), *options]
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.stderr
    shown = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert shown[:6] == ["stage", "prompts", "answers", "fit", "evaluate", "all"]
    assert "3 prompts of 8 tokens" in result.stdout and not out.exists()


# The evaluation


def test_the_evaluation_takes_a_part_of_the_time_of_the_fit() -> None:
    speed = Pace(once=10.0, step=0.05, recorded=0.2, per_step=2.0)
    nothing = Evaluating()
    full = speed.seconds(92, 128)
    assert full == pytest.approx(10 + (92 * 3 * 0.025 + 24 * 0.2) * 2 * 128)
    assert speed.chosen(nothing, full) == (92, 128)
    for room in (0.9 * full, 0.5 * full, 0.2 * full, 0.08 * full):
        found = speed.chosen(nothing, room)
        assert 0.85 * room < speed.seconds(*found) <= room
    assert speed.chosen(nothing, 0.8 * full)[1] == 128  # first there are fewer prompts
    assert speed.chosen(nothing, 0.3 * full)[0] == 24  # then shorter answers
    assert speed.chosen(nothing, 0.0) == (6, 32)  # and a few in any case
    assert speed.chosen(Evaluating(50, 200), 0.0) == (50, 200)
    assert speed.chosen(Evaluating(50), 0.0) == (50, 32)
    assert speed.chosen(Evaluating(None, 16), 1e9) == (92, 16)
    assert pace.room(300.0) == 100.0


def test_the_pace_is_that_of_the_second_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])

    def evaluate(*_: Any, max_tokens: int, on_answer: Any) -> Any:
        # Before; live, six answers a prompt, of which the first has graphs to make; then recorded.
        for seconds in [6.0, 3.2] + [9.0] * 6 + [0.8] * 6 + [5.0, 1.6, 4.0, 1.6]:
            now[0] += seconds
            on_answer()
        stats = SimpleNamespace(steps=24, tokens=32)
        return SimpleNamespace(live=[SimpleNamespace(group="all", stats=stats)] * 6)

    monkeypatch.setattr(pace.positions, "evaluate", evaluate)
    found = pace.measure(cast(Any, None), cast(Any, None))
    assert found.step == pytest.approx(0.8 / 12) and found.recorded == pytest.approx(0.1)
    assert found.per_step == pytest.approx(4 / 3) and found.trial == pytest.approx(80.2)
    assert found.once == pytest.approx(54 - 4.8 + 9 - 3.2 + 2.8)
    assert found.first == pytest.approx(0.2)


@pytest.mark.parametrize(
    "asked, wanted", [((None, None), (6, 32)), ((3, None), (3, 32)), ((3, 9), (3, 9))]
)
def test_how_much_is_evaluated_depends_on_the_time_of_the_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: tuple[int | None, ...],
    wanted: tuple[int, int],
) -> None:
    slow = Pace(once=0.0, step=1.0, recorded=1.0, per_step=1.0)
    monkeypatch.setattr(pace, "measure", lambda *_: slow)
    nothing: Any = None

    def extent(*asked: int | None) -> tuple[int, int]:
        return pace.extent(tmp_path, Evaluating(*asked), nothing, nothing)

    assert extent(None, None) == (92, 128)  # there was no fit here
    monkeypatch.setattr(pace, "checkpoint", lambda _: ({}, {"seconds": "30.0"}))
    assert extent(*asked) == wanted
    monkeypatch.setattr(pace, "checkpoint", lambda _: ({}, {"seconds": "1e9"}))
    assert extent(None, None) == (92, 128)


@pytest.mark.slow
def test_the_card_says_how_many_prompts_there_was_time_for(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(tmp_path / "run", model)
    stages.answers(run)
    stages.fit(run)
    slow = Pace(once=0.0, step=1e9, recorded=0.0, per_step=1.0)
    monkeypatch.setattr(pace, "measure", lambda *_: slow)
    monkeypatch.setattr(pace, "_LEAST", (2, 8))
    stages.evaluate(run)
    assert "with 2 prompts, answers of 8 tokens" in capsys.readouterr().err
    card = contents(run.config.out, "drafter")["drafter/README.md"].decode()
    assert "live with 2 prompts" in card and "--eval-prompts 2 --eval-tokens 8" in card


def test_the_model_is_given_back_before_the_evaluation(tmp_path: Path, model: Path) -> None:
    run = begin(tmp_path / "run", model)
    stages.answers(run)
    stages.fit(run)
    weights, before = memory.weights_of(run.target), mx.get_active_memory()
    run.forget()
    assert before - mx.get_active_memory() >= weights
