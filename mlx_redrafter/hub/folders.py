"""Models and drafters by folder, hub id or built-in name."""

from __future__ import annotations

import contextlib
import difflib
import errno
import glob
import re
import shlex
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from mlx_redrafter.errors import HubError, is_full, one_line
from mlx_redrafter.runtime.paths import BUILTIN, json_or_nothing, user_path

PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")

_FORMS = f"a model folder, a Hugging Face id (org/name) or {BUILTIN}"


def resolve(name: str, revision: str | None = None, also: Sequence[str] = ()) -> Path:
    """The folder of a model or drafter: a local folder, the built-in model, or a hub snapshot.

    `org/name@revision` is the same as revision="revision". Hub files go to the Hugging Face cache
    (HF_HOME) and are used from there without a network: one set of safetensors, JSON and tokenizer
    files. `also` names other kinds of weights, such as "*.bin", to take where those are missing.
    Raises HubError.
    """
    if not name.strip():
        raise HubError(f"the model name is empty; give {_FORMS}")
    if name == BUILTIN:
        _refuse_revision(name, revision)
        from mlx_redrafter.hub import builtin

        return builtin.ensure(builtin.device_kind())
    path = user_path(name)
    if path.exists():
        _refuse_revision(name, revision)
        return _checked_folder(path)
    match = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@(.+))?", name)
    if match is None:
        raise HubError(_nothing_there(name))
    if match[2] and revision and match[2] != revision:
        raise HubError(f"{name} names one revision and --revision {revision} another; give one")
    return _snapshot(match[1], match[2] or revision, also)


def find_drafter(model_name: str, folder: Path) -> Path | None:
    """The drafter of a model: beside it, trained for it here, in its own files, or shipped with
    the built-in one.

    One that does not fit the model is left out with a warning.
    """
    from mlx_redrafter.hub import kept

    for place in kept.candidates(folder, model_name == BUILTIN or _is_builtin(folder)):
        if (place / "config.json").is_file():
            problem = kept.problem(place, folder)
            if problem is None:
                return place
            warnings.warn(f"a drafter is left out: {problem}", stacklevel=2)
    return None


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision:
        raise HubError(
            f"{name} has no revisions ({revision!r} was given); revisions exist for Hugging Face "
            "ids only: drop --revision"
        )


def _checked_folder(path: Path) -> Path:
    if path.suffix.lower() == ".gguf" and path.is_file():
        raise HubError(
            f"{path} is a GGUF file; make a model folder of it first: "
            f"mlx-redrafter convert {shlex.quote(str(path))} --out FOLDER"
        )
    if not path.is_dir():
        raise HubError(f"{path} is a file; give the folder that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise HubError(
            f"{path} has no config.json; give a folder in MLX or Hugging Face layout "
            "(other formats: mlx-redrafter convert)"
        )
    return path


def _nothing_there(name: str) -> str:
    if difflib.get_close_matches(name.lower(), [BUILTIN], cutoff=0.6):
        return f"there is no model {name!r}; did you mean {BUILTIN}?"
    return f"there is no folder {name!r}, and it is not a Hugging Face id; give {_FORMS}"


