"""The BLAS that MLX calls on Linux: same bits as the reference, rows independent of each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("g++") is None,
    reason="the BLAS is chosen (and compiled) on Linux only",
)

ROOT = Path(__file__).parents[2]

STATUS = """
import json
from mlx_redrafter.runtime import blas
print(json.dumps([blas.status().name, blas.status().detail]))
"""

# The package chooses at import; after "reference" nothing is loaded, so it can choose again.
CHOOSE_AGAIN = """
import os
from mlx_redrafter.runtime import blas
{change}
os.environ["MLX_REDRAFTER_BLAS"] = "row-exact"
blas.status.cache_clear()
"""

# Prints the digest of every product, and the rows that change when computed alone.
PRODUCTS = """
import ctypes, hashlib, json
from mlx_redrafter.runtime import blas
blas.prepare()
import mlx.core as mx

def normal(*shape):
    return mx.random.normal(shape)

def digest(x):
    mx.eval(x)
    return hashlib.sha256(bytes(memoryview(x))).hexdigest()

def alone(x, product):
    whole = product(x)
    return sum(digest(whole[i : i + 1]) != digest(product(x[i : i + 1])) for i in range(len(x)))

mx.random.seed(7)
digests, changed = {}, 0
for n, k in [(1, 1), (1, 40), (5, 3), (16, 16), (33, 50), (64, 64), (129, 577), (1100, 301)]:
    w, v = normal(n, k), normal(k, n)
    c = normal(70, n)
    for m in (1, 2, 3, 7, 8, 9, 16, 17, 70):
        x = normal(m, k)
        digests[f"NT {m} {n} {k}"] = digest(x @ w.T)
        digests[f"NN {m} {n} {k}"] = digest(x @ v)
        digests[f"NT addmm {m} {n} {k}"] = digest(mx.addmm(c[:m], x, w.T))
        digests[f"NN addmm {m} {n} {k}"] = digest(mx.addmm(c[:m], x, v, alpha=0.3, beta=-1.7))
    changed += alone(x, lambda x: x @ w.T) + alone(x, lambda x: x @ v)
for m in (1, 6, 200):
    q, k, v = normal(2, 4, m, 24), normal(2, 1, 77, 24), normal(2, 1, 77, 24)
    digests[f"QK {m}"] = digest(q @ k.swapaxes(-1, -2))
    digests[f"PV {m}"] = digest((q @ k.swapaxes(-1, -2)) @ v)
for m in (1, 8, 150):
    x, w = normal(m, 576), normal(700, 576)
    digests[f"threads {m}"] = digest(x @ w.T)
column = normal(64, 1)
digests["one row with unit strides"] = digest(column.T @ normal(64, 90))

def address(library):
    return ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value

status = blas.status()
taken = status.name == "row-exact" and address(ctypes.CDLL(None)) == address(
    ctypes.CDLL(status.detail.split(";")[0])
)
print(json.dumps({"name": status.name, "digests": digests, "changed": changed, "taken": taken}))
"""


def start(
    code: str, cache: Path, choice: str = "auto", **environment: str
) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MLX_REDRAFTER_CACHE": str(cache),
        "MLX_REDRAFTER_BLAS": choice,
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code: str, cache: Path, choice: str = "auto", **environment: str) -> Any:
    process = start(code, cache, choice, **environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def reference(cache: Path) -> Any:
    return run(PRODUCTS, cache, "reference")


@pytest.mark.parametrize("threads", ["1", "2", "3"])
def test_row_exact_has_the_bits_of_the_reference(cache: Path, reference: Any, threads: str) -> None:
    ours = run(PRODUCTS, cache, "row-exact", OMP_NUM_THREADS=threads)
    assert ours["name"] == "row-exact"
    assert ours["taken"], "MLX does not call our cblas_sgemm"
    different = [
        case for case, bits in reference["digests"].items() if ours["digests"][case] != bits
    ]
    assert different == []
    assert ours["changed"] == reference["changed"] == 0


def test_fused_multiply_add_would_be_noticed(tmp_path: Path, reference: Any) -> None:
    """The mutation: the compiler flag that the bits hang on, turned over."""
    change = """
