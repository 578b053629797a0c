"""Machines that are lost, do not start, or do not fit: everybody ends with one line, and soon."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_ssh import Machines, one_error
from tiny_chat import write_chat_model

from mlx_redrafter.distributed.launch import from_file, named
from mlx_redrafter.distributed.wire import ClusterError

SOON = 15.0  # seconds
START = 30.0  # seconds that a program may take to begin, where two cores are shared with others
LONG = ("--max-tokens", "-1", "--seed", "3", "--temp", "1", "--logit-bias", "1=-inf")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = tmp_path_factory.mktemp("model")
    return write_chat_model(folder, max_position_embeddings=20000, **heads)


def begun(machines: Machines, model: Path, *more: str) -> subprocess.Popen[str]:
    """An answer of which something was written."""
    line = ("generate", "ba be", "-m", model, "--no-draft", "-q", *LONG, *more)
    first = machines.run(*line, "--hostfile", machines.hostfile)
    assert first.stdout is not None and first.stderr is not None
    if not first.stdout.read(1):
        raise AssertionError(first.stderr.read())
    return first


def first_ended(first: subprocess.Popen[str], start: float = 0) -> tuple[int, list[str]]:
    """Soon; start: seconds that come before."""
    out = first.communicate(timeout=SOON + start)
    # What the ssh of these tests says of a process that was killed is not ours.
    return first.returncode, [line for line in out[1].splitlines() if "/bin/ssh: line" not in line]


def killed(folder: Path, model: Path, rank: int, wait: float, *more: str) -> None:
    """One machine is killed so many seconds after the first word."""
    machines = Machines(folder)
    first = begun(machines, model, *more)
    time.sleep(wait)
    victim = Machines.names[rank]
    first.kill() if rank == 0 else machines.kill(victim)
    start = time.monotonic()
    code, lines = first_ended(first)
    if rank:
        assert code == 1 and victim in one_error(lines)
    for name in {*Machines.names[1:]} - {victim}:
        code, lines = machines.ended(name, SOON - (time.monotonic() - start))
        assert code == 1
        one_error(lines)


SPLITS = (("--split", "tensor", "--shares", "2,1,1"), ("--split", "pipeline"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_whichever_machine_is_killed(model: Path, tmp_path: Path, rank: int) -> None:
    """Of the command's; seen to fail: the end of a connection is not noticed."""
    killed(tmp_path, model, rank, random.Random(rank).random(), *SPLITS[rank % 2])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(30))
def test_machines_killed_at_random(number: int, model: Path, tmp_path: Path) -> None:
    wait = 3 * random.Random(number).random()
    killed(tmp_path, model, number % 3, wait, *SPLITS[number // 3 % 2])


JOINING = "import mlx_redrafter.distributed.cluster as m\nm.join_ring"
TESTING = "import mlx_redrafter.distributed.cluster as m\nm.test"
LOADING = "import mlx_redrafter.distributed.{} as m\nm.parts_of"


@pytest.mark.slow
@pytest.mark.parametrize("name", Machines.names)
@pytest.mark.parametrize("where", [JOINING, TESTING, LOADING])
def test_a_machine_is_killed_before_the_first_answer(
    name: str, where: str, model: Path, tmp_path: Path
) -> None:
    """While the others join, MLX holds Python's lock there. Seen to fail: without the timer of
    `End` they wait for ever."""
    machines = Machines(tmp_path)
    code = where.format("lead" if name == "one" else "follow")
    machines.patched(name, f"{code} = lambda *_, **__: os.kill(os.getpid(), 9)\nimport os\n")
    first = machines.run(*QUESTION, model, "--hostfile", machines.hostfile)
    code, lines = first_ended(first, START)
    if name != "one":
        assert code == 1
        one_error(lines)
    for other in {*Machines.names[1:]} - {name}:
        code, lines = machines.ended(other, SOON)
        assert code == 1
        one_error(lines)


@pytest.mark.slow
def test_a_machine_that_hangs_is_lost(model: Path, tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    first = begun(machines, model)
    machines.kill("two", signal.SIGSTOP)
    code, lines = first_ended(first, 5)  # which begins when it is missed
    assert code == 1 and "two, rank 1 is lost" in one_error(lines)
    code, lines = machines.ended("three", SOON)
    assert code == 1
    one_error(lines)
    assert machines.ended("two", SOON)[0] == 128 + signal.SIGKILL  # stopped, and ended all the same


@pytest.mark.slow
def test_a_machine_that_does_not_start(model: Path, tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    machines.patched("three", "import os; os.write(2, b'error: no such program\\n'); os._exit(127)")
    code, lines = first_ended(
        machines.run(*QUESTION, model, "--hostfile", machines.hostfile), START
    )
    assert code == 1
    assert "three, rank 2 ended before it was connected (no such program)" in one_error(lines)
    assert machines.ended("two", SOON)[0] == 1


@pytest.mark.slow
def test_a_machine_that_never_answers(model: Path, tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    machines.patched("three", "import time; time.sleep(60)")
    first = machines.run(*QUESTION, model, "--hostfile", machines.hostfile)
    code, lines = first_ended(first, START)
    assert code == 1 and "three, rank 2 was not there after 11 s" in one_error(lines)
    machines.kill("three")


QUESTION = ("generate", "ba", "--max-tokens", "2", "--no-draft", "-q", "-m")


@pytest.mark.slow
def test_other_versions_and_weights_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    machines = Machines(tmp_path / "versions")
    machines.patched(
        "two",
        "import importlib.metadata as m\nold = m.version\n"
        "m.version = lambda name: '0.1' if name == 'mlx' else old(name)\n",
    )
    code, lines = first_ended(
        machines.run(*QUESTION, model, "--hostfile", machines.hostfile), START
    )
    assert code == 1 and "two, rank 1 has mlx 0.1 and this machine" in one_error(lines)
    for name in ("two", "three"):
        assert machines.ended(name, SOON)[0] == 1
    (tmp_path / "weights").mkdir()
    machines = Machines(tmp_path / "weights")
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-2] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    machines.patched(
        "three",
        "import mlx_redrafter.distributed.wire as w\nold = w.json.loads\n"
        f"w.json.loads = lambda text: old(text.replace({str(model)!r}.encode(), "
        f"{str(other)!r}.encode()) if isinstance(text, bytes) else text)\n",
    )
    code, lines = first_ended(
        machines.run(*QUESTION, model, "--hostfile", machines.hostfile), START
    )
    assert code == 1 and "three, rank 2 has other weights" in one_error(lines)
    for name in ("two", "three"):
        code, lines = machines.ended(name, SOON)
        assert code == 1 and "the first machine has ended" in one_error(lines)


def test_host_files_and_names_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "hosts.json"
    for content in ("x", "{}", "[]", '[{"ssh": 1}]', '[{"ips": []}, {}]', "[1, 2]"):
        file.write_text(content)
        with pytest.raises(ClusterError):
            from_file(file)
    with pytest.raises(ClusterError, match="cannot be read"):
        from_file(tmp_path / "none")
    file.write_text(json.dumps({"backend": "mpi", "hosts": [{"ssh": "a"}, {"ssh": "b"}]}))
    with pytest.raises(ClusterError, match="needed: ring or jaccl"):
        from_file(file)
    with pytest.raises(ClusterError, match="1 machine is given"):
        named("one")
    with pytest.raises(ClusterError, match="is not found"):
        named("localhost,no such machine").environment()
