"""Read a drafter folder, check that it fits the target model, and write one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model

from mlx_redrafter.drafters import Drafter
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.errors import DrafterError, ModelError
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.files import weight_files
from mlx_redrafter.models.weights import (
    Shape,
    finite,
    misfit,
    parameters,
    preview,
    read_header,
    read_json,
    read_weights,
    shapes,
)

# Apple's trainer may leave a norm in the checkpoint that its forward pass never uses.
_UNUSED = ("emb_norm.weight",)


class Kind(NamedTuple):
    """How a kind of drafter is read from a folder, and what its files say before that. Both raise
    DrafterError."""

    load: Callable[[Path, Decoder], Drafter]
    check: Callable[[Path, Decoder], None]


def load_drafter(folder: Path, target: Decoder) -> Drafter:
    """The drafter in ``folder``, of the kind that its config.json names, bound to its target.

    Raises:
        DrafterError: missing, broken or unknown files, or a drafter for another model.
    """
    return _kind(folder).load(folder, target)


def check_folder(folder: Path, target: Decoder) -> None:
    """Everything about a drafter that its files say before the weights themselves are read.

    Args:
        target: only its configuration is asked.

    Raises:
        DrafterError: missing or broken files, or a drafter for another model.
    """
    _kind(folder).check(folder, target)


def _kind(folder: Path) -> Kind:
    """A configuration that names no kind is left to the recurrent drafter, which says so."""
    return DRAFTERS.get(str(_raw(folder).get("model_type")), _RECURRENT)


def load_recurrent(folder: Path, target: Decoder) -> ReDrafter:
    """A recurrent drafter (Apple's layout or ours), bound to its target.

    On a CPU the weights become float32, quantised ones included: 16-bit and packed weights are
    several times slower there. Elsewhere they stay as stored, at the target's activation type.

    Raises:
        DrafterError: missing, broken or unknown files, or a drafter for another model.
    """
    config, raw = _config(folder, target)
    try:
        weights = read_weights(weight_files(folder))
    except ModelError as error:
        raise DrafterError(str(error)) from None
    for name in _UNUSED:
        weights.pop(name, None)
    drafter = _empty(config, raw, weights, folder)
    weights = {
        name: value if value.dtype in (mx.uint32, mx.int32) else value.astype(target.dtype)
        for name, value in weights.items()
    }
    _assign(drafter, weights, folder)
    if _quantization(raw, weights) and mx.default_device() == mx.Device(mx.cpu):
        drafter = cast(ReDrafter, dequantize_model(drafter))
        mx.eval(drafter.parameters())  # or every compiled step would do it again
    return drafter.bind(target)


def check_recurrent(folder: Path, target: Decoder) -> None:
    """Configuration, names and shapes of a recurrent drafter. Raises DrafterError."""
    config, raw = _config(folder, target)
    try:
        headers = [read_header(file) for file in weight_files(folder)]
    except (ModelError, OSError) as error:
        raise DrafterError(str(error)) from None
    given = {
        name: tuple(entry["shape"])
        for header in headers
        for name, entry in header.items()
        if name not in _UNUSED
    }
    _check_tensors(_empty(config, raw, given, folder), given, folder)


def _config(folder: Path, target: Decoder) -> tuple[ReDrafterConfig, dict[str, Any]]:
    """The configuration of a drafter that fits the target, and all of its config.json."""
    raw = _raw(folder)
    config = ReDrafterConfig.from_dict(raw)
    check_compatible(config, target, folder)
    return config, raw


def _raw(folder: Path) -> dict[str, Any]:
    try:
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json: give the folder of a drafter")
        return read_json(folder / "config.json")
    except ModelError as error:
        raise DrafterError(str(error)) from None


def _empty(
    config: ReDrafterConfig, raw: dict[str, Any], given: Mapping[str, Any], folder: Path
) -> ReDrafter:
    """A drafter of this shape; the layers of which packed weights are given are quantised."""
    drafter = ReDrafter(config)
    if quantization := _quantization(raw, given):
        try:
            nn.quantize(
                drafter,
                group_size=quantization["group_size"],
                bits=quantization["bits"],
                class_predicate=lambda path, module: f"{path}.scales" in given,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DrafterError(
                f"the quantization of the drafter in {folder} cannot be read ({error}); "
                "needed: a group_size and bits that its layers can have"
            ) from None
    return drafter


def _quantization(raw: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json says of packed weights; nothing where none are stored."""
    return raw.get("quantization") if any(name.endswith(".scales") for name in given) else None


def check_compatible(config: ReDrafterConfig, target: Decoder, folder: Path | str) -> None:
    """Does the drafter fit the model? Sizes only: nothing is read but two configurations.

    Raises:
        DrafterError: naming both sizes.
    """
    for what, mine, theirs in [
        ("hidden size", config.hidden_size, target.config.hidden_size),
        ("vocabulary size", config.vocab_size, target.config.vocab_size),
    ]:
        if mine != theirs:
            raise DrafterError(
                f"the drafter in {folder} is for a model with {what} {mine}, but this model's is "
                f"{theirs}: use the drafter that was trained for this model, or --no-draft"
            )
    beyond = [i for i in config.context_layers if not 0 <= i < target.config.num_layers]
    if beyond:
        raise DrafterError(
            f"the drafter in {folder} reads layer {beyond[0]} of a model that has "
            f"{target.config.num_layers}: use the drafter that was trained for this model"
        )


def save_drafter(folder: Path, drafter: ReDrafter, extra: dict[str, Any] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` in our layout; ``extra`` joins the config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "redrafter", **vars(drafter.config), **(extra or {})}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = parameters(drafter)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def _assign(drafter: ReDrafter, weights: dict[str, mx.array], folder: Path) -> None:
    """Put the weights in; every tensor must be known, present, of its shape and finite."""
    _check_tensors(drafter, shapes(weights), folder)
    drafter.load_weights(list(weights.items()))
    flags = finite(weights)
    mx.eval(drafter.parameters(), flags)
    if broken := [name for name, flag in flags.items() if not flag.item()]:
        raise DrafterError(f"the drafter in {folder} holds NaN or infinity: {preview(broken)}")
    ids = cast(list[int], weights["draft_vocab"].tolist()) if "draft_vocab" in weights else [0]
    if not 0 <= min(ids) <= max(ids) < drafter.config.vocab_size:
        raise DrafterError(f"the draft vocabulary in {folder} holds tokens beyond the model's")


def _check_tensors(drafter: ReDrafter, given: Mapping[str, Shape], folder: Path) -> None:
    missing, unknown, wrong = misfit(shapes(parameters(drafter)), given)
    if missing:
        raise DrafterError(f"the drafter in {folder} lacks {preview(missing)}: download it again")
    if unknown:
        raise DrafterError(
            f"the drafter in {folder} has tensors that no ReDrafter has: {preview(unknown)}"
        )
    if wrong:
        raise DrafterError(f"tensors in {folder} do not fit its config.json: {preview(wrong)}")


_RECURRENT = Kind(load_recurrent, check_recurrent)
DRAFTERS: dict[str, Kind] = {
    "redrafter": _RECURRENT,
    "recurrent_drafting_drafter": _RECURRENT,  # Apple's
}
"""By ``model_type`` of the drafter's config.json."""
