"""The metadata of a GGUF file that is used here, and of what type each value must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mlx_redrafter.errors import ConvertError

Test = Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any) -> bool:
    return _whole(value) and value > 0


def _counts(value: Any) -> bool:
    return _count(value) or (isinstance(value, list) and bool(value) and all(map(_count, value)))


def _power(value: Any) -> bool:
    return _count(value) and value & (value - 1) == 0


def _ids(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


def _number(value: Any) -> bool:
    return (_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _text(value: Any) -> bool:
    # Bytes that are not UTF-8 were read as halves of characters.
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _wholes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _windows(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_truth, value)))


def _truth(value: Any) -> bool:
    return isinstance(value, bool) or (_whole(value) and value in (0, 1))


# What is needed, how it is told, and the keys; * stands for the architecture.
_KINDS: tuple[tuple[str, Test, tuple[str, ...]], ...] = (
    ("text in UTF-8", _text, (
        "general.architecture", "general.type", "*.rope.scaling.type", "tokenizer.chat_template",
        "tokenizer.ggml.model", "tokenizer.ggml.pre",
    )),
    ("a whole number of at least 1", _count, (
        "*.attention.head_count", "*.attention.key_length_swa", "*.attention.value_length_swa",
        "*.attention.key_length", "*.attention.value_length", "*.block_count", "*.context_length",
        "*.embedding_length", "*.rope.dimension_count", "*.rope.dimension_count_swa",
        "*.rope.scaling.original_context_length", "*.attention.key_length_mla",
        "*.attention.value_length_mla", "*.attention.kv_lora_rank",
        "*.full_attention_interval", "*.ssm.conv_kernel",
        "*.ssm.group_count", "*.ssm.inner_size", "*.ssm.state_size", "*.ssm.time_step_rank",
    )),
    ("a whole number of at least 1, or a list of them", _counts, (
        "*.attention.head_count_kv", "*.feed_forward_length",
    )),
    ("a power of two", _power, ("general.alignment",)),
    ("a whole number", _whole, (
        "split.count", "*.expert_count", "*.attention.sliding_window", "*.expert_gating_func",
        "*.expert_group_count", "*.expert_group_used_count", "*.expert_shared_count",
        "*.leading_dense_block_count", "*.nextn_predict_layers", "*.attention.q_lora_rank",
        "*.expert_feed_forward_length", "*.expert_shared_feed_forward_length",
        "*.expert_used_count", "*.attention.shared_kv_layers",
        "*.embedding_length_per_layer_input",
    )),
    ("a number above 0", _positive, (
        "*.attention.layer_norm_epsilon", "*.attention.layer_norm_rms_epsilon",
        "*.rope.freq_base", "*.rope.freq_base_swa", "*.rope.scaling.yarn_beta_fast",
        "*.rope.scaling.yarn_beta_slow",
    )),
    ("a finite number", _number, (
        "*.rope.scale_linear", "*.rope.scaling.factor", "*.rope.scaling.attn_factor",
        "*.rope.scaling.yarn_log_multiplier", "*.attention.scale", "*.attention.temperature_scale",
        "*.attn_logit_softcapping", "*.embedding_scale", "*.expert_weights_scale",
        "*.final_logit_softcapping", "*.logit_scale", "*.residual_scale",
    )),
    ("true or false", _truth, (
        "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_space_prefix", "*.expert_weights_norm", "*.use_parallel_residual",
    )),
    ("a whole number or a list of true and false", _windows, (
        "*.attention.sliding_window_pattern",
    )),
    ("a whole number", _whole, (
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.padding_token_id",
        "tokenizer.ggml.unknown_token_id",
    )),
    ("a whole number or a list of them", _ids, tuple(
        f"tokenizer.ggml.{role}_token_id{s}" for role in ("eos", "eot", "eom") for s in ("", "s")
    )),
    ("a list of texts", _texts, ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")),
    ("a list of whole numbers", _wholes, ("tokenizer.ggml.token_type",)),
    ("a list of finite numbers", _numbers, ("tokenizer.ggml.scores",)),
)  # fmt: skip


def check(metadata: Mapping[str, Any]) -> None:
    """ConvertError for a value of another type than its key must have; other keys may hold any."""
    architecture = metadata.get("general.architecture")
    for needed, test, keys in _KINDS:
        for key in (key.replace("*", str(architecture), 1) for key in keys):
            if key in metadata and not test(metadata[key]):
                raise ConvertError(f"{key} is {_shown(metadata[key])}; needed: {needed}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)} values"
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
