"""Drafters that others have published, by the model that they are for; of the kinds run here.

Sizes are those of the model cards or follow from the shapes of the weights.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MEDUSA, MLP, LSTM = "Medusa heads", "MLP speculator", "LSTM speculator"


class Published(NamedTuple):
    """A drafter on the Hugging Face hub.

    Args:
        id: its repository.
        kind: in words.
        bases: models that it was made for, the first one before all.
        size: in GB, 0 where it is not known.
        licence: of the weights; "" where it is not known.
        source: where these facts are from.
    """

    id: str
    kind: str
    bases: tuple[str, ...]
    size: float
    licence: str
    source: str


_BASES = "as the base model"
_MEDUSA_README, _TGI, _VLLM = "Medusa's README", "documentation of TGI", "documentation of vLLM"
_ARCTIC, _IBM = "ArcticInference", "model card"

PUBLISHED: tuple[Published, ...] = (
    # The first of a base is the one that is recommended.
    Published(
        "philschmid/llama-3-1-8b-instruct-medusa", MEDUSA,
        ("meta-llama/Llama-3.1-8B-Instruct",), 0.1, "", "model card",
    ),
    Published(
        "Snowflake/Arctic-LSTM-Speculator-Llama-3.1-8B-Instruct", LSTM,
        ("meta-llama/Llama-3.1-8B-Instruct",), 2.37, "", _ARCTIC,
    ),
    Published(
        "Snowflake/Arctic-LSTM-Speculator-Llama-3.1-70B-Instruct", LSTM,
        ("meta-llama/Llama-3.1-70B-Instruct",), 0, "", _ARCTIC,
    ),
    Published(
        "Snowflake/Arctic-LSTM-Speculator-Llama-3.3-70B-Instruct", LSTM,
        ("meta-llama/Llama-3.3-70B-Instruct",), 0, "", _ARCTIC,
    ),
    Published(
        "Snowflake/Arctic-LSTM-Speculator-Qwen2.5-32B-Instruct", LSTM,
        ("Qwen/Qwen2.5-32B-Instruct",), 0, "", _ARCTIC,
    ),
    Published(
        "text-generation-inference/Mistral-7B-Instruct-v0.2-medusa", MEDUSA,
        ("mistralai/Mistral-7B-Instruct-v0.2",), 0, "", _TGI,
    ),
    Published(
        "FasterDecoding/medusa-vicuna-7b-v1.3", MEDUSA,
        ("lmsys/vicuna-7b-v1.3",), 1.48, _BASES, _MEDUSA_README,
    ),
    Published(
        "FasterDecoding/medusa-vicuna-13b-v1.3", MEDUSA,
        ("lmsys/vicuna-13b-v1.3",), 1.9, _BASES, _MEDUSA_README,
    ),
    Published(
        "FasterDecoding/medusa-vicuna-33b-v1.3", MEDUSA,
        ("lmsys/vicuna-33b-v1.3",), 2.57, _BASES, _MEDUSA_README,
    ),
    Published(
        "ibm-ai-platform/llama3-8b-accelerator", MLP,
        ("meta-llama/Meta-Llama-3-8B-Instruct",), 6.4, "llama3", _IBM,
    ),
    Published(
        "ibm-granite/granite-3b-code-instruct-accelerator", MLP,
        ("ibm-granite/granite-3b-code-instruct",), 0, "", _VLLM,
    ),
    Published(
        "ibm-granite/granite-8b-code-instruct-accelerator", MLP,
        ("ibm-granite/granite-8b-code-instruct",), 0, "", _VLLM,
    ),
    Published(
        "ibm-granite/granite-7b-instruct-accelerator", MLP,
        ("ibm-granite/granite-7b-instruct",), 0, "", _VLLM,
    ),
)  # fmt: skip

# What a copy of a model in other numbers has behind its name.
_COPY = re.compile(r"[-_.](?:mlx|hf|dwq|awq|gptq|mxfp\d+|bf16|fp16|fp32|q\d|int\d|\d-?bits?)$")


def of_model(model: str) -> list[Published]:
    """The published drafters of a model, the recommended one first.

    A copy in other numbers counts as the model: mlx-community/Qwen3-8B-4bit is Qwen/Qwen3-8B.
    """
    name = _bare(model)
    return [row for row in PUBLISHED if name in map(_bare, row.bases)]


def _bare(model: str) -> str:
    """A hub id or a folder without its owner, and without how its weights are stored."""
    name = model.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    while (shorter := _COPY.sub("", name)) != name:
        name = shorter
    return name.removeprefix("meta-")
