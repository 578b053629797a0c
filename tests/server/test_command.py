"""`mlx-redrafter serve` as a program: what it says, how it ends, what it prints for clients."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from tiny_chat import write_chat_model
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.cli import serve
from mlx_redrafter.server.clients import CLIENTS

SECRET = "bo bu da de"


class Program:
    """The server as a process; what it says on stderr is collected."""

    def __init__(self, model: Path, *options: str, **env: str) -> None:
        command = [sys.executable, "-m", "mlx_redrafter", "serve", "-m", str(model), *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **env}
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.decode().rstrip("\n"))

    def url(self) -> str:
        """Where it listens; AssertionError if it never does."""
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            for line in self.lines:
                if found := re.fullmatch(r"listening on (http://\S+)", line):
                    return found[1]
            time.sleep(0.02)
        raise AssertionError(self.lines)

    def ended(self, seconds: float = 60) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        self.reader.join(10)
        return code


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(
        tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=9000
    )


@pytest.fixture
def program(model: Path, tmp_path: Path) -> Iterator[Program]:
    browser = tmp_path / "browser"
    browser.write_text(f"#!/bin/sh\necho $1 > {tmp_path}/shown\n")
    browser.chmod(0o755)
    found = Program(
        model, "--no-draft", "--log-requests", "--grace", "0.5", "--open",
        MLX_REDRAFTER_PORT="0", MLX_REDRAFTER_API_KEY="right", BROWSER=str(browser),
    )  # fmt: skip
    yield found
    found.process.kill()
    found.ended()


def test_it_listens_answers_and_ends(program: Program, tmp_path: Path) -> None:
    url = program.url()
    assert program.lines[0] == f"listening on {url}"
    assert httpx.get(f"{url}/ready").status_code == 401
    assert "<title>" in httpx.get(f"{url}/").text
    key = {"authorization": "Bearer right"}
    (model,) = httpx.get(f"{url}/v1/models", headers=key).json()["data"]
    assert (model["id"], model["max_model_len"]) == ("tiny", 9000)
    body = {"messages": [{"role": "user", "content": SECRET}], "logit_bias": {"1": -1e30}}
    found = httpx.post(
        f"{url}/v1/chat/completions", headers=key, json={**body, "max_tokens": 4}, timeout=60
    )
    assert found.json()["usage"]["completion_tokens"] == 4
    lines: list[str] = []
    begun = threading.Event()

    def stream() -> None:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", headers=key, json={**body, "stream": True},
            timeout=60,
        ) as answer:  # fmt: skip
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=stream)
    reader.start()
    assert begun.wait(30)
    program.process.send_signal(signal.SIGTERM)
    at = time.monotonic()
    assert program.ended() == 0
    assert time.monotonic() - at < 0.5 + 8  # the grace, and a machine with other things to do
    reader.join(10)
    assert (tmp_path / "shown").read_text().strip() == url
    error = json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
    assert error["code"] == "unavailable"
    said = "\n".join(program.lines)
    assert re.search(r"^req_\w+ /v1/chat/completions: prompt 9 tokens, answer 4 tokens", said, re.M)
    assert said.count("\n") == 2
    told = re.sub(r"req_\w+|http://\S+", "", said)
    assert not any(word in told for word in SECRET.split())


def test_a_second_signal_ends_it_at_once(model: Path) -> None:
    program = Program(model, "--no-draft", "--port", "0", "--grace", "600")
    try:
        body = {"prompt": "ba", "stream": True, "logit_bias": {"1": -1e30}}
        url = program.url()
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            pieces = answer.iter_bytes()  # one that is dropped closes the connection
            next(pieces)
            program.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert program.process.poll() is None
            program.process.send_signal(signal.SIGINT)
            assert program.ended() == 0
        assert not any("Traceback" in line for line in program.lines)
    finally:
        program.process.kill()
        program.ended()


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    program = Program(tmp_path / "nowhere", "--port", "0")
    assert program.ended(120) == 1
    assert len(program.lines) == 1
    assert program.lines[0].startswith("error: ")
    assert "nowhere" in program.lines[0]


def said(*options: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit code, error) of a command line that ends before a model is loaded."""
    result = CliRunner().invoke(cli.app, ["serve", *options], env=env or {})
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--port", "70000"], "--port 70000 is not possible: use 0 to 65535"),
        (["--queue", "-1"], "queue -1 is not possible: use 0 or more"),
        (["--context", "1"], "context 1 is not possible: use 2 or more"),
        (["--grace", "nan"], "--grace nan is not possible: use 0 to 86400"),
        (["--temp", "-1"], "temp -1.0 is not possible: use 0 to 100"),
        (["--max-tokens", "0"], "max_tokens 0 is not possible"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others: give --api-key"),
        (["--api-key", ""], "the API key is empty or not ASCII"),
        (["--api-key", "a", "--api-key-file", "b"], "--api-key and --api-key-file are both given"),
        (["--api-key-file", "no/such"], "no/such cannot be read (No such file or directory)"),
        (["--tool-parser", "x"], "there is no tool parser 'x'"),
        (["--chat-template-config", "x"], "--chat-template-config x is not a JSON object"),
        (["--show-config", "x"], "there is no client 'x': use one of aider, claude"),
        (["--open", "--no-ui"], "--open shows the page, and --no-ui leaves it out: give one"),
        (["--sparse-prefill-config", "x"], "--sparse-prefill-config needs"),
    ],
)
def test_impossible_options(options: list[str], error: str) -> None:
    code, text = said(*options)
    assert code == 1
    assert text.startswith(f"error: {error}")
    assert text.count("\n") == 1


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, text = said(env={"MLX_REDRAFTER_PORT": port})
    assert code == 1
    assert text == (
        f"error: 127.0.0.1:{port} cannot be listened on (address already in use): choose another "
        "--port or --host\n"
    )


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, text = said()
    assert code == 1
    assert text == (
        "error: serve needs starlette and uvicorn and pydantic and prometheus_client: pip install "
        "'mlx-redrafter[serve]'\n"
    )


