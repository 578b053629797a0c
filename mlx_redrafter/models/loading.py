"""A model folder -> Decoder, checked: whatever is wrong with it is one line of ModelError."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ..errors import ModelError
from ..runtime.device import fused_kernels
from . import adapted, registry
from .adapter import AdaptedModel
from .config import DecoderConfig
from .decoder import Decoder
from .families import decoder_config
from .files import weight_files
from .layout import arranged, exact
from .share import Plan, Share
from .stored import as_stored, packed_layers
from .unread import unread
from .weights import (
    finite,
    materialise,
    misfit,
    parameters,
    preview,
    read_json,
    read_weights,
    shapes,
)

Weights = dict[str, mx.array]
Loaded = Decoder | AdaptedModel
"""A target with its weights, whichever way it is run."""

# mode -> the only (bits, group size) it allows, which also identifies it.
_FLOAT_MODES = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}


SHARED = "mlx_redrafter_share"
"""In the config.json of a folder that holds one machine's share of a model: which."""


def load_model(
    folder: Path, dtype: mx.Dtype | None = None, native: bool = True, plan: Plan | None = None
) -> Loaded:
    """The target model in `folder` (config.json and *.safetensors, MLX or Hugging Face layout).

    A type that our decoder does not have, or any with native=False, is run as mlx_lm's own module.

    dtype of all floating arrays: as given; else float32 on a CPU device, where 16-bit arithmetic
    is several times slower; else as stored. plan: how several machines share it. Raises ModelError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; needed: a folder with config.json and weights")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; needed: a model in Hugging Face layout")
    raw = read_json(folder / "config.json")
    if registry.way(raw, native) == "adapter":
        if plan is not None:
            raise ModelError(
                f"model_type '{raw.get('model_type')}' runs as mlx_lm's own module, which several "
                "machines cannot share here; needed: one of the types that `mlx-redrafter info` "
                "calls native, or --hosts left out"
            )
        return adapted.load(folder, dtype)
    model, weights = _read_native(folder, plan)
    if dtype is None and not fused_kernels():
        dtype = mx.float32
    weights = _convert(weights, model.config, dtype)
    model.update(tree_unflatten(list(weights.items())))
    del weights
    _materialise(model, folder)
    model.eval()
    return model


def config_of(raw: Mapping[str, Any]) -> DecoderConfig:
    """The sizes of a config.json's model, whichever way it is run. Raises ModelError."""
    return decoder_config(raw) if registry.way(raw) == "native" else adapted.sized(raw).config


def read_model(folder: Path) -> tuple[Loaded, Weights]:
    """The model of a folder, by what is stored there, and the weights that go into it.

    They have its names and shapes, without a head that is tied. Nothing is evaluated yet.
    Raises ModelError.
    """
    if registry.way(read_json(folder / "config.json")) == "native":
        return _read_native(folder)
    module, raw = adapted.lazily(folder)
    return AdaptedModel(module, raw), parameters(module)


def unpacked_like(model: Loaded, folder: Path) -> nn.Module:
    """A model of the same sizes whose weights are not packed. No array is made: none is evaluated.

    Raises ModelError.
    """
    if isinstance(model, AdaptedModel):
        return adapted.sized(read_json(folder / "config.json"))
    return Decoder(model.config)


def stored_weights(folder: Path) -> tuple[DecoderConfig, Weights, dict[str, Any]]:
    """What a folder holds for our decoder, by the names that it has for the whole model, and
    config.json as what is stored means it. Nothing is evaluated. Raises ModelError."""
    raw = read_json(folder / "config.json")
    decoder_config(raw)  # an unsupported type is said before gigabytes are read
    weights = read_weights(weight_files(folder))
    if SHARED not in raw:  # a share is stored as the decoder has it
        weights = arranged(sanitize(weights), raw)
    raw = as_stored(raw, {name: value.dtype for name, value in weights.items()})
    config = decoder_config(raw, weights.keys())
    if config.tied:
        weights = {k: v for k, v in weights.items() if not k.startswith("lm_head.")}
    return config, weights, raw


