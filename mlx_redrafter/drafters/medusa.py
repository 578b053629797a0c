"""Medusa heads (arXiv 2401.10774): every level guesses from the same hidden state, by itself.

    x = h; x = x + silu(W x + b) per residual block; logits = U x

h is the target's last hidden state. Head 0 guesses the token after the root, which the target's own
head has chosen; no head reads any token. So the tree is the product of the heads' distributions,
and beam search over sums of their costs finds its best part. U is a matrix of every head's own, one
for all heads, or the target's. A file may have a draft vocabulary.

The layouts that are read differ in names only: the reference code's and TGI's (with output matrices
or without), vLLM's, ModelOpt's, TensorRT-LLM's; with the base model's weights around them or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafters import files
from mlx_redrafter.drafters.levels import LevelDrafter
from mlx_redrafter.drafters.recurrent import ResBlock
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Target
from mlx_redrafter.models.files import HEADS
from mlx_redrafter.models.weights import Shape, parameters, shapes
from mlx_redrafter.tree.nodes import integers

KIND = "Medusa head"
T = TypeVar("T")

_WRAPPER = re.compile(r"(?:.*\.)?medusa_heads?\.")
_BLOCK = "heads.{}.blocks.{}.linear.{}"
_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"(\d+)\.(?:medusa_layers\.)?(\d+)\.linear\.(\w+)", _BLOCK),
        (r"blocks\.(\d+)\.layers\.(\d+)\.(\w+)", _BLOCK),
        (r"(\d+)\.lm_head\.(\w+)", "heads.{}.out.{}"),
        (r"lm_heads\.(\d+)\.(\w+)", "heads.{}.out.{}"),
        (r"(\d+)\.\d+\.(\w+)", "heads.{}.out.{}"),
        (r"lm_head\.(\w+)", "shared.{}"),
        (r"token_map|draft_vocab", files.VOCABULARY),
    )
]
_FILE = HEADS.stem
_COUNTS = ("medusa_num_heads", "num_medusa_heads")


@dataclass(frozen=True)
class MedusaConfig:
    """Shape of the heads, told from their tensors: what config.json says of them is often wrong.

    Args:
        hidden_size: ``D`` of the target.
        vocab_size: ``V`` of the target; None where no tensor and no configuration says it.
        heads: ``K``.
        blocks: residual blocks of every head.
        bias: have the blocks one?
        head: ``own`` output matrices | one ``shared`` by all heads | the ``target``'s.
        rows: of a stored output matrix.
        draft_vocab_size: None: the target's whole vocabulary.
        scale: of the logits.
    """

    hidden_size: int
    vocab_size: int | None
    heads: int
    blocks: int
    bias: bool
    head: str
    rows: int
    draft_vocab_size: int | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, raw: Mapping[str, Any], given: Mapping[str, Shape], folder: Path) -> MedusaConfig:
        """From config.json and shapes by canonical names.

        Raises:
            DrafterError: no heads are there, or what a head cannot have.
        """
        heads = _count(given, r"heads\.(\d+)\.", folder)
        blocks = _count(given, r"heads\.\d+\.blocks\.(\d+)\.", folder)
        if not heads or not blocks:
            raise DrafterError(
                f"the drafter in {folder} lacks the heads' tensors: needed is a file with those "
                "of a Medusa head (0.0.linear.weight or another layout's name)"
            )
        if str(raw.get("medusa_hidden_act", "silu")) != "silu":
            raise DrafterError(
                f"the drafter's medusa_hidden_act {raw['medusa_hidden_act']!r} is unknown: it is "
                "silu"
            )
        own = any(".out." in name for name in given)
        head = "own" if own else "shared" if "shared.weight" in given else "target"
        outputs = [given[n] for n in given if n.endswith(".out.weight") or n == "shared.weight"]
        rows, drafted = files.rows(outputs[0]) if outputs else 0, files.drafted(given)
        square = next((given[name] for name in given if name.endswith(".linear.weight")), ())
        hidden = files.size("hidden_size", raw.get("hidden_size") or files.rows(square))
        vocabulary = raw.get("vocab_size")
        if vocabulary is None and drafted is None and rows:
            vocabulary = rows
        scale = raw.get("logit_scale", 1.0)
        if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise DrafterError(f"the drafter's logit_scale {scale!r} is no positive number")
        return cls(
            hidden,
            None if vocabulary is None else files.size("vocab_size", vocabulary),
            heads,
            blocks,
            any(name.endswith(".linear.bias") for name in given),
            head,
            rows,
            drafted,
            float(scale),
        )


def _count(names: Iterable[str], pattern: str, folder: Path) -> int:
    """How many numbers stand at a place of the names. Raises DrafterError: one is left out."""
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    lacking = set(range(len(found))) - found
    if lacking:
        raise DrafterError(
            f"the drafter in {folder} lacks number {min(lacking)} of its Medusa heads or their "
            "blocks: download it again"
        )
    return len(found)


class Head(nn.Module):
    """One level: residual blocks, and an output matrix where it has its own."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.blocks = [ResBlock(config.hidden_size, config.bias) for _ in range(config.blocks)]
        if config.head == "own":
            self.out = nn.Linear(config.hidden_size, config.rows, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = block(x)
        return x


class Medusa(nn.Module, LevelDrafter):
    """All heads of a base model; a ``drafters.Drafter``."""

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = [Head(config) for _ in range(config.heads)]
        if config.head == "shared":
            self.shared = nn.Linear(config.hidden_size, config.rows, bias=False)
        if config.draft_vocab_size:
            self.draft_vocab = mx.zeros((config.draft_vocab_size,), mx.int32)

    @property
    def levels(self) -> int:  # type: ignore[override]
        return self.config.heads

    def bind(self, target: Target) -> Medusa:
        """Take what is the target's: its output rows, where the heads have none."""
        drafted = self.draft_vocab if self.config.draft_vocab_size else None
        every = integers(range(target.config.vocab_size))
        self._vocabulary = every if drafted is None else drafted
        if self.config.head == "target":
            self._logits = files.target_logits(target, drafted)
        elif drafted is not None and self.config.rows != drafted.shape[0]:
            for layer in self._outputs():
                files.cut_rows(layer, drafted)
        return self

    def _outputs(self) -> list[nn.Module]:
        return [self.shared] if self.config.head == "shared" else [h.out for h in self.heads]

    @property
    def vocabulary(self) -> mx.array:  # type: ignore[override]
        return self._vocabulary

    def first(self, context: mx.array, depth: int) -> mx.array:
        """(R, D) -> the heads' logits side by side (R, depth * Vd): an output matrix that all
        share is read once. A search has one row."""
        rows = [head(context) for head in self.heads[:depth]]
        if self.config.head == "own":
            parts = zip(self.heads, rows, strict=False)
            logits = mx.concatenate([head.out(x) for head, x in parts], axis=-1)
        else:
            output = self.shared if self.config.head == "shared" else self._logits
            logits = output(mx.concatenate(rows))  # (depth * R, Vd), head after head
            if context.shape[0] > 1:
                logits = logits.reshape(depth, -1, logits.shape[-1]).swapaxes(0, 1)
            logits = logits.reshape(context.shape[0], -1)
        return logits if self.config.scale == 1.0 else logits * self.config.scale

    def level(self, index: int, tokens: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
        """One row of logits for all beams."""
        size = self._vocabulary.shape[0]
        return state[:, index * size : (index + 1) * size], state


def is_one(folder: Path, raw: Mapping[str, Any], names: Mapping[str, Any]) -> bool:
    """Do a folder's configuration or its tensors' names say that it holds Medusa heads?"""
    return says_so(raw) or any(folder.glob(f"{_FILE}*")) or looks_so(names, raw)


def says_so(raw: Mapping[str, Any]) -> bool:
    """Does a configuration tell of Medusa heads?"""
    return isinstance(raw.get("medusa"), dict) or any(raw.get(key) for key in _COUNTS)


def looks_so(stored: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    """Are tensors named as those of Medusa heads are?"""
    return any(name.startswith("heads.0.blocks.0.") for name in renamed(stored, raw))


def written(name: str) -> str:
    """A canonical name of a tensor -> the one that is written: vLLM's."""
    parts = name.split(".")
    if parts[0] == "shared":
        return ".".join(["lm_head", *parts[1:]])
    if parts[0] != "heads":
        return name
    if parts[2] == "out":
        return ".".join(["lm_heads", parts[1], *parts[3:]])
    return ".".join(["blocks", parts[1], "layers", parts[3], *parts[5:]])


def stored_config(shape: MedusaConfig) -> dict[str, Any]:
    """The config.json of what is written."""
    return {
        "model_type": "medusa",
        "hidden_size": shape.hidden_size,
        **({"vocab_size": shape.vocab_size} if shape.vocab_size else {}),
        "num_heads": shape.heads,
        "num_hidden_layers": shape.blocks,
        "medusa_fc_bias": shape.bias,
        "original_lm_head": shape.head == "shared",
        **({"logit_scale": shape.scale} if shape.scale != 1 else {}),
    }


def save(folder: Path, heads: Medusa, extra: Mapping[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors``; ``extra`` joins the config."""
    weights = {written(name): value for name, value in parameters(heads).items()}
    files.save(folder, {**stored_config(heads.config), **extra}, weights)


def inside(folder: Path) -> bool:
    """Do a model's own files hold heads for it, as those of Medusa-2 do? Raises DrafterError."""
    found = _files(folder)
    return bool(found) or looks_so(files.stored_shapes(folder), files.raw_config(folder))


def _files(folder: Path) -> list[Path]:
    """The heads' own file where one lies beside a model's; otherwise the model is read."""
    return sorted(folder.glob(f"{_FILE}*.safetensors"))


def renamed(stored: Mapping[str, T], raw: Mapping[str, Any]) -> dict[str, T]:
    """Canonical names -> tensors. What is the base model's is left out; what only looks like a
    head's keeps its name, and no head has it."""
    inside = any(_WRAPPER.match(name) for name in stored)
    result: dict[str, T] = {}
    for name, value in stored.items():
        wrapper, inner = _WRAPPER.match(name), _inner(name)
        if inside and not wrapper and inner not in ("token_map", files.VOCABULARY):
            continue
        known = _canonical(inner)
        if known is not None and known not in result:
            result[known] = value
        elif known is not None or wrapper or inner[:1].isdigit():
            result[name] = value
    outputs = {name for name in result if ".out." in name}
    shared = {name for name in result if name.startswith("shared.")}
    if raw.get("original_lm_head"):
        # All heads' matrices are one.
        for name in sorted(outputs) if not shared else ():
            result.setdefault(f"shared.{name.rpartition('.')[2]}", result[name])
        return {name: value for name, value in result.items() if name not in outputs}
    if outputs or not any(name.startswith("blocks.") for name in map(_inner, stored)):
        # Only vLLM stores one matrix for all heads; another's lm_head is the base model's.
        return {name: value for name, value in result.items() if name not in shared}
    return result


def _inner(name: str) -> str:
    wrapper = _WRAPPER.match(name)
    return name[wrapper.end() :] if wrapper else name


def _canonical(name: str) -> str | None:
    for pattern, form in _NAMES:
        if match := pattern.fullmatch(name):
            return form.format(*match.groups())
    return None


def _module(
    raw: Mapping[str, Any], given: Mapping[str, Shape], target: Target, folder: Path
) -> Medusa:
    """Heads of this shape, if they are for the target."""
    config = MedusaConfig.of(raw, given, folder)
    vocabulary = target.config.vocab_size
    known = vocabulary if config.vocab_size is None else config.vocab_size
    files.check_sizes(config.hidden_size, known, target, folder)
    if config.head != "target":
        files.check_rows(config.rows, vocabulary, config.draft_vocab_size, folder)
    return Medusa(config)


LAYOUT = files.Layout(KIND, _files, renamed, _module)


def load(folder: Path, target: Target) -> Medusa:
    """The Medusa heads in a folder, bound to their target; see ``files.Layout.load``."""
    return LAYOUT.load(folder, target).bind(target)


def describe(folder: Path) -> files.Description:
    """What the files say of the heads. Raises DrafterError."""
    raw, weights = LAYOUT.weights(folder)
    config = MedusaConfig.of(raw, shapes(weights), folder)
    one = {n: v for n, v in weights.items() if n.startswith(("heads.0.", "shared."))}
    facts = {
        "architecture": f"{config.heads} Medusa head{'s' * (config.heads > 1)}, "
        f"{config.blocks} residual block{'s' * (config.blocks > 1)} each",
        "head": config.head,
        "residual_blocks": config.blocks,
        "heads": config.heads,
        "head_width": config.hidden_size,
        "base": raw.get("base_model_name_or_path"),
        "draft_vocabulary": config.draft_vocab_size or config.vocab_size,
    }
    return files.Description(facts, weights, one, config.hidden_size)
