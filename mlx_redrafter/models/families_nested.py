"""config.json of models that see, of which the text half is run -> DecoderConfig of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import ModelError
from .config import DecoderConfig
from .family import Raw

Family = Callable[[Raw], DecoderConfig]


def text_config(raw: Raw) -> dict[str, object]:
    """The text half's keys; what ties its head may stand outside of them."""
    text = raw.get("text_config") or raw
    tied = raw.get("tie_word_embeddings")
    outside = {} if tied is None else {"tie_word_embeddings": tied}
    return {**outside, **text, "model_type": raw["model_type"]}


def nested(families: Mapping[str, Family]) -> dict[str, Family]:
    """Types by the families of their text half."""

    def mistral3(raw: Raw) -> DecoderConfig:
        kind = str((raw.get("text_config") or {}).get("model_type", "mistral"))
        if kind not in ("llama", "ministral3", "mistral"):
            raise ModelError(
                f"the text half of model_type 'mistral3' is of type '{kind}', which is not "
                "supported; needed: mistral or ministral3"
            )
        return families[kind](text_config(raw))

    def half(name: str) -> Family:
        return lambda raw: families[name](text_config(raw))

    return {"mistral3": mistral3, "qwen3_vl": half("qwen3"), "qwen3_vl_moe": half("qwen3_moe")}
