"""`serve`, `chat` and `generate` over three processes, as programs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_chat import write_chat_model

from mlx_redrafter import generate, load
from mlx_redrafter.distributed.sharding import shard
from mlx_redrafter.distributed.split import Split

HOSTS = ("--hosts", "localhost,localhost,localhost")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8}
    return write_chat_model(tmp_path_factory.mktemp("models") / "tiny", **heads)


def asked(url: str, question: str, **more: Any) -> str:
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12, **more}
    found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["message"]["content"])


@pytest.mark.bits
@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_two_answers_at_once(model: Path, split: str) -> None:
    command = [sys.executable, "-m", "mlx_redrafter", "serve", "-m", str(model), "--port", "0"]
    program = subprocess.Popen(
        [*command, *HOSTS, "--split", split], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert program.stderr is not None
    try:
        for line in program.stderr:
            if found := re.fullmatch(r"listening on (http://\S+)\n", line):
                break
            assert "error" not in line
        url = found[1] if found else ""
        questions = [("ba be", 0.0), ("do du fo", 0.8)]
        alone = [asked(url, text, temperature=temp, seed=4) for text, temp in questions]
        with ThreadPoolExecutor() as pool:
            runs = [
                pool.submit(asked, url, text, temperature=temp, seed=4) for text, temp in questions
            ]
            assert [run.result() for run in runs] == alone
        words = alone[1].split()
        cut = asked(url, questions[1][0], temperature=0.8, seed=4, stop=[words[2]])
        assert len(words) > 3 and cut.split() == words[: words.index(words[2])]
    finally:
        program.send_signal(signal.SIGTERM)
    assert "error" not in program.communicate(timeout=60)[1]
    assert program.returncode == 0


def run(*arguments: Any, stdin: str = "", seconds: float = 180) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "mlx_redrafter", *map(str, arguments)], input=stdin, text=True,
        capture_output=True, timeout=seconds, env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )  # fmt: skip


@pytest.mark.bits
def test_shares_from_folders_of_their_own(model: Path, tmp_path: Path) -> None:
    alone, tokenizer = load(str(model), None)
    text = generate(alone, tokenizer, "ba be bi", max_tokens=12)
    for kind in ("tensor", "pipeline"):
        shard(model, tmp_path / kind, 3, Split(kind))
        line = ("generate", "ba be bi", "--raw", "-m", tmp_path / kind, "--max-tokens", 12, "-q")
        found = run(*line, *HOSTS, "--no-draft")
        assert (found.returncode, found.stderr) == (0, "")
        assert found.stdout.rstrip("\n") == text.rstrip("\n")


def test_a_chat_line_by_line(model: Path) -> None:
    found = run("chat", "-m", model, *HOSTS, "-q", "--no-draft", stdin="ba be\nbi\n/exit\n")
    assert found.returncode == 0 and len(found.stdout.splitlines()) >= 2
    assert found.stderr == ""


def test_mlx_launch_starts_them_too(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "answer.py"
    script.write_text("from mlx_redrafter.cli.main import main\nmain()\n")
    launch = Path(sys.executable).parent / "mlx.launch"
    if not launch.is_file():
        pytest.skip("mlx.launch is not installed")
    command = [
        str(launch), "-n", "2", "--backend", "ring", "--python", sys.executable, "--", str(script),
        "generate", "ba be", "-m", str(model), "--json", "--max-tokens", "5",
    ]  # fmt: skip
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False, env=os.environ
    )
    lines = [line for line in found.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1, found.stdout + found.stderr
    assert 1 <= len(json.loads(lines[0])["tokens"]) <= 5


@pytest.mark.bits
@pytest.mark.model
@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_the_built_in_model_over_three(split: str) -> None:
    """9 heads and 3 of keys and values, 30 layers; its drafter's tree. Three compilers and 60
    exchanges a step: 45 to 80 s a run on two cores that others use too."""
    line = ("generate", "Why is the sky blue?", "--json", "--temp", 0.8, "--seed", 5)
    line = (*line, "--max-tokens", 10, *HOSTS, "--split", split)
    tree = ("--beam-width", 3, "--beam-length", 4, "--nodes", 8, "--lookup", 3)
    found = [run(*line, *more, seconds=600) for more in (("--no-draft",), tree)]
    assert [(one.returncode, one.stderr) for one in found] == [(0, "")] * 2
    plain, drafted = (json.loads(one.stdout) for one in found)
    assert plain["tokens"] == drafted["tokens"]
    assert drafted["stats"]["steps"] < plain["stats"]["steps"]
