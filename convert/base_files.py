"""What a model folder holds beside its weights: configuration, tokenizer, licence."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from mlx_redrafter.errors import ConvertError, HubError, ModelError
from mlx_redrafter.models.weights import read_json
from mlx_redrafter.text import turn_ends
from mlx_redrafter.text.tokenizer import end_ids, load_tokenizer, refuse_stand_ins

from .writer import OutputFolder

_COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# transformers >= 5 builds the splitter of these classes anew instead of taking tokenizer.json's.
_REBUILT = ("GPT2Tokenizer", "GPT2TokenizerFast")
_REBUILT_UNLESS_BYTES = ("LlamaTokenizer", "LlamaTokenizerFast")


def with_end_tokens(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration with all ends of text that loading the folder finds, as mlx-lm takes them."""
    try:
        refuse_stand_ins(folder)
        ends = end_ids(folder)
    except HubError as error:
        raise ConvertError(str(error)) from None
    rest = {key: value for key, value in config.items() if key != "eos_token_id"}
    return {**rest, "eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else rest


def write_config(config: dict[str, Any], out: OutputFolder) -> None:
    """config.json as mlx-lm writes it: sorted, without what text models do not read."""
    from mlx_lm.utils import save_config

    save_config(dict(config), out.path / "config.json")


def copy_tokenizer(folder: Path, out: OutputFolder) -> None:
    """Tokenizer, chat templates, generation config and licence of a folder; never its code."""
    found = {path for pattern in _COPIED for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(found):
        shutil.copyfile(path, out.path / path.name)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        (out.path / templates.name).mkdir()
        for path in sorted(templates.glob("*.jinja")):
            shutil.copyfile(path, out.path / templates.name / path.name)
    _keep_splitter(out)
    _name_ends(folder, out)


def _name_ends(folder: Path, out: OutputFolder) -> None:
    """In generation_config.json, which mlx-lm believes first, the same ends as in config.json."""
    try:
        content = read_json(out.path / "generation_config.json")
    except ModelError:
        return
    if content.get("eos_token_id") is not None:
        out.write_json("generation_config.json", with_end_tokens(content, folder))


def _keep_splitter(out: OutputFolder) -> None:
    """Name the class that takes tokenizer.json as it is, where the named one would not."""
    config, tokenizer = out.path / "tokenizer_config.json", out.path / "tokenizer.json"
    if not (config.is_file() and tokenizer.is_file()):
        return
    try:
        content = read_json(config)
        splitter = json.dumps(read_json(tokenizer).get("pre_tokenizer"))
    except ModelError as error:
        raise ConvertError(str(error)) from error
    name = content.get("tokenizer_class")
    if name in _REBUILT or (name in _REBUILT_UNLESS_BYTES and "ByteLevel" in splitter):
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        out.write_json(config.name, content)


def name_turn_end(out: OutputFolder) -> list[str]:
    """Add the end of an answer that only the chat template knows to eos_token_id; says so."""
    try:
        tokenizer = load_tokenizer(out.path, complete=False)
    except HubError:
        return []  # a model without a tokenizer is converted all the same
    if (end := turn_ends.unnamed(tokenizer)) is None:
        return []
    ends: dict[str, Any] = {"eos_token_id": [*sorted(tokenizer.eos_token_ids), end[0]]}
    write_config({**read_json(out.path / "config.json"), **ends}, out)
    with contextlib.suppress(ModelError):  # as mlx-lm takes one that cannot be read
        ends = {**read_json(out.path / "generation_config.json"), **ends}
    out.write_json("generation_config.json", ends)
    return [
        f"the chat template ends an answer with {end[1]}, which no configuration of the source "
        "names as an end: it was added to eos_token_id"
    ]
