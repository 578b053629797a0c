"""Machines that are processes here, started by an ssh that notes how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mlx_redrafter.distributed.launch import free_ports

SSH = """#!/bin/bash
# -T -o BatchMode=yes NAME COMMAND
export PYTHONPATH="{folder}/$4:{path}"
bash -c "echo \\$\\$ > {folder}/$4.pid; $5" 2> >(tee -p {folder}/$4.err >&2)
code=$?
echo $code > {folder}/$4.code
exit $code
"""


class Machines:
    """Three of them, this one first, and a command on them."""

    names = ("one", "two", "three")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        ssh = folder / "bin" / "ssh"
        ssh.write_text(SSH.format(folder=folder, path=os.environ.get("PYTHONPATH", "")))
        ssh.chmod(0o755)
        ports = free_ports(len(self.names))
        self.hostfile = folder / "hosts.json"
        pairs = zip(self.names, ports, strict=True)
        self.hostfile.write_text(
            json.dumps([{"ssh": name, "ips": [f"127.0.0.1:{port}"]} for name, port in pairs])
        )

    def run(self, *arguments: Any, compiled: bool = False) -> subprocess.Popen[str]:
        """The first machine's command."""
        return self.start("-m", "mlx_redrafter", *arguments, compiled=compiled)

    def start(self, *program: Any, compiled: bool = False) -> subprocess.Popen[str]:
        """Python's on the first machine. compiled: not by default, which takes three compilers."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MLX_DISABLE_COMPILE": "1"}
        if compiled:
            del env["MLX_DISABLE_COMPILE"]
        env["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        env["PYTHONPATH"] = f"{self.folder / 'one'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        return subprocess.Popen(
            [sys.executable, *map(str, program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip

    def patched(self, name: str, code: str) -> None:
        """Let one of them run some code first."""
        (self.folder / name).mkdir()
        (self.folder / name / "sitecustomize.py").write_text(code)

    def pid(self, name: str) -> int:
        return int((self.folder / f"{name}.pid").read_text())

    def ended(self, name: str, seconds: float) -> tuple[int, list[str]]:
        """Exit code and lines of one of the others, that must end in time."""
        code = self.folder / f"{name}.code"
        end = time.monotonic() + seconds
        while not code.exists() or not code.read_text():
            assert time.monotonic() < end, f"{name} still runs"
            time.sleep(0.05)
        lines: list[str] = []
        while not lines and int(code.read_text()) == 1 and time.monotonic() < end:
            time.sleep(0.05)  # what copies its words may be later than its end
            lines = (self.folder / f"{name}.err").read_text().splitlines()
            lines = [line for line in lines if not line.startswith("[ring]")]
        return int(code.read_text()), lines

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(name), number)


def one_error(lines: list[str]) -> str:
    """The line with which a process ended; notes may stand before it."""
    *notes, error = lines or [""]
    assert error.startswith("error: ") and not any(n.startswith("error: ") for n in notes), lines
    return error
