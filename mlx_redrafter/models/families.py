"""config.json -> DecoderConfig, one small function per family. Follows mlx_lm/models/<type>.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

from ..errors import ModelError
from . import (
    families_delta,
    families_dense,
    families_experts,
    families_gemma,
    families_llama,
    families_nested,
)
from .config import DecoderConfig, RopeConfig
from .family import Raw, rope_config

__all__ = ["FAMILIES", "SUPPORTED", "decoder_config", "rope_config"]


def decoder_config(raw: Raw, weight_names: Collection[str] = ()) -> DecoderConfig:
    """The DecoderConfig of a config.json.

    `weight_names` (after `loading.sanitize`) decide whether Gemma 3's head is tied, as in mlx-lm.
    Raises ModelError for an unknown model_type, a missing key or sizes that do not fit together.
    """
    kind = raw.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise ModelError(
            f"model_type '{kind}' is not supported; needed: one of {', '.join(SUPPORTED)}"
        )
    try:
        config = family(raw)
        if config.model_type in ("gemma3", "gemma3_text"):
            config = replace(config, tied="lm_head.weight" not in weight_names)
    except KeyError as error:
        raise ModelError(
            f"config.json of model_type '{kind}' lacks {error}; "
            "download the model's config.json again"
        ) from error
    except (AttributeError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"config.json of model_type '{kind}' has a value of the wrong kind ({error}); "
            "download the model's config.json again"
        ) from error
    _check(config)
    return config


def _check(config: DecoderConfig) -> None:
    for name in ("hidden_size", "vocab_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(config, name) < 1:
            raise ModelError(
                f"config.json gives {name} = {getattr(config, name)}; needed: at least 1"
            )
    if not 0 < config.norm_eps < math.inf:
        raise ModelError(f"config.json gives norm_eps = {config.norm_eps}; needed: more than 0")
    if (latent := config.latent) is not None:
        sizes = (latent.rank, latent.rope, latent.plain, latent.value)
        if min(sizes) < 1:
            raise ModelError(
                f"config.json gives sizes {sizes} of latent attention; needed: at least 1 each"
            )
    if len(config.layer_windows) != config.num_layers or len(config.layer_ropes) != len(
        config.layer_windows
    ):
        raise ModelError(
            f"config.json lists layer types for {len(config.layer_windows)} layers; "
            f"needed: one for each of {config.num_layers} layers"
        )
    for index, rope in enumerate(config.layer_ropes):
        _check_heads(config.layer(index), config.ropes[rope] if rope >= 0 else None)


def _check_heads(config: DecoderConfig, rope: RopeConfig | None) -> None:
    """Of one layer."""
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"config.json gives {config.num_heads} attention heads and {config.num_kv_heads} "
            "key/value heads; needed: a multiple"
        )
    if rope and (rope.dims < 2 or rope.dims % 2 or rope.dims > config.head_dim):
        raise ModelError(
            f"config.json rotates {rope.dims} of {config.head_dim} entries of a head; "
            "needed: an even number of at least 2, not above the head size"
        )


_WHOLE: dict[str, Callable[[Raw], DecoderConfig]] = {
    **families_delta.FAMILIES,
    **families_dense.FAMILIES,
    **families_experts.FAMILIES,
    **families_gemma.FAMILIES,
    **families_llama.FAMILIES,
}
FAMILIES = {**_WHOLE, **families_nested.nested(_WHOLE)}
SUPPORTED: tuple[str, ...] = tuple(sorted(FAMILIES))
