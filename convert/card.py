"""The model card of a converted checkpoint, and its upload to the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from mlx_redrafter.errors import HubError, OptionError, one_line

if TYPE_CHECKING:
    from .summary import Summary

_APPLE = """Load it with Apple's `recurrent_drafting`. Its `beam_length` counts the root: 5 there
drafts 4 tokens."""
_TENSORRT = """Give the folder to TensorRT-LLM's `examples/redrafter/convert_checkpoint.py` as
`--drafter_model_dir`. `--redrafter_draft_len_per_beam` counts drafted tokens, not the root."""


def check_upload(repo: str) -> None:
    """Say before the work what would stop the upload. Raises OptionError, HubError."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OptionError(
            f"--upload-repo {repo!r} is no repository id: {one_line(error).rstrip('.')}"
        ) from None
    if not get_token():
        raise HubError(f"uploading to {repo} needs a login: run `hf auth login`")


def render(summary: Summary, repo: str, target: str | None) -> str:
    """README.md of the repository: front matter, origin, how to run, files and hashes."""
    base = target or (None if summary.format.is_drafter else summary.source)
    lines = ["---", "library_name: mlx"]
    # A path on somebody's disk is no model of the hub.
    if base and base.count("/") == 1 and not base.startswith((".", "/", "~")):
        lines.append(f"base_model: {base}")
    lines += ["tags:", "- mlx", "- mlx-redrafter"]
    if summary.format.is_drafter:
        kind = summary.format.value if summary.format.is_head else "redrafter"
        lines += ["- speculative-decoding", f"- {kind}"]
    lines += ["---", "", f"# {repo}", ""]
    lines.append(
        f"Converted by mlx-redrafter from {_last(summary.source)} ({summary.format.label}) to "
        f"the layout of {summary.to}."
    )
    if target:
        lines += ["", f"Drafter for {_last(target)}."]
    lines += ["", "## Run", "", _run(summary, repo, base), "", "## Files", ""]
    lines += ["| file | bytes | SHA-256 |", "|---|---|---|"]
    lines += [f"| {file.name} | {file.size} | `{file.sha256}` |" for file in summary.files]
    return "\n".join(lines) + "\n"


def _run(summary: Summary, repo: str, base: str | None) -> str:
    if summary.to == "apple":
        return _APPLE
    if summary.to == "tensorrt-llm":
        return _TENSORRT
    drafter = summary.format.is_drafter
    model = _last(base) if base else "MODEL"
    arguments = f"--model {model} --drafter {repo}" if drafter else f"--model {repo}"
    return f"```\npip install mlx-redrafter\nmlx-redrafter chat {arguments}\n```"


def _last(name: str) -> str:
    """A hub id as it is, a path's last part."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    return name.rstrip("/").rpartition("/")[2] if is_path else name


def upload(summary: Summary, repo: str) -> Summary:
    """Make the repository if need be and upload the folder. Raises HubError; the folder stays."""
    from huggingface_hub import HfApi

    assert summary.out is not None, "only what was written is uploaded"
    try:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(summary.out))
    except Exception as error:
        raise HubError(
            f"{summary.out} is complete, but could not be uploaded to {repo} ({one_line(error)}); "
            f"try again: hf upload {repo} {summary.out}"
        ) from error
    return dataclasses.replace(summary, url=str(url))
