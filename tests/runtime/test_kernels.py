"""CPU kernels compiled for this machine's vector units compute the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
from mlx_redrafter.models.attention import softmax
from mlx_redrafter.runtime import compiler as kernels

PROGRAM = """
import mlx_redrafter, os, sys
if sys.argv[1] == "plain":
    os.environ.pop("CPLUS_INCLUDE_PATH", None)
import mlx.core as mx
x = mx.random.normal((64, 1000), key=mx.random.key(3)) * 9
y = mx.random.normal((64, 1000), key=mx.random.key(4))
f = mx.compile(lambda x, y: mx.exp(x) * y - x * mx.sigmoid(y) + mx.tanh(x) * mx.cos(y))
print(bytes(memoryview(mx.contiguous(f(x, y)))).hex()[:200000])
"""


def run(kind: str, folder: Path) -> str:
    environment = {**os.environ, "TMPDIR": str(folder / kind)}
    environment.pop("CPLUS_INCLUDE_PATH", None)
    (folder / kind).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind], env=environment, text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(kernels._level() is None, reason="needs Linux on x86-64 with AVX2")
def test_bits_are_those_of_the_plain_kernels(tmp_path: Path) -> None:
    plain, wide = run("plain", tmp_path), run("wide", tmp_path)
    assert len(plain) > 100_000
    assert plain == wide


def test_a_compiler_that_does_not_know_the_level_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CPLUS_INCLUDE_PATH", raising=False)
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels.prepare(tmp_path / "cache")
    assert "CPLUS_INCLUDE_PATH" not in os.environ


def test_a_users_include_path_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels._level() is None:
        monkeypatch.setattr(kernels, "_level", lambda: "x86-64-v3")
    monkeypatch.setattr(kernels, "_works", lambda *_: True)
    monkeypatch.setattr(kernels.sys, "platform", "linux")
    monkeypatch.setattr(kernels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(kernels.shutil, "which", lambda _: "/usr/bin/g++")
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/opt/include")
    kernels.prepare(tmp_path)
    first, last = os.environ["CPLUS_INCLUDE_PATH"].split(os.pathsep)
    assert Path(first).parent.name == "native" and last == "/opt/include"
    kernels.prepare(tmp_path)
    assert os.environ["CPLUS_INCLUDE_PATH"].count("native") == 1


@pytest.mark.bits
@pytest.mark.parametrize("length", [1, 7, 64, 128, 129, 384, 1000, 2048])
def test_softmax_has_the_bits_of_mlx(length: int) -> None:
    scores = mx.random.normal((3, 5, length), key=mx.random.key(length)) * 6
    seen = mx.random.uniform(shape=(5, length), key=mx.random.key(1)) > 0.3
    scores = mx.where(seen, scores, mx.finfo(mx.float32).min)
    expected = mx.softmax(scores, axis=-1, precise=True)
    for function in (softmax, mx.compile(softmax)):
        assert mx.array_equal(function(scores), expected).item()


@pytest.mark.skipif(sys.platform != "linux", reason="MLX compiles kernels with g++ on Linux only")
def test_a_kernel_that_is_compiled_is_noticed(tmp_path: Path) -> None:
    """By a folder that belongs to MLX: the test breaks where MLX puts its kernels elsewhere."""
    code = """
import time, mlx.core as mx
from mlx_redrafter.runtime import compiler as kernels
began = time.time() - 0.1
seen = [kernels.compiling(began)]
mx.eval(mx.compile(lambda x: mx.sin(x) * x + 1)(mx.ones((4,))))
print(*seen, kernels.compiling(began), kernels.compiling(time.time() + 1))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "False"]