other = {"-ffp-contract=off": "-ffp-contract=fast", "-ffp-contract=fast": "-ffp-contract=off"}
flags = [other.get(flag, flag) for flag in blas._flags()]
assert flags != blas._flags()
blas._flags = lambda: flags
"""
    code = CHOOSE_AGAIN.replace("{change}", change) + PRODUCTS
    if " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no fused multiply-add")
    mutant = run(code, tmp_path, "reference")
    assert mutant["name"] == "row-exact"
    assert mutant["digests"] != reference["digests"]


def test_transposed_first_factor(cache: Path) -> None:
    """The training shapes."""
    code = """
import json
blas.prepare()
import mlx.core as mx
a, b = mx.random.normal((150, 33)), mx.random.normal((150, 41))
exact = (a[:, :, None] * b[:, None, :]).sum(axis=0)
error = mx.maximum(mx.abs(a.T @ b - exact).max(), mx.abs(a.T @ mx.array(b.T).T - exact).max())
print(json.dumps([blas.status().name, error.item()]))
"""
    name, error = run(CHOOSE_AGAIN.replace("{change}", "") + code, cache, "reference")
    assert name == "row-exact"
    assert error < 1e-4


def test_concurrent_first_builds(tmp_path: Path) -> None:
    processes = [start(STATUS, tmp_path) for _ in range(4)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [name for name, _ in answers] == ["row-exact"] * 4
    assert len(list((tmp_path / "blas").iterdir())) == 1


def test_no_compiler(tmp_path: Path) -> None:
    name, detail = run(STATUS, tmp_path, PATH="")
    assert name == "reference"
    assert "no g++" in detail


def test_failing_compiler(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'error: it is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    name, detail = run(STATUS, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert name == "reference"
    assert "it is broken" in detail


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    name, detail = run(STATUS, file)
    assert name == "reference"
    assert "could not be built" in detail


def test_damaged_library(tmp_path: Path) -> None:
    run(STATUS, tmp_path)
    (library,) = (tmp_path / "blas").iterdir()
    library.write_bytes(b"not a library")
    name, detail = run(STATUS, tmp_path)
    assert name == "reference"
    assert "does not load" in detail


def test_mlx_imported_first(cache: Path) -> None:
    name, detail = run("import mlx.core\n" + STATUS, cache)
    assert name == "reference"
    assert "import mlx_redrafter before it" in detail


@pytest.mark.parametrize("choice", ["fastest", "openblas"])
def test_unknown_choice(cache: Path, choice: str) -> None:
    process = start("import mlx_redrafter.runtime.blas as blas; blas.status()", cache, choice)
    error = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 1
    assert error == (
        f"mlx_redrafter.errors.OptionError: MLX_REDRAFTER_BLAS={choice} is not a BLAS that this "
        "program knows: set it to row-exact or reference, or unset it"
    )


def test_the_choice_is_cheap(cache: Path) -> None:
    """No numpy or mlx is loaded, and a built library is not built again."""
    code = """
import json, sys
from mlx_redrafter.runtime import blas
blas.prepare()
heavy = {"numpy", "mlx.core", "subprocess", "torch"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    run(STATUS, cache)
    assert run(code, cache) == []


def test_a_slow_blas_is_said_once_and_only_where_it_was_not_chosen(cache: Path) -> None:
    code = """
import json, warnings
{first}
from mlx_redrafter import api, errors
from mlx_redrafter.runtime import blas
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        try:
            api.load("/nowhere")
        except errors.HubError:
            pass
print(json.dumps([[str(w.message), w.filename] for w in said]))
"""
    late = code.replace("{first}", "import mlx.core")
    told = [
        "matrix products are up to eight times slower: MLX was imported first; import "
        "mlx_redrafter before it, at the top of the program",
        "<string>",
    ]
    assert run(late, cache) == [told]
    assert run(late, cache, "reference") == []
    assert run(code.replace("{first}", ""), cache) == []
