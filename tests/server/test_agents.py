"""Codex and opencode, where they are installed, each do a task that needs one command.

The scripted engine calls whatever tool runs commands, and reports what came of it: the agents are
real, and so are their requests. MLX_REDRAFTER_TEST_CODEX and MLX_REDRAFTER_TEST_OPENCODE name the
programs if they are not on the path.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, running

from mlx_redrafter.server.clients import client_settings

pytestmark = pytest.mark.slow
TASK = "Run echo hi and tell me what it prints."
SHELLS = ("shell", "shell_command", "exec_command", "bash", "local_shell")


def program(name: str) -> str:
    found = os.environ.get(f"MLX_REDRAFTER_TEST_{name.upper()}") or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def arguments(function: dict[str, Any], command: str) -> dict[str, Any]:
    """A call of a tool that runs commands, by what it says of itself."""
    parameters = function["parameters"]
    given: dict[str, Any] = {}
    for name, schema in parameters["properties"].items():
        if name in ("command", "cmd"):
            words = ["bash", "-lc", command]
            given[name] = words if schema.get("type") == "array" else command
        elif name in parameters.get("required", ()):
            given[name] = "a command" if schema.get("type") == "string" else 1000
    return given


def answer(prompt: str) -> str:
    """A call first, and what it printed then."""
    results = re.findall(r"<tool_response>\n(.*?)</tool_response>", prompt, re.DOTALL)
    if results:
        return f"It printed {'hi' if 'hi' in results[-1] else 'nothing'}, and that is all."
    for line in prompt.splitlines():
        if line.startswith('{"type": "function"'):
            function = json.loads(line)["function"]
            if function["name"] in SHELLS:
                called = {"name": function["name"], "arguments": arguments(function, "echo hi")}
                return f"<tool_call>\n{json.dumps(called)}\n</tool_call>"
    return "A title"


def run(command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    work = home / "work"
    work.mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "NO_COLOR": "1"}
    return subprocess.run(
        command, cwd=work, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_codex(tmp_path: Path) -> None:
    codex = program("codex")
    with running(ScriptedEngine(answer, step=50, context=400_000), log_requests=True) as server:
        settings = tmp_path / ".codex" / "config.toml"
        settings.parent.mkdir()
        settings.write_text(client_settings("codex", server.url, "scripted"))
        done = run(
            [codex, "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox",
             TASK],
            tmp_path,
        )  # fmt: skip
        assert "It printed hi, and that is all." in done.stdout, (done, server.log)
        assert all(line.endswith(("tool_calls", "stop")) for line in server.log), server.log


def test_opencode(tmp_path: Path) -> None:
    opencode = program("opencode")
    with running(ScriptedEngine(answer, step=50, context=400_000), log_requests=True) as server:
        text = client_settings("opencode", server.url, "scripted").partition("\n")[2]
        (tmp_path / ".config" / "opencode").mkdir(parents=True)
        (tmp_path / ".config" / "opencode" / "opencode.json").write_text(text)
        done = run([opencode, "run", TASK], tmp_path)
        assert "It printed hi, and that is all." in done.stdout, (done, server.log)
        assert len(server.log) >= 3, server.log  # the title, the call, and the answer
