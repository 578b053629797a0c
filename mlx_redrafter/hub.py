"""Models and drafters by folder, hub id or built-in name; tokenizers; where things are kept."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_redrafter.errors import HubError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

BUILTIN = "smollm2-135m"
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken")

_FORMS = f"a model folder, a Hugging Face id (org/name) or {BUILTIN}"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken")


def resolve(name: str, revision: str | None = None, also: Sequence[str] = ()) -> Path:
    """The folder of a model or drafter: a local folder, the built-in model, or a hub snapshot.

    `org/name@revision` is the same as revision="revision". Hub files go to the Hugging Face cache
    (HF_HOME) and are used from there without a network; `also` adds file patterns, such as
    "*.bin", to the safetensors, JSON and tokenizer files that are downloaded.
    Raises HubError.
    """
    if not name.strip():
        raise HubError(f"The model name is empty; give {_FORMS}.")
    if name == BUILTIN:
        _refuse_revision(name, revision)
        from mlx_redrafter import builtin

        return builtin.ensure(builtin.device_kind())
    path = Path(name).expanduser()
    if path.exists():
        _refuse_revision(name, revision)
        return _checked_folder(path)
    match = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@(.+))?", name)
    if match is None:
        raise HubError(_nothing_there(name))
    if match[2] and revision and match[2] != revision:
        raise HubError(f"{name} names one revision and --revision {revision} another; give one.")
    return _snapshot(match[1], match[2] or revision, [*PATTERNS, *also])


def find_drafter(model_name: str, folder: Path) -> Path | None:
    """The drafter of a model: beside it, trained for it here, or shipped with the built-in one.

    One that does not fit the model is left out with a warning.
    """
    from mlx_redrafter import kept

    for place in kept.candidates(folder, model_name == BUILTIN or _is_builtin(folder)):
        if (place / "config.json").is_file():
            problem = kept.problem(place, folder)
            if problem is None:
                return place
            warnings.warn(f"a drafter is left out: {problem}", stacklevel=2)
    return None


def shipped_drafter() -> Path:
    """The folder of the built-in model's drafter, in the package."""
    return Path(__file__).parent / "assets" / f"{BUILTIN}-drafter"


def cache_dir() -> Path:
    """`$MLX_REDRAFTER_CACHE`, else `mlx-redrafter` in the platform's cache folder of the user."""
    if given := os.environ.get("MLX_REDRAFTER_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-redrafter"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-redrafter"


def data_dir() -> Path:
    """`$MLX_REDRAFTER_DATA`, else `mlx-redrafter` in the platform's data folder of the user."""
    if given := os.environ.get("MLX_REDRAFTER_DATA"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "mlx-redrafter"
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "mlx-redrafter"


def load_tokenizer(folder: Path, options: dict[str, Any] | None = None) -> TokenizerWrapper:
    """mlx-lm's tokenizer with its streaming detokenizer.

    It stops at every end-of-text id named in the folder's config.json or generation_config.json.
    `options` are passed to transformers. Raises HubError.
    """
    if not any(found for pattern in _TOKENIZER_FILES for found in folder.glob(pattern)):
        raise HubError(
            f"{folder} has no tokenizer; put the tokenizer.json and tokenizer_config.json of the "
            "model there."
        )
    from mlx_lm.utils import load_tokenizer as load

    # Without an answer given here, transformers would ask on the terminal whether to run code.
    # The context's length is ours to check: transformers would warn of errors that cannot happen.
    options = {"trust_remote_code": False, "model_max_length": 10**9, **(options or {})}
    try:
        return load(folder, options, eos_token_ids=_end_ids(folder) or None)
    except Exception as error:
        raise HubError(
            f"The tokenizer in {folder} cannot be loaded ({one_line(error)}); copy the tokenizer "
            "files of the model again."
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def one_line(error: BaseException) -> str:
    """An error's text, short and without line breaks, to quote inside a message of ours."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision:
        raise HubError(
            f"{name} has no revisions ({revision!r} was given); revisions exist for Hugging Face "
            "ids only: drop --revision."
        )


def _checked_folder(path: Path) -> Path:
    if path.is_file() and path.suffix == ".gguf":
        words = ["mlx-redrafter", "convert", str(path), "--out", str(path.with_suffix(""))]
        raise HubError(f"{path} is a file in GGUF; make a folder of it first: {shlex.join(words)}")
    if not path.is_dir():
        raise HubError(f"{path} is a file; give the folder that holds config.json and the weights.")
    if not (path / "config.json").is_file():
        raise HubError(
            f"{path} has no config.json; give a folder in MLX or Hugging Face layout "
            "(other formats: mlx-redrafter convert)."
        )
    return path


def _nothing_there(name: str) -> str:
    if difflib.get_close_matches(name.lower(), [BUILTIN], cutoff=0.6):
        return f"There is no model {name!r}; did you mean {BUILTIN}?"
    return f"There is no folder {name!r}, and it is not a Hugging Face id; give {_FORMS}."


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise HubError(_download_message(error, repo, revision)) from error
    if not (folder / "config.json").is_file():
        raise HubError(
            f"{repo} has no config.json: it is not a model in Hugging Face layout; choose its "
            "safetensors version."
        )
    return folder


def _download_message(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    # The gated error is a kind of "not found": the order of these tests matters.
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its licence at {page}, then run `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no folder {repo!r} here and no model {repo!r} on the Hugging Face hub; "
            "did you mean a local folder? For a private model run `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; see {page}/tree/main for those it has."
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not a valid Hugging Face id; give {_FORMS}."
    if isinstance(error, errors.LocalEntryNotFoundError):
        partly = isinstance(error, errors.IncompleteSnapshotError)
        where = (
            f"There is no folder {repo!r} here, and {repo}{f'@{revision}' if revision else ''} is "
            f"{'only partly' if partly else 'not'} in the Hugging Face cache"
        )
        if constants.HF_HUB_OFFLINE:
            return f"{where}; HF_HUB_OFFLINE is set: unset it, or give a local folder."
        return f"{where}; {constants.ENDPOINT} cannot be reached: connect to the network."
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"The Hugging Face hub refuses access to {repo}; run `hf auth login`."
    return _transfer_message(error, repo, constants.HF_HUB_CACHE)


def _transfer_message(error: Exception, repo: str, cache: str) -> str:
    if is_full(error):
        return f"No space left in {cache} for {repo}; free some, or set HF_HOME to another disk."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{cache} cannot be written for {repo}; set HF_HOME to a folder that can be."
    return (
        f"{repo} could not be downloaded ({one_line(error)}); run the same command again, "
        "finished files are kept."
    )


def _is_builtin(folder: Path) -> bool:
    mark = _read_json(folder / "config.json").get("mlx_redrafter")
    return isinstance(mark, dict) and mark.get("model") == BUILTIN


def _end_ids(folder: Path) -> list[int]:
    ids: set[int] = set()
    for file in ("config.json", "generation_config.json"):
        given = _read_json(folder / file).get("eos_token_id")
        ids.update(given if isinstance(given, list) else [] if given is None else [given])
    return sorted(ids)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