def shown(client: str, *options: str) -> str:
    result = CliRunner().invoke(cli.app, ["serve", "--show-config", client, *options])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("client", CLIENTS)
def test_settings_for_clients(client: str) -> None:
    text = shown(client, "-m", "org/some-model", "--port", "9999")
    assert "http://127.0.0.1:9999" in text
    assert "$" not in text.replace("$ ", "")
    assert client == "open-webui" or "some-model" in text


def test_settings_are_of_the_form_that_clients_read() -> None:
    codex: dict[str, Any] = tomllib.loads(shown("codex"))
    assert codex["model_providers"][codex["model_provider"]]["wire_api"] == "responses"
    opencode = json.loads(shown("opencode").partition("\n")[2])
    assert opencode["provider"]["mlxr"]["options"]["baseURL"] == "http://127.0.0.1:8080/v1"
    assert json.loads(shown("zed").partition("\n")[2])["language_models"]
    for client in ("continue", "llm"):
        assert yaml.safe_load(shown(client))


@pytest.mark.parametrize("client", CLIENTS)
def test_settings_for_a_server_with_a_key(client: str) -> None:
    """Where to put it, never the key itself."""
    text = shown(client, "--api-key", "secret")
    assert "secret" not in text
    wanted = {"codex": 'env_key = "MLX_REDRAFTER_API_KEY"', "llm": "api_key_name", "zed": "http"}
    assert wanted.get(client, "YOUR-KEY") in text


def test_every_option_reaches_the_settings(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret\nmore\n")
    options = serve.ServeOptions(
        host="::1", port=1, queue=3, grace=4.5, api_key_file=key, max_tokens=9, temp=0.5, top_k=7,
        allowed_origins="https://a.example, *", allowed_hosts="Box.example", strict_model=True,
        log_requests=True, reasoning="off", tool_parser="hermes", chat_template_config='{"a": 1}',
        sparse_prefill="xattention", sparse_prefill_tau=0.8,
        no_ui=True,
    )  # fmt: skip
    found = options.settings()
    assert (found.host, found.port, found.queue, found.grace) == ("::1", 1, 3, 4.5)
    assert (found.api_key, found.max_tokens) == ("secret", 9)
    assert found.sampling == {"temp": 0.5, "top_k": 7}
    assert found.allowed_origins == ("https://a.example", "*")
    assert found.allowed_hosts == ("box.example",)
    assert (found.strict_model, found.log_requests, found.reasoning) == (True, True, "off")
    assert (found.tool_parser, found.template) == ("hermes", {"a": 1})
    assert found.sparse_prefill is not None and not found.page
    assert (found.sparse_prefill.mode, found.sparse_prefill.tau) == ("xattention", 0.8)
