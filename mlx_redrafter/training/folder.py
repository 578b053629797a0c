"""The folder of a training run: the configuration in effect, and which of it is decided by now."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime.paths import user_path
from mlx_redrafter.training.config import (
    TrainConfig,
    defaults,
    from_mapping,
    options,
    refuse_lacking,
)

FILE = "train.yaml"
_BEGAN = "began"  # in that file, beside the options: when it was written first
# What the text in the folder depends on, and what may change at any time.
DATA = (
    "model", "seed", "max_tokens", "thinking", "thought_tokens", "prompt_tokens", "system_prompt",
    "prompts", "answers", "batch",
)  # fmt: skip
FREE = ("out", "answer_tokens", "cache_gb", "bits")
FIT = tuple(f.name for f in fields(TrainConfig) if f.name not in DATA + FREE)
_PLACES = ("model", "prompts", "answers", "warm_start")
_EXPONENT = re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$")


def read_yaml(file: Path) -> dict[str, Any]:
    """The options in a YAML file. Raises OptionError."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 takes 1e-3 for text; nobody who writes it does."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("+-0123456789"))
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise OptionError(
            f"{file} cannot be read ({problem}): give lines of `option: value`"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise OptionError(f"{file} is no configuration: give lines of `option: value`")
    values.pop(_BEGAN, None)
    layers = values.get("context_layers")
    if isinstance(layers, list):
        values["context_layers"] = ",".join(map(str, layers))
    return {str(name): value for name, value in values.items()}


def settle(
    flags: Mapping[str, Any], file: Path | None = None
) -> tuple[TrainConfig, TrainConfig | None]:
    """The configuration of a run, and the one stored in its folder by an earlier start, if any.

    Flags win over the file, the file over what the folder was begun with, that over the defaults.
    With another kind of drafter than before all but the data is the new kind's.
    Raises OptionError: an unknown option, one that the kind does not have, an impossible value, or
    a change of what is decided.
    """
    asked = {**(read_yaml(file) if file else {}), **flags}
    asked = _values(from_mapping(asked, str(file or "the command line")), asked)
    out = Path(asked.get("out", TrainConfig.out))
    before = stored(out)
    kind = asked.get("kind", before.kind if before else TrainConfig.kind)
    refuse_lacking(kind, asked)
    kept = _values(before, DATA + FREE if before.kind != kind else _names()) if before else {}
    values = {**_values(defaults(kind), _names()), **kept, **asked, "out": str(out)}
    config = from_mapping(values, "train")
    config.check()
    if before is not None:
        # The batch may have been lowered to fit in memory: that is compared when this is known.
        refuse(before, config, [name for name in decided(out) if name != "batch"])
    return config, before


def stored(folder: Path) -> TrainConfig | None:
    """What the folder was begun with; None for a new one. Raises OptionError."""
    file = folder / FILE
    if not file.is_file():
        return None
    values = read_yaml(file)
    if "model" not in values:
        raise OptionError(
            f"{file} does not say what the folder was begun with: restore it, or choose another "
            "--out"
        )
    return from_mapping({**values, "out": str(folder)}, str(file))


def began(folder: Path) -> datetime:
    """When the folder was begun: what a chat template that prints the date is told, for good."""
    import yaml

    try:
        content = yaml.safe_load((folder / FILE).read_text(encoding="utf-8"))
        return datetime.fromisoformat(str(content[_BEGAN]))
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        pass
    # Begun by a version that did not write it down: the first answers tell.
    first = next(iter(sorted(folder.glob("answers/0*.jsonl"))), None)
    seconds = first.stat().st_mtime if first is not None else time.time()
    return datetime.fromtimestamp(int(seconds))


def decided(folder: Path) -> tuple[str, ...]:
    """Options that cannot change any more, as there is text or a fit made with them."""
    parts = [file for part in ("prompts", "answers") for file in (folder / part).glob("*")]
    text = any(file.suffix in (".jsonl", ".kept") for file in parts)
    return (DATA if text else ()) + (FIT if fitting(folder) else ())


def checkpoint_file(folder: Path) -> Path:
    """What the fit goes on with."""
    return folder / "fit" / "checkpoint.safetensors"


def fitting(folder: Path) -> bool:
    """Has the fit begun?"""
    return checkpoint_file(folder).is_file()


def checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Arrays and facts that the fit goes on with; None before it. Raises OptionError."""
    import mlx.core as mx

    from .shards import reading

    if not fitting(folder):
        return None
    file = checkpoint_file(folder)
    with reading(file, f"delete {file.parent} to fit anew"):
        loaded: Any = mx.load(str(file), return_metadata=True)
        int(loaded[1]["step"])
    return loaded


def refuse(before: TrainConfig, config: TrainConfig, names: tuple[str, ...] | list[str]) -> None:
    """Raise OptionError if one of the options has another value than before."""
    for name in names:
        old, new = getattr(before, name), getattr(config, name)
        if old == new or (name in _PLACES and _same_place(old, new)):
            continue
        if name in DATA:
            way = "leave it out, or begin in another --out"
        else:
            way = (
                f"leave it out, or delete {config.out / 'fit'} to fit anew (--warm-start goes on "
                "from a drafter)"
            )
        what = "text" if name in DATA else "fit"
        raise OptionError(
            f"{name} {_shown(new)} was given, but the {what} in {config.out} was begun with "
            f"{name} {_shown(old)}: {way}"
        )


def write(config: TrainConfig) -> Path:
    """Write the configuration in effect into the folder it names."""
    import yaml

    import mlx_redrafter

    values = _values(config, options(config.kind))
    del values["out"]  # the folder may be moved
    values[_BEGAN] = str(began(config.out))
    file = config.out / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    head = f"# mlx-redrafter train, version {mlx_redrafter.__version__}\n"
    partial = file.with_suffix(".partial")
    partial.write_text(
        head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    partial.replace(file)
    return file


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder. Raises OptionError if there is one, or no folder."""
    from filelock import FileLock, Timeout

    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise OptionError(
            f"another run is at work in {folder}: wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise OptionError(f"{folder} cannot be written ({error}): choose another --out") from None
    try:
        yield
    finally:
        lock.release()
        if not (folder / FILE).exists():  # nothing was begun
            (folder / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # one that is not empty
                for place in made:
                    place.rmdir()


def _names() -> list[str]:
    return [f.name for f in fields(TrainConfig)]


def _values(config: TrainConfig, names: Any) -> dict[str, Any]:
    """The named options as YAML has them."""
    found = {name: getattr(config, name) for name in names}
    return {k: str(v) if isinstance(v, Path) else v for k, v in found.items()}


def _same_place(old: Any, new: Any) -> bool:
    """A model or a file under another spelling of its path."""
    if not all(isinstance(x, str | Path) for x in (old, new)):
        return False
    a, b = user_path(old), user_path(new)
    return a.exists() and b.exists() and a.samefile(b)


def _shown(value: Any) -> str:
    return "none" if value is None else repr(str(value)) if isinstance(value, str) else str(value)