def _read_native(folder: Path, plan: Plan | None = None) -> tuple[Decoder, Weights]:
    config, weights, raw = stored_weights(folder)
    if SHARED in raw and plan is None:
        raise ModelError(
            f"{folder} holds one machine's share of a model: load it with --hosts, on the machines "
            "that have the other shares"
        )
    share: Share | None = None
    if plan is not None:
        share, weights = plan.cut(config, weights, raw)
    model = Decoder(config, share)
    _quantize(model, weights)
    _check_fit(model, weights, folder)
    return model, weights


def sanitize(weights: Mapping[str, mx.array]) -> Weights:
    """The text half only, named as if it stood alone, without precomputed rotary frequencies and
    heads that draft."""
    result = {}
    for name, value in weights.items():
        if unread(name):
            continue
        # Newer multimodal checkpoints put `model.` before `language_model.`, older ones after it.
        if name.startswith("model.language_model."):
            name = name.removeprefix("model.")
        if name.startswith("language_model."):
            name = name.removeprefix("language_model.")
            if not name.startswith(("model.", "lm_head.")):
                name = "model." + name
        result[name] = value
    return result


def _convert(weights: Weights, config: DecoderConfig, dtype: mx.Dtype | None) -> Weights:
    """Apply the dtype, and Gemma's offset of norm weights. Nothing is evaluated."""
    result = {}
    for name, value in weights.items():
        if dtype is not None and mx.issubdtype(value.dtype, mx.floating) and not exact(name):
            value = value.astype(dtype)
        last = name == "model.norm.weight"
        if config.norm_offset and name.endswith("norm.weight"):
            value = value if last and not config.norm_offset_last else config.norm_offset + value
        result[name] = value
    return result


def _quantize(model: Decoder, weights: Weights) -> None:
    """Turn into quantised layers what is stored so, in the way that the shapes tell."""
    packed = packed_layers({name: value.dtype for name, value in weights.items()})

    def params(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in packed or not hasattr(module, "to_quantized"):
            return False
        scales = weights[f"{path}.scales"]
        inputs, words = module.weight.shape[-1], weights[f"{path}.weight"].shape[-1]
        bits, group_size = words * 32 // inputs, inputs // scales.shape[-1]
        affine = scales.dtype != mx.uint8
        mode = "affine" if affine else _FLOAT_MODES.get((bits, group_size), "unknown")
        return {"group_size": group_size, "bits": bits, "mode": mode}

    try:
        nn.quantize(model, class_predicate=params)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            f"the quantised weights do not fit config.json ({error}); "
            "convert the model again with mlx_lm.convert"
        ) from error


def _check_fit(model: Decoder, weights: Weights, folder: Path) -> None:
    """Names and shapes of the weights must be exactly the model's."""
    found = misfit(shapes(parameters(model)), shapes(weights))
    if names := found.names("has unknown {}"):
        raise ModelError(
            f"the weights in {folder} do not fit its config.json: it {names}; "
            "download the model again, or convert it with mlx_lm.convert"
        )
    if found.misshapen:
        raise ModelError(
            f"tensors in {folder} have other shapes than config.json says: "
            f"{preview(found.misshapen, 3)}; download config.json and weights of the same model"
        )


def _materialise(model: Decoder, folder: Path) -> None:
    """Read, check and fuse one layer after the other, so that no second copy of all exists."""
    for index, layer in enumerate(model.model.layers):
        flags = finite(parameters(layer), f"model.layers.{index}.")
        layer.fuse()
        materialise(layer, flags, folder)
    rest = {f"model.{name}.": part for name, part in model.model.items() if name != "layers"}
    if "lm_head" in model:
        rest["lm_head."] = model.lm_head
    for prefix, module in rest.items():
        materialise(module, finite(parameters(module), prefix), folder)
