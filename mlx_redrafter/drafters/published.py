"""Drafters that others have published, by the model that they are for.

Sizes are those of the model cards or follow from the shapes of the weights. Tokens per step are as
published, each under conditions of its own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MEDUSA, MLP, LSTM = "Medusa", "MLP", "LSTM"
EAGLE_3, EAGLE_1, DSPARK, DFLASH, SMALL = "EAGLE-3", "EAGLE-1", "DSpark", "DFlash", "small model"

LOADED_KINDS = frozenset({MEDUSA, MLP, LSTM, EAGLE_3, EAGLE_1, DSPARK, DFLASH, SMALL})
"""What --drafter takes; the others are listed, and recommended nowhere."""
CONVERTED_KINDS = frozenset({MEDUSA, MLP, LSTM, EAGLE_3, EAGLE_1, DSPARK, DFLASH})
"""Of these, what convert reads from PyTorch files."""


class Published(NamedTuple):
    """A drafter on the Hugging Face hub.

    Args:
        id: its repository.
        kind: one of the names above.
        bases: models that it was made for, the first one before all.
        size: in GB, 0 where it is not known.
        licence: of the weights; "" where it is not known.
        source: where these facts are from.
        figures: tokens per step, and of what; "" where none are published.
        pickled: are its weights a PyTorch file, which has to be converted first?
    """

    id: str
    kind: str
    bases: tuple[str, ...]
    size: float
    licence: str
    source: str
    figures: str = ""
    pickled: bool = False

    @property
    def usable(self) -> bool:
        """Can it be used, once it was converted if that is needed?"""
        return self.kind in LOADED_KINDS and (not self.pickled or self.kind in CONVERTED_KINDS)


_BASES, _MIT = "as the base model", "MIT"
_MEDUSA_README, _TGI, _VLLM = "Medusa's README", "documentation of TGI", "documentation of vLLM"
_ARCTIC, _IBM, _EAGLE = "ArcticInference", "model card", "EAGLE's README"
_FORGE, _DEEPSPEC = "SpecForge's data", "DeepSpec's README"
_RED, _ANGEL = "speculators", "AngelSlim"
_MEAN = "mean of four sets; chain of about 2"
_R1 = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
_LLAMA_8B, _LLAMA_70B = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"

PUBLISHED: tuple[Published, ...] = (
    # Of a base the one with the best published figures comes first: it is recommended, if its
    # kind is loaded. Heads for one base differ by 30 to 60 %.
    Published(
        "lmsys/SGLang-EAGLE3-Llama-3.1-8B-Instruct-SpecForge", EAGLE_3, (_LLAMA_8B,), 0.85,
        "", _FORGE, "MT-bench 3.52, HumanEval 4.32, GSM8K 2.85; chain of 5",
    ),
    Published(
        "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", EAGLE_3, (_LLAMA_8B,), 0.85, "", _FORGE,
        "MT-bench 3.55, HumanEval 3.74, GSM8K 1.76; chain of 5", pickled=True,
    ),
    Published(
        "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3", EAGLE_3, (_LLAMA_8B,), 0.85, "", _RED,
    ),
    Published(
        "Snowflake/Arctic-LSTM-Speculator-Llama-3.1-8B-Instruct", LSTM, (_LLAMA_8B,), 2.37,
        "", _ARCTIC, "2.26 times the speed on a 70B model; chain of 3",
    ),
    Published(
        "yuhuili/EAGLE-LLaMA3.1-Instruct-8B", EAGLE_1, (_LLAMA_8B,), 0, "", _EAGLE,
        "MT-bench 2.43; chain of 5", pickled=True,
    ),
    Published(
        "philschmid/llama-3-1-8b-instruct-medusa", MEDUSA, (_LLAMA_8B,), 0.1, "", "model card",
    ),
    Published(
        "lmsys/SGLang-EAGLE3-Llama-3.3-70B-Instruct-SpecForge", EAGLE_3, (_LLAMA_70B,), 0,
        "", _FORGE, "MT-bench 3.62, HumanEval 3.44, GSM8K 2.49; chain of 5",
    ),
    Published(
        "yuhuili/EAGLE3-LLaMA3.3-Instruct-70B", EAGLE_3, (_LLAMA_70B,), 0, "", _EAGLE, pickled=True,
    ),
    Published(
        "RedHatAI/Llama-3.3-70B-Instruct-speculator.eagle3", EAGLE_3, (_LLAMA_70B,), 0, "", _RED,
    ),
    Published(
        "Snowflake/Arctic-LSTM-Speculator-Llama-3.3-70B-Instruct", LSTM, (_LLAMA_70B,), 0,
        "", _ARCTIC,
    ),
    Published(
        "Snowflake/Arctic-LSTM-Speculator-Llama-3.1-70B-Instruct", LSTM,
        ("meta-llama/Llama-3.1-70B-Instruct",), 0, "", _ARCTIC,
        "2.26 times the speed; chain of 3",
    ),
    Published(
        "yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B", EAGLE_3, (_R1,), 0.85, "", _EAGLE,
        pickled=True,
    ),
    Published(
        "deepseek-ai/dspark_qwen3_4b_block7", DSPARK, ("Qwen/Qwen3-4B",), 2.8, _MIT, _DEEPSPEC,
    ),
    Published(
        "deepseek-ai/dflash_qwen3_4b_block7", DFLASH, ("Qwen/Qwen3-4B",), 2.6, _MIT, _DEEPSPEC,
    ),
    Published(
        "deepseek-ai/eagle3_qwen3_4b_ttt7", EAGLE_3, ("Qwen/Qwen3-4B",), 1.9, _MIT, _DEEPSPEC,
    ),
    Published(
        "z-lab/Qwen3-4B-DFlash-b16", DFLASH, ("Qwen/Qwen3-4B",), 0, "", "z-lab",
    ),
    Published(
        "AngelSlim/Qwen3-4B_eagle3", EAGLE_3, ("Qwen/Qwen3-4B",), 0.44, "", _ANGEL,
        f"2.08 {_MEAN}",
    ),
    Published(
        "deepseek-ai/dspark_qwen3_8b_block7", DSPARK, ("Qwen/Qwen3-8B",), 4.7, _MIT, _DEEPSPEC,
        "MT-bench 3.72, HumanEval 5.52, GSM8K 6.17; block of 7, T=1",
    ),
    Published(
        "deepseek-ai/dflash_qwen3_8b_block7", DFLASH, ("Qwen/Qwen3-8B",), 4.5, _MIT, _DEEPSPEC,
        "MT-bench 3.16, HumanEval 4.77, GSM8K 5.54; T=1",
    ),
    Published(
        "deepseek-ai/eagle3_qwen3_8b_ttt7", EAGLE_3, ("Qwen/Qwen3-8B",), 3.1, _MIT, _DEEPSPEC,
        "MT-bench 2.66, HumanEval 4.33, GSM8K 5.30; chain of 7, T=1",
    ),
    Published(
        "z-lab/Qwen3-8B-DFlash-b16", DFLASH, ("Qwen/Qwen3-8B",), 0, "", "z-lab",
    ),
    Published(
        "RedHatAI/Qwen3-8B-speculator.dflash", DFLASH, ("Qwen/Qwen3-8B",), 0, "", _RED,
    ),
    Published(
        "mgoin/Qwen3-8B-speculator.dspark", DSPARK, ("Qwen/Qwen3-8B",), 0, "", _RED,
    ),
    Published(
        "RedHatAI/Qwen3-8B-speculator.eagle3", EAGLE_3, ("Qwen/Qwen3-8B",), 0.8, "", _RED,
        "code 3.0, mathematics 3.3; chain of 5, T=0.6",
    ),
    Published(
        "Tengyunw/qwen3_8b_eagle3", EAGLE_3, ("Qwen/Qwen3-8B",), 0.8, "", "model card",
    ),
    Published(
        "thoughtworks/Qwen3-8B-Eagle3", EAGLE_3, ("Qwen/Qwen3-8B",), 0.8,
        "apache-2.0", "model card",
    ),
    Published(
        "AngelSlim/Qwen3-8B_eagle3", EAGLE_3, ("Qwen/Qwen3-8B",), 0.8, "", _ANGEL,
        f"1.99 {_MEAN}",
    ),
    Published(
        "deepseek-ai/dspark_qwen3_14b_block7", DSPARK, ("Qwen/Qwen3-14B",), 6.8, _MIT, _DEEPSPEC,
    ),
    Published(
        "deepseek-ai/dflash_qwen3_14b_block7", DFLASH, ("Qwen/Qwen3-14B",), 6.6, _MIT, _DEEPSPEC,
    ),
    Published(
        "deepseek-ai/eagle3_qwen3_14b_ttt7", EAGLE_3, ("Qwen/Qwen3-14B",), 4.1, _MIT, _DEEPSPEC,
    ),
    Published(
        "RedHatAI/Qwen3-14B-speculator.eagle3", EAGLE_3, ("Qwen/Qwen3-14B",), 1.2, "", _RED,
    ),
    Published(
        "AngelSlim/Qwen3-14B_eagle3", EAGLE_3, ("Qwen/Qwen3-14B",), 1.22, "", _ANGEL,
        f"1.79 {_MEAN}",
    ),
    Published(
        "AngelSlim/Qwen3-1.7B_eagle3", EAGLE_3, ("Qwen/Qwen3-1.7B",), 0.27, "", _ANGEL,
        f"2.17 {_MEAN}",
    ),
    Published(
        "RedHatAI/Qwen3-32B-speculator.eagle3", EAGLE_3, ("Qwen/Qwen3-32B",), 0, "", _RED,
    ),
    Published(
        "AngelSlim/Qwen3-32B_eagle3", EAGLE_3, ("Qwen/Qwen3-32B",), 0, "", _ANGEL,
        f"1.91 {_MEAN}",
    ),
    Published(
        "Zjcxy-SmartAI/Eagle3-Qwen3-4B-Instruct-2507-zh", EAGLE_3,
        ("Qwen/Qwen3-4B-Instruct-2507",), 0.44, "", "model card", "trained on Chinese",
    ),
    Published(
        "yuhuili/EAGLE-Qwen2-7B-Instruct", EAGLE_1, ("Qwen/Qwen2-7B-Instruct",), 0, "", _EAGLE,
        pickled=True,
    ),
    Published(
        "yuhuili/EAGLE-Qwen2-72B-Instruct", EAGLE_1, ("Qwen/Qwen2-72B-Instruct",), 0, "", _EAGLE,
        pickled=True,
    ),
    Published(
        "Zjcxy-SmartAI/Eagle-Qwen2.5-14B-Instruct", EAGLE_1, ("Qwen/Qwen2.5-14B-Instruct",), 0,
        "", "model card",
    ),
    Published(
        "Snowflake/Arctic-LSTM-Speculator-Qwen2.5-32B-Instruct", LSTM,
        ("Qwen/Qwen2.5-32B-Instruct",), 0, "", _ARCTIC,
    ),
    Published(
        "Mayank6255/LLAMA-3.2-3B-EAGLE2-en", EAGLE_1, ("meta-llama/Llama-3.2-3B-Instruct",), 0,
        _MIT, "model card",
    ),
    Published(
        "yuhuili/EAGLE-LLaMA3-Instruct-8B", EAGLE_1, ("meta-llama/Meta-Llama-3-8B-Instruct",), 0,
        "", _EAGLE, pickled=True,
    ),
    Published(
        "ibm-ai-platform/llama3-8b-accelerator", MLP, ("meta-llama/Meta-Llama-3-8B-Instruct",), 6.4,
        "llama3", _IBM,
    ),
    Published(
        "yuhuili/EAGLE-LLaMA3-Instruct-70B", EAGLE_1, ("meta-llama/Meta-Llama-3-70B-Instruct",), 0,
        "", _EAGLE, pickled=True,
    ),
    Published(
        "ibm-ai-platform/llama3-70b-accelerator", MLP, ("meta-llama/Meta-Llama-3-70B-Instruct",), 0,
        "", _VLLM,
    ),
    Published(
        "yuhuili/EAGLE-llama2-chat-7B", EAGLE_1, ("meta-llama/Llama-2-7b-chat-hf",), 0, "", _EAGLE,
        pickled=True,
    ),
    Published(
        "yuhuili/EAGLE-llama2-chat-13B", EAGLE_1, ("meta-llama/Llama-2-13b-chat-hf",), 0,
        "", _EAGLE, pickled=True,
    ),
    Published(
        "yuhuili/EAGLE-llama2-chat-70B", EAGLE_1, ("meta-llama/Llama-2-70b-chat-hf",), 0,
        "", _EAGLE, pickled=True,
    ),
    Published(
        "text-generation-inference/Mistral-7B-Instruct-v0.2-medusa", MEDUSA,
        ("mistralai/Mistral-7B-Instruct-v0.2",), 0, "", _TGI,
    ),
    Published(
        "yuhuili/EAGLE-Vicuna-7B-v1.3", EAGLE_1, ("lmsys/vicuna-7b-v1.3",), 0, "", _EAGLE,
        "Spec-Bench 3.58; 64 nodes", pickled=True,
    ),
    Published(
        "FasterDecoding/medusa-vicuna-7b-v1.3", MEDUSA, ("lmsys/vicuna-7b-v1.3",), 1.48,
        _BASES, _MEDUSA_README, "Spec-Bench 2.31; 64 nodes", pickled=True,
    ),
    Published(
        "yuhuili/EAGLE3-Vicuna1.3-13B", EAGLE_3, ("lmsys/vicuna-13b-v1.3",), 0, "", _EAGLE,
        pickled=True,
    ),
    Published(
        "yuhuili/EAGLE-Vicuna-13B-v1.3", EAGLE_1, ("lmsys/vicuna-13b-v1.3",), 0, "", _EAGLE,
        pickled=True,
    ),
    Published(
        "FasterDecoding/medusa-vicuna-13b-v1.3", MEDUSA, ("lmsys/vicuna-13b-v1.3",), 1.9,
        _BASES, _MEDUSA_README, "Spec-Bench 2.39; 64 nodes", pickled=True,
    ),
    Published(
        "yuhuili/EAGLE-Vicuna-33B-v1.3", EAGLE_1, ("lmsys/vicuna-33b-v1.3",), 0, "", _EAGLE,
        pickled=True,
    ),
    Published(
        "FasterDecoding/medusa-vicuna-33b-v1.3", MEDUSA, ("lmsys/vicuna-33b-v1.3",), 2.57,
        _BASES, _MEDUSA_README, pickled=True,
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
        "ibm-granite/granite-7b-instruct-accelerator", MLP, ("ibm-granite/granite-7b-instruct",), 0,
        "", _VLLM,
    ),
)  # fmt: skip

# The smallest member of a family, whose tokenizer all share: (how their names begin, its id).
_FAMILIES = (
    ("qwen3-", "Qwen/Qwen3-0.6B"),
    ("llama-3", "meta-llama/Llama-3.2-1B-Instruct"),
    ("gemma-3-", "google/gemma-3-270m-it"),
    ("smollm2-", "HuggingFaceTB/SmolLM2-135M-Instruct"),
)

# What a copy of a model in other numbers has behind its name.
_COPY = re.compile(r"[-_.](?:mlx|hf|dwq|awq|gptq|mxfp\d+|bf16|fp16|fp32|q\d|int\d|\d-?bits?)$")


def of_model(model: str) -> list[Published]:
    """The published drafters of a model, the best one first.

    A copy in other numbers counts as the model: mlx-community/Qwen3-8B-4bit is Qwen/Qwen3-8B.
    """
    name = _bare(model)
    return [row for row in PUBLISHED if name in map(_bare, row.bases)]


def recommended(model: str) -> Published | None:
    """The best published drafter of a model among those that can be used here."""
    return next((row for row in of_model(model) if row.usable), None)


def small_member(model: str) -> str | None:
    """A small model of a model's family that can draft for it."""
    name = _bare(model)
    member = next((small for start, small in _FAMILIES if name.startswith(start)), None)
    if SMALL not in LOADED_KINDS or member is None or _bare(member).startswith(name):
        return None
    return member


def _bare(model: str) -> str:
    """A hub id or a folder without its owner, and without how its weights are stored."""
    name = model.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    while (shorter := _COPY.sub("", name)) != name:
        name = shorter
    return name.removeprefix("meta-")
