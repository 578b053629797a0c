"""`mlx-redrafter doctor`: versions, matrix library, compiler, exactness, attention kernels."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from mlx_redrafter.cli.machines import Backend, HostFile, HostNames, given_hosts
from mlx_redrafter.cli.options import DrafterName, Json
from mlx_redrafter.errors import RedrafterError
from mlx_redrafter.evaluation import model_checks
from mlx_redrafter.evaluation.model_checks import SIZES, Check, guarded
from mlx_redrafter.runtime import blas, metal
from mlx_redrafter.runtime.device import dtype_name
from mlx_redrafter.runtime.paths import expanded
from mlx_redrafter.terminal import console

if TYPE_CHECKING:
    from mlx_redrafter.api import Model
    from mlx_redrafter.models import Loaded

NEEDED_MLX = (0, 32, 4)
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
FEW_ROWS = "few-row products"
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def command(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Test this model too: built-in name, local folder or Hugging Face id.",
            show_default="built-in, if it is here",
        ),
    ] = None,
    drafter: DrafterName = "auto",
    report: Annotated[
        Path | None,
        typer.Option(
            callback=expanded,
            help="Measure this machine too, some minutes, and write what was found to FILE.json "
            "and FILE.md (or to one, by the ending), to be pasted into an issue.",
        ),
    ] = None,
    hosts: HostNames = None,
    hostfile: HostFile = None,
    backend: Backend = None,
    as_json: Json = False,
) -> None:
    """Test the installation, and a model on it; exit code 1 if a check fails.

    With --hosts several machines instead: do they start, agree, and answer quickly?
    """
    shown = None if as_json else show
    if (machines := given_hosts(hosts, hostfile, backend)) is not None:
        from mlx_redrafter.cli import doctor_hosts
        from mlx_redrafter.distributed.noise import without_noise

        without_noise()
        checks = one_by_one(doctor_hosts.machines(machines, model), shown)
    elif report is not None:
        checks = _reported(report, shown, model, drafter)
    else:
        checks = examine(shown, _loaded(model, drafter))
    if as_json:
        typer.echo(json.dumps(as_dict(checks)))
    if any(check.mark == "fail" for check in checks):
        raise typer.Exit(1)


def examine(
    report: Callable[[Check], None] | None = None, given: tuple[Model, Any] | None = None
) -> list[Check]:
    """Run every check; `report` sees each one as it is done. given: a loaded model to test; None:
    the built-in one, if it is there."""
    from mlx_redrafter.hub import builtin

    if given is None:  # before the GPU is used: it is to be tested as it will run
        metal.prepare(builtin.folder(builtin.device_kind()))
    return one_by_one(_all(given), report)


def one_by_one(checks: Iterable[Check], report: Callable[[Check], None] | None) -> list[Check]:
    """All of them; `report` sees each one as it is done."""
    found = []
    for check in checks:
        found.append(check)
        if report is not None:
            report(check)
    return found


def _loaded(name: str | None, drafter: str, needed: bool = False) -> tuple[Model, Any] | None:
    """A model and its tokenizer, if one is named or needed; raises the errors of `load`."""
    blas.full_float32()
    if name is None and drafter == "auto" and not needed:
        return None
    from mlx_redrafter.api import load
    from mlx_redrafter.runtime.paths import BUILTIN

    return load(name or BUILTIN, drafter)


def _reported(
    file: Path, shown: Callable[[Check], None] | None, name: str | None, drafter: str
) -> list[Check]:
    """The checks, and a report with them."""
    from mlx_redrafter.bench.machine import report
    from mlx_redrafter.bench.machine.measure import Effort

    to = report.files(file)
    given = _loaded(name, drafter, needed=True)
    assert given is not None
    checks: list[Check] = []

    def check() -> list[Check]:
        checks.extend(examine(shown, given))
        return checks

    report.write(report.measured(*given, check, Effort(), console.note), to)
    console.note(f"written: {', '.join(map(str, to))}")
    return checks


def show(check: Check) -> None:
    """One check as a line on stdout."""
    line = Text.assemble(
        (f"{check.mark:<5}", STYLES[check.mark]), f"{check.name:<20}", check.detail
    )
    console.show(line)


def as_dict(checks: Sequence[Check]) -> dict[str, Any]:
    return {
        "passed": not any(check.mark == "fail" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def _all(given: tuple[Model, Any] | None) -> Iterator[Check]:
    from mlx_redrafter.runtime.device import machine

    facts = machine()
    yield _versions(facts)
    yield Check(
        "machine",
        "ok",
        f"{facts['system']}, {facts['chip']}, {facts['memory_gb']:.0f} GB, "
        f"MLX computes on the {facts['device']}",
        {k: facts[k] for k in ("system", "chip", "memory_gb", "device")},
    )
    if facts["blas"]:
        yield _blas(facts)
    yield compiler()
    with tempfile.TemporaryDirectory() as folder:
        yield guarded("verify, tiny model", lambda: _tiny_check(Path(folder)))
    yield guarded("attention", attention)
    yield from _of_model(given, facts["memory_gb"])
    yield guarded(FEW_ROWS, few_rows)


def _of_model(given: tuple[Model, Any] | None, memory_gb: float) -> Iterator[Check]:
    from mlx_redrafter.api import load
    from mlx_redrafter.hub import builtin

    name = "verify, model" if given else "verify, built-in"
    if given is None:
        folder = builtin.folder(builtin.device_kind())
        if not (folder / "model.safetensors").is_file():
            missing = "not tried: the built-in model is not in the cache yet"
            yield from (Check(each, "ok", missing) for each in (name, "KV cache"))
            return
    try:
        model, tokenizer = given or load()
    except RedrafterError as error:
        yield Check(name, "fail", str(error))
        return
    if given:
        yield from model_checks.of_model(model, tokenizer, memory_gb)
    yield guarded(name, lambda: model_checks.verify(name, model.target, tokenizer))
    yield guarded("KV cache", lambda: model_checks.in_place(model))


def _versions(facts: dict[str, Any]) -> Check:
    names = ("python", "mlx_redrafter", "mlx", "mlx_lm")
    text = ", ".join(f"{name.replace('_', '-')} {facts[name]}" for name in names)
    numbers = tuple(int(part) for part in facts["mlx"].split(".")[:3] if part.isdigit())
    known = {name: facts[name] for name in names}
    needed = ".".join(map(str, NEEDED_MLX))
    if numbers < NEEDED_MLX:
        return Check("versions", "fail", f"{text}; mlx {needed} or newer is needed", known)
    return Check("versions", "ok", text, known)


def _blas(facts: dict[str, Any]) -> Check:
    name, detail = facts["blas"], facts["blas_detail"]
    if name != "reference":
        return Check("BLAS", "ok", f"{name}: {detail}", {"blas": name})
    slow = "one thread, a pass over N tokens costs N passes: drafting cannot pay with it"
    return Check("BLAS", "warn", f"{name}: {detail}; {slow}", {"blas": name})


def compiler() -> Check:
    """Do compiled graphs run? On Linux MLX builds their CPU kernels with g++."""
    import mlx.core as mx

    if os.environ.get("MLX_DISABLE_COMPILE") is not None:
        return Check("compiled graphs", "warn", "switched off by MLX_DISABLE_COMPILE: slower")
    if sys.platform == "linux" and shutil.which("g++") is None:
        return Check("compiled graphs", "warn", "no g++ found: slower; install g++")
    try:
        out = mx.compile(lambda x: mx.exp(x) * 2 + 1)(mx.zeros((3,)))
        right = out.tolist() == [3, 3, 3]
    except RuntimeError as error:
        return Check("compiled graphs", "fail", " ".join(str(error).split()))
    if not right:
        return Check("compiled graphs", "fail", f"a compiled graph gives {out.tolist()}, not 3")
    return Check("compiled graphs", "ok", "they run")


def tiny_model(folder: Path) -> Loaded:
    """A random two-layer llama, written to `folder` by mlx-lm and read back."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama

    from mlx_redrafter.models import load_model

    mx.random.seed(0)
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs.from_dict(TINY)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(TINY))
    return load_model(folder)


