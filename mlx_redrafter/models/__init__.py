"""Target models, re-implemented so that a whole draft tree is verified in one pass."""

from __future__ import annotations

from .adapter import AdaptedModel
from .config import DecoderConfig, RopeConfig
from .decoder import Decoder
from .families import SUPPORTED, decoder_config
from .loading import Loaded, config_of, load_model
from .target import Target

__all__ = [
    "SUPPORTED",
    "AdaptedModel",
    "Decoder",
    "DecoderConfig",
    "Loaded",
    "RopeConfig",
    "Target",
    "config_of",
    "decoder_config",
    "load_model",
]
