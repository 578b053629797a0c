"""Every command on broken files, options, pipes and templates: one line, exit code 1 or 2.

No traceback, no lost file, nothing left behind; a chat answers the lines that follow. The inputs
are drawn by MLX_REDRAFTER_TEST_SEED, MLX_REDRAFTER_TEST_TIMES as many of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import broken_calls as calls
import broken_commands as commands
import broken_options as options
import broken_pipes as pipes
import broken_templates as templates
import pytest
from broken_world import (
    SEED,
    TIMES,
    Broken,
    content,
    copy_of,
    fault,
    in_time,
    lost,
    unanswered,
    unlike_ours,
    write_runs,
    write_world,
)
from halves import half_slow

from mlx_redrafter.errors import RedrafterError

import mlx.core as mx  # isort: skip

FILES = 160 * TIMES
BYTES = 50 * TIMES
REPORTS = {"doctor", "race", "exactness"}  # their exit code 1 says what they found


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No network, nothing kept for this user, and no time spent on compiling."""
    home = tmp_path_factory.mktemp("home")
    names = ["HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "MLX_REDRAFTER_CACHE"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        mx.disable_compile()
        yield
        mx.enable_compile()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runs(world: Path) -> Path:
    write_runs(world)
    return world


def drawn(kind: str, number: int | str) -> random.Random:
    return random.Random(f"{SEED} {kind} {number}")


def judge(broken: Broken, before: dict[str, bytes], outcome: Any = None) -> None:
    outcome = outcome or broken.outcome()
    program = commands.program_of(broken.arguments)
    wrong = fault(outcome, not REPORTS.isdisjoint(program))
    wrong = wrong or lost(broken, before, outcome.code)
    if outcome.code == 0 and "--json" in broken.arguments and commands.prints_json(program):
        json.loads(outcome.out or "{}", parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    assert wrong is None, (
        f"{wrong}: {broken}\n{outcome.out[-300:]}\n{outcome.err[-1500:]}\n{outcome.trace}"
    )


@pytest.mark.parametrize("number", half_slow(range(FILES)))
def test_files(number: int, runs: Path, tmp_path: Path) -> None:
    rng = drawn("files", number)
    kind, line = commands.LINES[number % len(commands.LINES)]
    broken = commands.broken_file(rng, runs, tmp_path, kind, line)
    judge_lines(broken, content(tmp_path), starts=kind == "talk.json")


@pytest.mark.parametrize("number", half_slow(range(len(options.every_option()) * TIMES)))
def test_options(number: int, world: Path, tmp_path: Path) -> None:
    every = options.every_option()
    broken = options.broken_option(
        drawn("options", number), world, tmp_path, *every[number % len(every)]
    )
    judge(broken, content(tmp_path))


@pytest.mark.parametrize("line", options.CONTRADICTIONS)
def test_contradictions(line: str, runs: Path, tmp_path: Path) -> None:
    broken = options.contradiction(drawn("contradictions", line), runs, tmp_path, line)
    judge(broken, content(tmp_path))


@pytest.mark.parametrize("number", range(len(templates.TEMPLATES) * TIMES))
def test_templates(number: int, world: Path, tmp_path: Path) -> None:
    rng = drawn("templates", number)
    template = templates.TEMPLATES[number % len(templates.TEMPLATES)]
    broken = templates.broken_template(rng, world, tmp_path, template)
    judge_lines(broken, content(tmp_path), starts=isinstance(template, str))


@pytest.mark.parametrize("number", range(BYTES))
def test_bytes(number: int, world: Path, tmp_path: Path) -> None:
    rng = drawn("bytes", number)
    what = list(pipes.BYTES)[number % len(pipes.BYTES)]
    line = pipes.READERS[number % len(pipes.READERS)]
    broken = pipes.broken_bytes(rng, world, tmp_path, what, line)
    judge_lines(broken, content(tmp_path))


def judge_lines(broken: Broken, before: dict[str, bytes], starts: bool = True) -> None:
    """A chat that `starts` goes on after an error; every other program is judged as ever."""
    outcome = broken.outcome()
    started = starts or outcome.code == 0 or outcome.out or outcome.err.count("error: ") > 1
    if broken.arguments[0] != "chat" or not started:
        return judge(broken, before, outcome)
    wrong = unanswered(broken, outcome)
    assert wrong is None, f"{wrong}: {broken}\n{outcome}"


@pytest.mark.parametrize("number", half_slow(range(2 * len(pipes.STREAMS) * TIMES)))
def test_streams(number: int, world: Path, tmp_path: Path) -> None:
    copy_of(world, tmp_path, ["model"])
    streams = list(pipes.STREAMS)[number % len(pipes.STREAMS)]
    line = pipes.SHORT[number % len(pipes.SHORT)]
    broken = Broken(drawn("streams", number), tmp_path, line.split(), b"hi\n", streams)
    outcome = pipes.process(broken, pipes.STREAMS[streams], {})
    if (
        "error closed" in streams
        or "error full" in streams
        or "all" in streams
        or "both" in streams
    ):
        assert outcome.code in (0, 1, 2) and not outcome.err, f"{broken}\n{outcome}"
    elif "leaves" in streams:
        assert outcome.code in (0, 1, 141), f"{broken}\n{outcome}"
        assert "Traceback" not in outcome.err and "Exception" not in outcome.err, outcome.err
    else:
        judge(broken, content(tmp_path), outcome)
    if streams == "standard output full":
        assert outcome.code == 1, f"{broken}\n{outcome}"


@pytest.mark.parametrize("number", half_slow(range(len(pipes.ENVIRONMENTS) * TIMES)))
def test_environments(number: int, world: Path, tmp_path: Path) -> None:
    rng = drawn("environments", number)
    copy_of(world, tmp_path, ["model", "drafter"])
    name = list(pipes.ENVIRONMENTS)[number % len(pipes.ENVIRONMENTS)]
    line = rng.choice([*pipes.SHORT, pipes.DRAFTED])
    broken = Broken(rng, tmp_path, line.split(), b"hi\n", name)
    judge(broken, content(tmp_path), pipes.process(broken, "{}", pipes.ENVIRONMENTS[name]))


@pytest.mark.parametrize("number", half_slow(range(60 * TIMES)))
def test_calls(number: int, world: Path, tmp_path: Path) -> None:
    """From the Python API nothing but an error of our own may come."""
    rng = drawn("calls", number)
    what, call = calls.broken_call(rng, world, number)
    try:
        with in_time():
            call()
    except RedrafterError as error:
        wrong = unlike_ours(f"error: {error}")
        assert wrong is None, f"{wrong}: {what}: {error}"


def test_every_command_has_an_input() -> None:
    found = {commands.program_of(command) for command in commands.commands()}
    read = {commands.program_of(line.split()) for _, line in commands.LINES}
    # The first takes seconds for a whole model, the second reads no file, the third goes on
    # where nothing is wrong (tests/server/test_command.py).
    assert found - {("doctor",), ("drafters",), ("serve",)} <= read
    assert ("bench", "needles") in found
    assert len(options.every_option()) > 200
