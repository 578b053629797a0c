"""How a GGUF file stretches its positions: every key is read, or the file is refused with a reason.

Meanings: load_hparams in llama-model.cpp of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from mlx_redrafter.errors import ConvertError
from mlx_redrafter.hub.gguf.blocks import dequantise
from mlx_redrafter.hub.gguf.file import GgufFile

# Llama 3.1's rotary factors; configuration rather than weights.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
FACTORS = (ROPE_FACTORS, *LONG_FACTORS)
# (low, high) frequency factors and first context length of every published Llama 3.x.
_LLAMA3 = (1.0, 4.0, 8192)
_KINDS = ("linear", "yarn")
_READ = (
    "dimension_count", "freq_base", "scale_linear", "scaling.type", "scaling.factor",
    "scaling.original_context_length", "scaling.finetuned", "scaling.yarn_beta_fast",
    "scaling.yarn_beta_slow",
)  # fmt: skip
# What has no place in config.json may say only what holds without it.
_NEUTRAL: Mapping[str, tuple[float, ...]] = {
    "scale": (1,), "scaling.alpha": (0,), "scaling.attn_factor": (1,),
    "scaling.yarn_attn_factor": (1,), "scaling.yarn_ext_factor": (1, -1),
    "scaling.yarn_log_multiplier": (0,),
}  # fmt: skip
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
_LOG = "scaling.yarn_log_multiplier"


def factors_of(file: GgufFile, name: str) -> np.ndarray | None:
    """One factor for every frequency, float32; None where the file has none."""
    if (tensor := file.tensors.get(name)) is None:
        return None
    return dequantise(tensor.kind, file.read(tensor)).reshape(-1)


class Positions(NamedTuple):
    """`max_position_embeddings` and `rope_scaling` of config.json."""

    length: int
    scaling: dict[str, Any] | None


def positions(
    file: GgufFile, architecture: str, turned: int, also: Sequence[str] = ()
) -> Positions:
    """What a file says of its positions; ``turned`` entries of a head have one, and ``also`` names
    keys that are read for this architecture alone.

    A factor without a type is linear, as in llama.cpp; `rope.scale_linear` is its old name. The
    length is the unstretched one where config.json counts so (linear). Raises ConvertError.
    """
    return _Keys(file, architecture).positions(turned, also)


class _Keys:
    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.path, self.architecture = file.path, architecture
        start = f"{architecture}.rope."
        self.given = {k[len(start) :]: v for k, v in file.metadata.items() if k.startswith(start)}
        self.context = int(file.get(f"{architecture}.context_length", 2048))
        self.original = self.given.get("scaling.original_context_length")
        self.file = file

    def positions(self, head_dim: int, also: Sequence[str] = ()) -> Positions:
        if self._holds(LONG_FACTORS[0]):
            return Positions(self.context, self._longrope(head_dim))
        for key, value in self.given.items():
            known = key in _READ or key in also
            if not known and value not in _NEUTRAL.get(key, ()):
                self._refuse(f"rope.{key} is {value!r}, which is not read here")
        factor, kind = self._factor(), self.given.get("scaling.type")
        betas = {k: self.given.get(f"scaling.yarn_{k}", usual) for k, usual in _BETAS.items()}
        if kind not in (None, "none", *_KINDS):
            self._refuse(f"rope scaling {kind!r}; needed: {' or '.join(_KINDS)}")
        if kind in _KINDS and factor is None:
            self._refuse(f"rope scaling {kind!r} without a factor")
        if kind == "none" and factor not in (None, 1):
            self._refuse(f"a scaling factor of {factor:g}, and scaling 'none'")
        if kind != "yarn" and betas != _BETAS:
            self._refuse("bounds of a yarn scaling without its type")
        if self._holds(ROPE_FACTORS):
            if factor not in (None, 1):
                self._refuse(f"both {ROPE_FACTORS} and a scaling factor of {factor:g}")
            return Positions(self.context, self._llama3(head_dim))
        if factor is None and self.original not in (None, self.context):
            self._refuse(f"an original context length of {self.original} without a factor")
        if factor in (None, 1):
            return Positions(self.context, None)
        assert factor is not None
        if kind == "yarn":
            return Positions(self.context, self._yarn(factor, betas, _LOG in also))
        first = self.original or self.context
        scaling = {"type": "linear", "rope_type": "linear", "factor": factor}
        return Positions(max(first, math.ceil(self.context / factor)), scaling)

    def _factor(self) -> float | None:
        """0 is how some files write that there is none."""
        new, old = self.given.get("scaling.factor") or None, self.given.get("scale_linear") or None
        if new is not None and old not in (None, 1, new):
            self._refuse(f"two scaling factors, {new:g} and {old:g}")
        factor = old if new is None else new
        if factor is not None and factor < 1:
            self._refuse(f"a scaling factor of {factor:g}; needed: 1 or more")
        return factor

    def _yarn(self, factor: float, betas: dict[str, float], logarithmic: bool) -> dict[str, Any]:
        scaling = {"type": "yarn", "rope_type": "yarn", "factor": factor}
        scaling["original_max_position_embeddings"] = self.original or self.context
        if logarithmic and (growth := self.given.get(_LOG)):
            # llama.cpp's DeepSeek files have a tenth; of these models mscale equals mscale_all_dim.
            growth = round(growth * (10.0 if self.architecture == "deepseek2" else 1.0), 6)
            scaling |= {"mscale": growth, "mscale_all_dim": growth}
        return {**scaling, **(betas if betas != _BETAS else {})}

    def _longrope(self, head_dim: int) -> dict[str, Any]:
        """Phi-3's factors of every frequency, for short texts and long ones, as they are."""
        allowed = (*_READ, "scaling.attn_factor")
        for key, value in self.given.items():
            if key not in allowed and value not in _NEUTRAL.get(key, ()):
                self._refuse(f"rope.{key} is {value!r}, which is not read here")
        if self.given.get("scaling.type") not in (None, "none", "longrope"):
            self._refuse(f"rope scaling {self.given['scaling.type']!r} and {LONG_FACTORS[0]}")
        original = max(self.original or self.context, 2)
        stretch = max(self.context / original, 1.0)
        usual = math.sqrt(1 + math.log(stretch) / math.log(original))
        given = self.given.get("scaling.attn_factor", 1.0)
        if not math.isclose(given, usual, rel_tol=1e-3):
            self._refuse(f"rope.scaling.attn_factor is {given:g}; needed: {usual:g}")
        factors = {}
        for kind, name in zip(("long_factor", "short_factor"), LONG_FACTORS, strict=True):
            if not self._holds(name):
                self._refuse(f"{LONG_FACTORS[0]} without {name}")
            factors[kind] = self._stored(name).tolist()
            if len(factors[kind]) != head_dim // 2:
                self._refuse(f"{len(factors[kind])} of {head_dim // 2} factors in {name}")
        return {"type": "longrope", "rope_type": "longrope", **factors}

    def _holds(self, name: str) -> bool:
        return name in self.file.tensors

    def _stored(self, name: str) -> np.ndarray:
        found = factors_of(self.file, name)
        assert found is not None
        return found

    def _llama3(self, head_dim: int) -> dict[str, Any] | None:
        """The parameters behind the factors of Llama 3.1, which the file stores computed."""
        stored = self._stored(ROPE_FACTORS)
        if (stored == 1).all():
            return None
        factor = round(float(stored.max()), 6)
        low, high, usual = _LLAMA3
        original = self.original or usual
        steps = np.arange(stored.size) / stored.size
        wavelengths = 2 * math.pi * float(self.given.get("freq_base", 10000.0)) ** steps
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        fits = stored.size == head_dim // 2 and factor >= 1
        if not fits or not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
            self._refuse(f"factors of its own ({ROPE_FACTORS}), which are not Llama 3's")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def _refuse(self, what: str) -> NoReturn:
        raise ConvertError(
            f"{self.path} stretches its positions in a way that is not understood: {what}; "
            "convert the model's Hugging Face version"
        )
