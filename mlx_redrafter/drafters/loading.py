"""Read a drafter folder, check that it fits the target model, and write one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.nn as nn

from mlx_redrafter.drafters import (
    Drafter,
    block_files,
    calibration,
    eagle_files,
    files,
    medusa,
    model,
    speculator,
)
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Target
from mlx_redrafter.models.weights import parameters

# Apple's trainer may leave a norm in the checkpoint that its forward pass never uses.
_UNUSED = ("emb_norm.weight",)


class Kind(NamedTuple):
    """How a kind of drafter is read from a folder, what its files say before that, and what they
    say to people. All raise DrafterError.

    alternatives: config.json -> what could be meant where it leaves something open, as keys that
    override it, the likeliest first.
    """

    load: Callable[[Path, Target], Drafter]
    check: Callable[[Path, Target], None]
    describe: Callable[[Path], files.Description] = lambda folder: files.Description({}, {}, {}, 0)
    alternatives: Callable[[Mapping[str, Any]], Sequence[Mapping[str, Any]]] = lambda raw: [{}]


def load_drafter(folder: Path, target: Target) -> Drafter:
    """The drafter in ``folder``, bound to its target.

    Its kind is the one that config.json names; where that is none, what its tensors are called
    tells.

    Raises:
        DrafterError: missing, broken or unknown files, or a drafter for another model.
    """
    drafter = kind_of(folder).load(folder, target)
    drafter.calibration = calibration.read(folder)
    return drafter


def check_folder(folder: Path, target: Target) -> None:
    """Everything about a drafter that its files say before the weights themselves are read.

    Args:
        target: only its configuration is asked.

    Raises:
        DrafterError: missing or broken files, or a drafter for another model.
    """
    kind_of(folder).check(folder, target)


def kind_of(folder: Path) -> Kind:
    """The kind of the drafter in a folder. What nothing tells is left to the recurrent drafter,
    which says so. Raises DrafterError."""
    raw = files.raw_config(folder)
    files.refuse_pickles(folder)
    if named := DRAFTERS.get(str(raw.get("model_type"))):
        return named
    names: Mapping[str, Any] = {}
    with contextlib.suppress(DrafterError):  # the kind that it is left to says so
        names = files.stored_shapes(folder)
    return next((kind for is_one, kind in _SIGNS if is_one(folder, raw, names)), _RECURRENT)


def inside_model(folder: Path) -> bool:
    """Do a model's own files hold a drafter for it? What cannot be read holds none."""
    with contextlib.suppress(DrafterError, OSError):
        return medusa.inside(folder)
    return False


def load_recurrent(folder: Path, target: Target) -> ReDrafter:
    """A recurrent drafter (Apple's layout or ours), bound to its target; see ``files.fill``.

    Raises:
        DrafterError: missing, broken or unknown files, or a drafter for another model.
    """
    config, raw = _config(folder, target)
    weights = files.stored_weights(folder)
    for name in _UNUSED:
        weights.pop(name, None)
    drafter = files.quantised(ReDrafter(config), raw, weights, folder)
    return files.fill(drafter, weights, raw, target, folder, "ReDrafter").bind(target)


def check_recurrent(folder: Path, target: Target) -> None:
    """Configuration, names and shapes of a recurrent drafter. Raises DrafterError."""
    config, raw = _config(folder, target)
    given = {k: v for k, v in files.stored_shapes(folder).items() if k not in _UNUSED}
    drafter = files.quantised(ReDrafter(config), raw, given, folder)
    files.check_tensors(drafter, given, folder, "ReDrafter")


def describe_recurrent(folder: Path) -> files.Description:
    """What the files say of a recurrent drafter. Raises DrafterError."""
    config = ReDrafterConfig.from_dict(files.raw_config(folder))
    weights = files.stored_weights(folder)
    facts = {
        "architecture": f"{config.cell} cell, {config.num_draft_layers} residual blocks",
        "cell": config.cell,
        "head": config.head,
        "residual_blocks": config.num_draft_layers,
        "head_width": config.exit_dim,
        "context_layers": list(config.context_layers),
        "draft_vocabulary": config.output_size,
    }
    return files.Description(facts, weights, weights, config.hidden_size)


def _config(folder: Path, target: Target) -> tuple[ReDrafterConfig, dict[str, Any]]:
    """The configuration of a drafter that fits the target, and all of its config.json."""
    raw = files.raw_config(folder)
    config = ReDrafterConfig.from_dict(raw)
    check_compatible(config, target, folder)
    return config, raw


def check_compatible(config: ReDrafterConfig, target: Target, folder: Path | str) -> None:
    """Does the drafter fit the model? Sizes only: nothing is read but two configurations.

    Raises:
        DrafterError: naming both sizes.
    """
    files.check_sizes(config.hidden_size, config.vocab_size, target, folder)
    beyond = [i for i in config.context_layers if not 0 <= i < target.config.num_layers]
    if beyond:
        raise DrafterError(
            f"the drafter in {folder} reads layer {beyond[0]} of a model that has "
            f"{target.config.num_layers}: use the drafter that was trained for this model"
        )


def module_of(drafter: Drafter) -> nn.Module:
    """What holds the weights of a drafter that was loaded."""
    return drafter.model if isinstance(drafter, model.DraftModel) else cast(nn.Module, drafter)


def save_drafter(folder: Path, drafter: ReDrafter, extra: dict[str, Any] | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` in our layout; ``extra`` joins the config."""
    config = {"model_type": "redrafter", **vars(drafter.config), **(extra or {})}
    files.save(folder, config, parameters(drafter))


_RECURRENT = Kind(load_recurrent, check_recurrent, describe_recurrent)
_MEDUSA = Kind(medusa.load, medusa.LAYOUT.check, medusa.describe)
_SPECULATOR = Kind(speculator.load, speculator.LAYOUT.check, speculator.describe)
_EAGLE = Kind(
    eagle_files.load, eagle_files.LAYOUT.check, eagle_files.describe, eagle_files.alternatives
)
_BLOCK = Kind(
    block_files.load, block_files.LAYOUT.check, block_files.describe, block_files.alternatives
)
DRAFTERS: dict[str, Kind] = {
    "redrafter": _RECURRENT,
    "recurrent_drafting_drafter": _RECURRENT,  # Apple's
    "medusa": _MEDUSA,
    "mlp_speculator": _SPECULATOR,
    "eagle3": _EAGLE,
    "eagle": _EAGLE,
    **dict.fromkeys(block_files.TYPES, _BLOCK),
}
"""By ``model_type`` of the drafter's config.json."""

_SIGNS: tuple[tuple[Callable[[Path, Mapping[str, Any], Mapping[str, Any]], bool], Kind], ...] = (
    (medusa.is_one, _MEDUSA),
    (speculator.is_one, _SPECULATOR),
    (eagle_files.is_one, _EAGLE),
    (block_files.is_one, _BLOCK),
    (model.is_one, Kind(model.load, model.check, model.describe)),
)
