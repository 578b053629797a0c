"""config.json of models that see, of which the text half is run -> DecoderConfig of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import ModelError
from .config import DecoderConfig
from .family import Raw

Family = Callable[[Raw], DecoderConfig]
_MISTRALS = ("llama", "ministral3", "mistral")


def text_config(raw: Raw) -> dict[str, object]:
    """The text half's keys; what ties its head may stand outside of them."""
    text = raw.get("text_config") or raw
    tied = raw.get("tie_word_embeddings")
    outside = {} if tied is None else {"tie_word_embeddings": tied}
    return {**outside, **text, "model_type": raw["model_type"]}


def half_of(raw: Raw) -> str:
    """The type that a config.json gives its text half; empty: none."""
    return str((raw.get("text_config") or {}).get("model_type", ""))


def elsewhere(raw: Raw) -> bool:
    """Is a type that our decoder has of a text half that mlx_lm alone has?"""
    return raw.get("model_type") == "mistral3" and half_of(raw) == "mistral4"


def nested(families: Mapping[str, Family]) -> dict[str, Family]:
    """Types by the families of their text half."""

    def mistral3(raw: Raw) -> DecoderConfig:
        kind = half_of(raw) or "mistral"
        if kind not in _MISTRALS:
            raise ModelError(
                f"the text half of model_type 'mistral3' is of type '{kind}', which is not "
                "supported; needed: mistral, ministral3 or mistral4"
            )
        return families[kind](text_config(raw))

    def half(name: str) -> Family:
        return lambda raw: families[name](text_config(raw))

    return {"mistral3": mistral3, "qwen3_vl": half("qwen3"), "qwen3_vl_moe": half("qwen3_moe")}
