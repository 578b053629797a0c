"""A self-test of this machine: versions, matrix library, compiler, exactness, attention kernels."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.text import Text

from mlx_redrafter import console

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_redrafter.models import Decoder

NEEDED_MLX = (0, 32, 1)
SIZES = range(2, 17)
# A pass over N rows may round otherwise than one row; beyond this share of the logits' size it is
# not rounding.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
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
PROMPT = "The three states of matter are solid, liquid and"
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Check:
    """One thing looked at. `facts` are plain values for --json."""

    name: str
    mark: Literal["ok", "warn", "fail"]
    detail: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """A pass over N tokens against N single steps."""

    nodes: int
    largest: float  # max |logit difference|
    scale: float  # max |logit|
    agree: int  # rows whose argmax is the same


def examine(report: Callable[[Check], None] | None = None) -> list[Check]:
    """Run every check; `report` sees each one as it is done."""
    checks = []
    for check in _all():
        checks.append(check)
        if report is not None:
            report(check)
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


def _all() -> Iterator[Check]:
    from mlx_redrafter.info import machine

    facts = machine()
    yield _versions(facts)
    yield Check(
        "machine",
        "ok",
        f"{facts['system']}, {facts['chip']}, {facts['memory_gb']:.0f} GB, "
        f"MLX computes on the {facts['device']}",
        {k: facts[k] for k in ("system", "chip", "memory_gb", "device")},
    )
    yield _blas(facts)
    yield compiler()
    with tempfile.TemporaryDirectory() as folder:
        yield _guarded("verify, tiny model", lambda: _tiny_check(Path(folder)))
    yield _guarded("verify, built-in", _builtin_check)
    yield _guarded("attention", attention)
    yield _guarded("KV cache", in_place)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that breaks is a failed check: the others still have something to say."""
    try:
        return check()
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _versions(facts: dict[str, Any]) -> Check:
    names = ("python", "mlx_redrafter", "mlx", "mlx_lm")
    text = ", ".join(f"{name.replace('_', '-')} {facts[name]}" for name in names)
    numbers = tuple(int(part) for part in facts["mlx"].split(".")[:3] if part.isdigit())
    known = {name: facts[name] for name in names}
    if numbers < NEEDED_MLX:
        return Check("versions", "fail", f"{text}; mlx 0.32.1 or newer is needed", known)
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


def differences(
    model: Decoder, prompt: Sequence[int], following: Sequence[int], sizes: Sequence[int]
) -> list[Difference]:
    """Compare one pass over `following[:N]`, after `prompt`, with N single steps, for every N."""
    import mlx.core as mx

    from mlx_redrafter.models import cache

    capacity = cache.bucket(len(prompt) + len(following))
    slots = mx.arange(capacity, dtype=mx.int32)

    def run(
        tokens: Sequence[int], start: int, kv: list[mx.array]
    ) -> tuple[mx.array, list[mx.array]]:
        positions = mx.arange(start, start + len(tokens), dtype=mx.int32)
        mask = slots[None] <= positions[:, None]
        write = cache.Append(mx.array([start], mx.int32))
        ids = mx.array(list(tokens), mx.int32)
        hidden, _, kv = model(ids, positions, mask, slots, kv, write)
        logits = model.logits(hidden).astype(mx.float32)
        mx.eval(logits, kv)
        return logits, kv

    _, prefix = run(prompt, 0, cache.new_cache(model.config, capacity, model.dtype))
    rows, kv = [], prefix
    for i, token in enumerate(following[: max(sizes)]):
        row, kv = run([token], len(prompt) + i, kv)
        rows.append(row)
    single = mx.concatenate(rows)  # (N, V)
    found = []
    for n in sizes:
        many, _ = run(following[:n], len(prompt), prefix)
        same = many.argmax(-1) == single[:n].argmax(-1)
        numbers: list[Any] = [
            mx.abs(many - single[:n]).max().item(),
            mx.abs(single[:n]).max().item(),
            same.sum().item(),
        ]
        found.append(Difference(n, *numbers))
    return found