def _tiny_check(folder: Path) -> Check:
    model = tiny_model(folder)
    prompt = [(7 * i + 3) % 512 for i in range(40)]
    following = [(11 * i + 5) % 512 for i in range(max(SIZES))]
    found = model_checks.differences(model, prompt, following, SIZES)
    return model_checks.judge("verify, tiny model", dtype_name(model.dtype), found)


def attention() -> Check:
    """Which attention kernel each N takes, for common head layouts."""
    from mlx_redrafter.runtime.device import device

    if device() == "cpu":
        return Check("attention", "ok", "unfused for every N (no Metal)", {"path": "unfused"})
    layouts = {"9/3 x 64": (9, 3, 64), "32/8 x 128": (32, 8, 128), "28/4 x 128": (28, 4, 128)}
    paths = {
        label: {n: attention_path(n, *layout) for n in range(1, 17)}
        for label, layout in layouts.items()
    }
    text = "; ".join(f"{label}: {_runs(path)}" for label, path in paths.items())
    return Check("attention", "ok", text, {"paths": paths})


def few_rows() -> Check:
    """What this GPU said of the kernels for few rows: how many times faster than MLX's own way they
    are with how many rows, by weights (outputs x inputs - bits - group - type)."""
    from mlx_redrafter.kernels import verdicts

    if not verdicts.metal():
        return Check(FEW_ROWS, "ok", "MLX's own (no Metal)", {"shapes": {}})
    if (choice := verdicts.choice()) == "off":
        return Check(FEW_ROWS, "ok", f"MLX's own ({verdicts.VARIABLE}=off)", {"shapes": {}})
    found = verdicts.stored(verdicts.conditions())
    if not found:
        return Check(FEW_ROWS, "ok", "not tried: no quantised model was loaded", {"shapes": {}})
    text = "; ".join(f"{name}: {verdict.text()}" for name, verdict in found.items())
    known = {name: verdict.as_dict() for name, verdict in found.items()}
    failed = any(verdict.error for verdict in found.values())
    data = {"choice": choice, "shapes": known}
    return Check(FEW_ROWS, "warn" if failed else "ok", f"{choice}; {text}", data)


def attention_path(nodes: int, heads: int, kv_heads: int, head_dim: int) -> str:
    """Ask MLX for a fused kernel over a masked cache: "vector", "full", or "unfused"."""
    import mlx.core as mx

    q = mx.zeros((1, heads, nodes, head_dim), mx.float16)
    kv = mx.zeros((1, kv_heads, 256, head_dim), mx.float16)
    mask = mx.ones((nodes, 256), mx.bool_)
    try:
        mx.eval(
            mx.fast.scaled_dot_product_attention(q, kv, kv, scale=1.0, mask=mask, force_fused=True)
        )
    except (RuntimeError, ValueError):
        return "unfused"
    return "vector" if nodes <= 8 else "full"


def _runs(path: dict[int, str]) -> str:
    """{1: a, 2: a, 3: b} -> "N 1-2 a, 3 b"."""
    runs: list[tuple[int, int, str]] = []
    for n, kind in path.items():
        if runs and runs[-1][2] == kind:
            runs[-1] = (runs[-1][0], n, kind)
        else:
            runs.append((n, n, kind))
    shown = [f"{a}-{b} {kind}" if b > a else f"{a} {kind}" for a, b, kind in runs]
    return "N " + ", ".join(shown)