def _snapshot(repo: str, revision: str | None, also: Sequence[str]) -> Path:
    """The small files first: they say offline too, and at once, whether the repository is there."""
    from huggingface_hub import snapshot_download

    listed: Sequence[str] = ()
    try:
        # In folders lie other forms of a model: original/, onnx/, fp16/.
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=[*PATTERNS], ignore_patterns=["*/*"]
            )
        )
        if (folder / "config.json").is_file():
            listed = _listing(repo, revision, folder, also)
            wanted = _wanted(listed, also, folder)
            if not all((folder / name).is_file() for name in wanted):
                patterns = [glob.escape(name) for name in wanted]
                snapshot_download(repo, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise HubError(_download_message(error, repo, revision)) from error
    if not (folder / "config.json").is_file():
        raise HubError(
            f"{repo} has no config.json: it is not a model in Hugging Face layout; choose its "
            "safetensors version"
        )
    if not _weights(listed, also, folder):
        _refuse_pickles(f"{repo}@{revision}" if revision else repo, listed, folder)
    return folder


def _refuse_pickles(name: str, listed: Sequence[str], folder: Path) -> None:
    """Say what to run where a repository's weights are PyTorch files alone. Raises HubError."""
    from mlx_redrafter.models.files import pickles_among

    if pickles := pickles_among([file for file in listed if "/" not in file], folder):
        raise HubError(
            f"the weights of {name} are a PyTorch file ({pickles[0]}); make a folder of them "
            f"first: mlx-redrafter convert {shlex.quote(name)} --out FOLDER"
        )


def _listing(repo: str, revision: str | None, folder: Path, also: Sequence[str]) -> list[str]:
    """The files of a repository: as the client keeps them, or as they lie in a whole snapshot."""
    from huggingface_hub import list_repo_files

    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        from huggingface_hub._tree_cache import read_tree_cache

        if kept := read_tree_cache(str(folder.parents[1]), folder.name):
            return list(kept)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    if _weights(files, also, folder):
        return files
    return list(list_repo_files(repo, revision=revision))


def _wanted(files: Sequence[str], also: Sequence[str], folder: Path) -> list[str]:
    """The files of a repository that are read here, its drafter's too."""
    wanted = [file for file in files if fnmatch(file, "additional_chat_templates/*.jinja")]
    for place in ("", "drafter/"):
        inside = [file.removeprefix(place) for file in files if file.startswith(place)]
        names = [name for name in inside if "/" not in name]
        kept = [name for name in names if any(fnmatch(name, p) for p in PATTERNS)]
        weights = _weights(names, also, folder / place)
        wanted += [place + name for name in (*kept, *weights)]
    return wanted


def _weights(names: Sequence[str], also: Sequence[str], folder: Path) -> list[str]:
    """The weights of a model, and Medusa heads in a file of their own."""
    from mlx_redrafter.models.files import SAFETENSORS, TORCH, heads_among, weights_among

    kinds = [k for k in TORCH if any(fnmatch(k.stem + k.suffix, pattern) for pattern in also)]
    names = [name for name in names if "/" not in name]
    found = (weights_among(names, kind, folder) for kind in (SAFETENSORS, *kinds))
    heads = heads_among(names, [kind.suffix for kind in (SAFETENSORS, *kinds)])
    return list(dict.fromkeys([*next(filter(None, found), []), *heads]))


def _download_message(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    # The gated error is a kind of "not found": the order of these tests matters.
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its licence at {page}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no folder {repo!r} here and no model {repo!r} on the Hugging Face hub: "
            "check the spelling; a private model needs `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; see {page}/tree/main for those it has"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is not a valid Hugging Face id; give {_FORMS}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        # The listing is only asked for when the small files are there.
        partly = isinstance(error, errors.IncompleteSnapshotError | errors.OfflineModeIsEnabled)
        where = (
            f"there is no folder {repo!r} here, and {repo}{f'@{revision}' if revision else ''} is "
            f"{'only partly' if partly else 'not'} in the Hugging Face cache"
        )
        if constants.HF_HUB_OFFLINE:
            return f"{where}; HF_HUB_OFFLINE is set: unset it, or give a local folder"
        return f"{where}; {constants.ENDPOINT} cannot be reached: connect to the network"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the Hugging Face hub refuses access to {repo}; run `hf auth login`"
    return _transfer_message(error, repo, constants.HF_HUB_CACHE)


def _transfer_message(error: Exception, repo: str, cache: str) -> str:
    if is_full(error):
        return f"no space left in {cache} for {repo}; free some, or set HF_HOME to another disk"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{cache} cannot be written for {repo}; set HF_HOME to a folder that can be"
    return (
        f"{repo} could not be downloaded ({one_line(error)}); run the same command again, "
        "finished files are kept"
    )


def _is_builtin(folder: Path) -> bool:
    mark = json_or_nothing(folder / "config.json").get("mlx_redrafter")
    return isinstance(mark, dict) and mark.get("model") == BUILTIN