def judge(name: str, dtype: str, found: Sequence[Difference]) -> Check:
    """ok: the same choices; warn: rounding changed one; fail: more than rounding."""
    rows = sum(d.nodes for d in found)
    agree = sum(d.agree for d in found)
    worst = max(found, key=lambda d: d.largest)
    exact = [d.nodes for d in found if d.largest == 0]
    text = (
        f"{dtype}, N = {found[0].nodes}..{found[-1].nodes}: same choice in {agree} of {rows} rows"
    )
    if len(exact) == len(found):
        text += ", logits bit-equal for every N"
    else:
        text += f", largest logit difference {worst.largest:.1e} (N = {worst.nodes})"
    facts = {"dtype": dtype, "by_nodes": [asdict(d) for d in found]}
    limit = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    # Written so that NaN, which compares with nothing, fails too.
    if not all(d.largest <= limit * d.scale for d in found):
        return Check(name, "fail", f"{text}: more than rounding explains", facts)
    if agree < rows:
        return Check(name, "warn", f"{text}: rounding decides near ties", facts)
    return Check(name, "ok", text, facts)


def tiny_model(folder: Path) -> Decoder:
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
    return judge("verify, tiny model", _dtype(model), differences(model, prompt, following, SIZES))


def _builtin_check() -> Check:
    from mlx_redrafter import builtin, hub
    from mlx_redrafter.models import load_model

    name = "verify, built-in"
    folder = builtin.folder(builtin.device_kind())
    if not (folder / "model.safetensors").is_file():
        return Check(name, "ok", "not tried: the built-in model is not in the cache yet")
    model, tokenizer = load_model(folder), hub.load_tokenizer(folder)
    prompt = list(tokenizer.encode(PROMPT))
    following = list(tokenizer.encode(PROMPT * 2))[: max(SIZES)]
    return judge(name, _dtype(model), differences(model, prompt, following, SIZES))


def attention() -> Check:
    """Which attention kernel each N takes, for common head layouts."""
    from mlx_redrafter.info import device

    if device() == "cpu":
        return Check("attention", "ok", "unfused for every N (no Metal)", {"path": "unfused"})
    layouts = {"9/3 x 64": (9, 3, 64), "32/8 x 128": (32, 8, 128), "28/4 x 128": (28, 4, 128)}
    paths = {
        label: {n: attention_path(n, *layout) for n in range(1, 17)}
        for label, layout in layouts.items()
    }
    text = "; ".join(f"{label}: {_runs(path)}" for label, path in paths.items())
    return Check("attention", "ok", text, {"paths": paths})


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


def _dtype(model: Decoder) -> str:
    return str(model.dtype).removeprefix("mlx.core.")


def in_place() -> Check:
    """Are the KV slabs written where they are while a step is in flight ahead?

    MLX copies a buffer that an unfinished operation still reads: the memory of a drafted answer,
    beyond what was there before it, counted in slabs.
    """
    import mlx.core as mx

    from mlx_redrafter.decoding.engine import Engine, Session
    from mlx_redrafter.decoding.sampling import SamplingParams
    from mlx_redrafter.decoding.tree import TreeShape
    from mlx_redrafter.drafters.redrafter import ReDrafter, ReDrafterConfig
    from mlx_redrafter.models import Decoder, cache, decoder_config

    layers, capacity = 16, 16384
    mx.random.seed(0)
    target = Decoder(decoder_config({**TINY, "num_hidden_layers": layers}))
    drafter = ReDrafter(ReDrafterConfig(target.config.hidden_size, target.config.vocab_size, 64))
    engine = Engine(target, drafter.bind(target))
    mx.eval(target.parameters(), drafter.parameters())
    session = Session(kv=cache.new_cache(target.config, capacity, target.dtype))
    mx.eval(session.kv)
    slab = session.kv[0].nbytes
    extra = 0.0
    for count in (4, 32):  # the first answer compiles
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        prompt = [1, 2, 3, 4]
        for _ in engine.generate(prompt, SamplingParams(), TreeShape(), count, session=session):
            pass
        extra = (mx.get_peak_memory() - before) / slab
    text = f"a step ahead needs the memory of {extra:.1f} of {layers} layers' slabs"
    if extra > layers / 2:
        return Check("KV cache", "warn", f"{text}: most are copied in every step", {"slabs": extra})
    return Check("KV cache", "ok", text, {"slabs": round(extra, 2)})
