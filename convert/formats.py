"""Which format a checkpoint is in, told from its tensor names and config.json alone."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Any

from mlx_redrafter.drafters import block_files, eagle_files, medusa, speculator
from mlx_redrafter.errors import ConvertError
from mlx_redrafter.models import SUPPORTED
from mlx_redrafter.models.files import HEADS
from mlx_redrafter.models.weights import preview

from .checkpoint import Checkpoint


class Format(StrEnum):
    """What can be read."""

    APPLE = "apple"
    MLX = "mlx"
    TENSORRT_LLM = "tensorrt-llm"
    MODELOPT = "modelopt"
    MEDUSA = "medusa"
    SPECULATOR = "speculator"
    EAGLE = "eagle"
    BLOCK = "block"
    BASE = "base"
    GGUF = "gguf"

    @property
    def is_drafter(self) -> bool:
        return self not in (Format.BASE, Format.GGUF)

    @property
    def is_head(self) -> bool:
        """A drafter of another kind than ReDrafter."""
        return self in (Format.MEDUSA, Format.SPECULATOR, Format.EAGLE, Format.BLOCK)

    @property
    def label(self) -> str:
        return _TITLES[self]


_TITLES = {
    Format.APPLE: "ReDrafter of Apple's PyTorch code",
    Format.MLX: "ReDrafter of mlx-redrafter",
    Format.TENSORRT_LLM: "ReDrafter for TensorRT-LLM",
    Format.MODELOPT: "ReDrafter of NVIDIA ModelOpt, inside its base model",
    Format.MEDUSA: "set of Medusa heads",
    Format.SPECULATOR: "speculator",
    Format.EAGLE: "head of EAGLE",
    Format.BLOCK: "block drafter such as DFlash or DSpark",
    Format.BASE: "base model",
    Format.GGUF: "base model in GGUF",
}

# A tensor name (or a key of config.json) -> what has it. None of these is a drafter that is read
# here: other functions of other inputs, which no renaming turns into one.
_LOOK_ALIKES = (
    (
        r"(.*\.)?(gru|token_embed)\..*",
        "a GRU drafter with an embedding of its own: it computes something else than ReDrafter's "
        "cell on the target's embedding",
    ),
    (r"hydra_\w+(\..*)?", "a set of Hydra heads"),
    (
        r"drafter\.layers\..*",
        "a checkpoint that TensorRT-LLM made for its own engine (give the drafter folder that it "
        "was made from)",
    ),
)
_HEAD = re.compile(r"(lm_head|lm_heads|0)\.\d+\.(?:linear\.)?(?:weight|bias)")


def recognise(checkpoint: Checkpoint) -> Format:
    """The format of a checkpoint.

    Raises:
        ConvertError: a look-alike, an unsupported model type, or nothing known; the line says
            what was found.
    """
    names, config = checkpoint.names(), checkpoint.config
    kind = config.get("model_type")
    if kind == "redrafter":
        return Format.MLX
    _refuse_look_alikes(checkpoint)
    if head := _head(checkpoint):
        return head
    if kind in SUPPORTED and not any(name.startswith("drafter.") for name in names):
        return Format.BASE
    if any(name.startswith("drafter.lm_head.") for name in names):
        return Format.MODELOPT
    heads = {match[1] for match in map(_HEAD.fullmatch, names) if match}
    if heads & {"lm_heads", "0"} or any(name.startswith("input_projs.") for name in names):
        if heads == {"0"} and not _says_redrafter(names, config):
            raise ConvertError(
                f"{checkpoint.path} cannot be told from a Medusa head: nothing in it is "
                "ReDrafter's alone; put a config.json with hidden_size and exit_dim beside it, or "
                "give --format tensorrt-llm or medusa"
            )
        return Format.TENSORRT_LLM
    if heads:
        return Format.APPLE
    raise ConvertError(
        f"{checkpoint.path} is in no format that is read here: model_type "
        f"{kind or '(none)'}, tensors {preview(names, 3)}; needed: a ReDrafter of Apple, "
        f"TensorRT-LLM or ModelOpt, Medusa heads, a speculator, an EAGLE head, a block drafter "
        f"(DFlash, DSpark, Domino), or a base model of type {', '.join(SUPPORTED)}"
    )


def _head(checkpoint: Checkpoint) -> Format | None:
    """Another kind of drafter than ReDrafter, by what config.json says, else by the names."""
    config, names = checkpoint.config, dict.fromkeys(checkpoint.names())
    kind = config.get("model_type")
    own_file = any(file.name.startswith(HEADS.stem) for file in checkpoint.files)
    if kind == "medusa" or own_file or medusa.says_so(config):
        return Format.MEDUSA
    if kind == "mlp_speculator" or speculator.looks_so(names, config):
        return Format.SPECULATOR
    if kind in eagle_files.TYPES or eagle_files.is_one(checkpoint.folder, config, names):
        return Format.EAGLE
    if kind in block_files.TYPES or block_files.looks_so(names):
        return Format.BLOCK
    # A single head is named as TensorRT-LLM's ReDrafter may be.
    several = any(name.startswith("heads.1.") for name in medusa.renamed(names, config))
    alone = not several and any((match := _HEAD.fullmatch(n)) and match[1] == "0" for n in names)
    return Format.MEDUSA if not alone and medusa.looks_so(names, config) else None


def _says_redrafter(names: list[str], config: dict[str, Any]) -> bool:
    return "rnn_w.weight" in names or {"hidden_size", "exit_dim"} <= config.keys()


def _refuse_look_alikes(checkpoint: Checkpoint) -> None:
    marks = [*checkpoint.names(), *checkpoint.config]
    for pattern, what in _LOOK_ALIKES:
        if found := [name for name in marks if re.fullmatch(pattern, name)]:
            raise ConvertError(
                f"{checkpoint.path} is not a ReDrafter but {what}: it holds {preview(found, 3)}"
            )
