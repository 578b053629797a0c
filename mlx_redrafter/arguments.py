"""What callers hand to the Python API, brought into the form that the engine takes.

Callers come from mlx_lm: what works there works here, or the error names the call that does it.
Every function raises OptionError.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.cache.packed import BITS, GROUP, Packing
from mlx_redrafter.decoding.grammar import Grammar
from mlx_redrafter.decoding.sampling import SamplingParams
from mlx_redrafter.errors import OptionError
from mlx_redrafter.runtime import checks
from mlx_redrafter.text import grammar as grammars

# Options of mlx_lm and its relatives, and what does the same here.
_HERE = {
    "sampler": "give temp=, top_p=, min_p= and top_k= themselves",
    "logits_processors": "give logit_bias=, repetition_penalty=, presence_penalty= and "
    "frequency_penalty= themselves",
    "prompt_cache": "give session=Session(), and the same one with the next prompt",
    "draft_model": "give the drafter when loading: load(model, drafter=...)",
    "num_draft_tokens": "give tree=TreeShape.chain({value})",
    "max_kv_size": "leave it out, the cache keeps the model's whole context",
    "kv_bits": "give it to load()",
    "kv_group_size": "give it to load()",
    "quantized_kv_start": "leave it out, load(kv_bits=...) quantises from the first token on",
    "input_embeddings": "give the prompt as text or token ids",
    "stream": "leave it out, every thread has its own stream",
    "messages": "give tokenizer.apply_chat_template(messages, add_generation_prompt=True) as the "
    "prompt",
    "params": "give its fields themselves: temp=, top_p=, seed=, ...",
    "sampling_params": "give its fields themselves: temp=, top_p=, seed=, ...",
    "response_format": "give json_schema=, regex= or grammar=",
    "guided_json": "give json_schema=",
    "schema": "give json_schema=",
    "temperature": "give temp=",
    "max_new_tokens": "give max_tokens=",
    "max_length": "give max_tokens=",
    "stop_strings": "give stop=",
    "stop_sequences": "give stop=",
    "eos_token_id": "give stop_tokens=",
    "stop_token_ids": "give stop_tokens=",
    "do_sample": "give temp=, 0 for greedy",
    "verbose": "give it to generate(), which prints; stream_generate() yields the text",
    "tokenizer_config": "give it to load()",
    "adapter_path": "fuse the adapter first: mlx_lm.fuse",
    "model_config": "change config.json in the model's folder",
    "return_config": "leave it out, the configuration is model.target.config",
    "lazy": "leave it out, the weights are read at once",
    "trust_remote_code": "leave it out, code that comes with a model is never run",
    "temp": "give it to generate() or stream_generate()",
    "max_tokens": "give it to generate() or stream_generate()",
}
_SAMPLING = {option.name for option in dataclasses.fields(SamplingParams)}


def refuse(given: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuse options that a function does not have; one of mlx_lm's that says nothing is let
    through."""
    for name, value in given.items():
        here = _HERE.get(name)
        if here is not None and (
            value is None or value is False or (isinstance(value, dict) and not value)
        ):
            continue
        if here is None:
            near = difflib.get_close_matches(name, _options(function), 1)
            here = f"did you mean {near[0]}=?" if near else "the docstring lists the options"
        raise OptionError(f"there is no option {name}: {here.format(value=value)}")


def sampling(given: Mapping[str, Any], function: Callable[..., Any]) -> SamplingParams:
    """The options of a draw among those that a function was given besides its own."""
    own = {name: value for name, value in given.items() if name in _SAMPLING}
    refuse({name: value for name, value in given.items() if name not in own}, function)
    return SamplingParams(**own)


def _options(function: Callable[..., Any]) -> list[str]:
    named = inspect.signature(function).parameters.values()
    own = [option.name for option in named if option.kind is not option.VAR_KEYWORD]
    return [*own, *_SAMPLING] if "prompt" in own else own


def name_or_folder(option: str, value: Any) -> str:
    """A model or drafter: text, or a path."""
    if isinstance(value, str | os.PathLike) and isinstance(name := os.fspath(value), str):
        return name
    use = "give a folder or a hub id"
    if option == "drafter":
        named = isinstance(value, Mapping)  # mlx_lm's second argument
        use = "name it, tokenizer_config=..." if named else f"{use}; None decodes plainly"
    raise OptionError(f"{option} {checks.shown(value)} is not possible: {use}")


def dtype(value: Any) -> mx.Dtype | None:
    """The type of weights."""
    if value is None or (isinstance(value, mx.Dtype) and mx.issubdtype(value, mx.floating)):
        return value
    raise OptionError(
        f"dtype {checks.shown(value)} is not possible: give mx.float16, mx.bfloat16 or mx.float32"
    )


def packing(bits: Any, group_size: Any) -> Packing | None:
    """How keys and values are quantised, if they are."""
    asked = Packing(BITS[0] if bits is None else bits, GROUP if group_size is None else group_size)
    return None if bits is None else asked


def pair(model: Any, tokenizer: Any, kind: type) -> TokenizerWrapper:
    """The tokenizer of a loaded model, a bare one of transformers too."""
    if isinstance(tokenizer, kind) and not isinstance(model, kind):
        raise OptionError("model and tokenizer are swapped: give model, tokenizer, prompt")
    if not isinstance(model, kind):
        load = "model, tokenizer = mlx_redrafter.load(...)"
        if isinstance(model, nn.Module):
            raise OptionError(f"this model was not loaded by mlx_redrafter: use {load}")
        raise OptionError(f"{checks.shown(model)} is not a loaded model: use {load}")
    if not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "decode")):
        raise OptionError(
            f"{checks.shown(tokenizer)} is not a tokenizer: give the one that load() returned"
        )
    return tokenizer if hasattr(tokenizer, "detokenizer") else TokenizerWrapper(tokenizer)


def instance(option: str, value: Any, kind: type, use: str) -> Any:
    """None, or a value of that type."""
    if value is None or isinstance(value, kind):
        return value
    raise OptionError(f"{option} {checks.shown(value)} is not possible: give {use}")


def options(option: str, value: Any) -> None:
    """None, or a dictionary by names."""
    if instance(option, value, dict, "a dictionary") and not all(isinstance(k, str) for k in value):
        raise OptionError(f"{option} {checks.shown(value)} is not possible: its keys are names")


def function(option: str, value: Any) -> Any:
    """None, or something to be called."""
    if value is None or callable(value):
        return value
    raise OptionError(f"{option} {checks.shown(value)} is not possible: give a function")


def stops(value: Any) -> tuple[str, ...]:
    """Strings that end an answer, from one, several or None."""
    if value is None:
        return ()
    given = value.tolist() if hasattr(value, "tolist") else value
    texts = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    if isinstance(given, bytes) or not all(isinstance(text, str) for text in texts):
        raise OptionError(
            f"stop {checks.shown(value)} is not possible: give text, or a list of texts; "
            "token ids go into stop_tokens="
        )
    if "" in texts:
        raise OptionError("a stop string is empty: give at least one character")
    return texts


def stop_tokens(value: Any, vocab_size: int) -> set[int]:
    """Token ids that end an answer, from one, several or None."""
    if value is None:
        return set()
    if isinstance(value, str | bytes):
        raise OptionError(
            f"stop_tokens {checks.shown(value)} is not possible: give token ids; "
            "text goes into stop="
        )
    given = value.tolist() if hasattr(value, "tolist") else value
    tokens = given if isinstance(given, Iterable) else [given]
    return {checks.whole("stop token", token, 0, vocab_size - 1) for token in tokens}


def prediction(tokenizer: TokenizerWrapper, value: Any, vocab_size: int) -> list[int]:
    """The token ids of what an answer may be: of text, of ids, or none."""
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, str):
        return [int(token) for token in tokenizer.encode(value, add_special_tokens=False)]
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise OptionError(
            f"prediction {checks.shown(value)} is not possible: give text, or token ids in a list"
        )
    ids = value.tolist() if hasattr(value, "tolist") else value
    return [checks.whole("prediction token", token, 0, vocab_size - 1) for token in ids]


def grammar(
    model: Any, tokenizer: TokenizerWrapper, schema: Any, pattern: Any, given: Any
) -> Grammar | None:
    """The grammar of an answer, made by a loaded model unless it is one already."""
    grammars.one_at_most(schema, pattern, given)
    if hasattr(given, "begin"):
        made: Grammar = given
        return made
    source = grammars.asked(schema, pattern, given)
    if source is None:
        return None
    found: Grammar = model.grammars(tokenizer).compiled(source)
    return found


def prompt_ids(tokenizer: TokenizerWrapper, prompt: Any) -> list[int]:
    """The token ids of a prompt: text, or ids in a list or a 1-D array."""
    if isinstance(prompt, str):
        return _encoded(tokenizer, prompt)
    if isinstance(prompt, Mapping) and "input_ids" in prompt:  # what transformers' templates return
        prompt = prompt["input_ids"]
    if isinstance(prompt, Mapping) or _holds_messages(prompt):
        raise OptionError(
            "the prompt is a list of messages: give "
            "tokenizer.apply_chat_template(messages, add_generation_prompt=True)"
        )
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Iterable):
        raise OptionError(
            f"the prompt is of type {type(prompt).__name__}: give text, or token ids in a list"
        )
    ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not isinstance(ids, list):
        ids = [ids]
    for i, token in enumerate(ids):
        if type(token) is not int:
            ids[i] = _token(token)
    return ids


def _encoded(tokenizer: TokenizerWrapper, prompt: str) -> list[int]:
    if not prompt:
        raise OptionError("the prompt is empty: give at least one token of text")
    try:
        prompt.encode()
    except UnicodeError:
        raise OptionError("the prompt is not valid text: give it in UTF-8") from None
    # A chat template has already put the first special token there.
    bos = tokenizer.bos_token
    return list(tokenizer.encode(prompt, add_special_tokens=not (bos and prompt.startswith(bos))))


def _holds_messages(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and isinstance(next(iter(prompt), None), Mapping)


def _token(value: Any) -> int:
    if isinstance(value, str | bytes):
        raise OptionError("the prompt is a list of texts: give one text, or token ids")
    if isinstance(value, Iterable) and getattr(value, "ndim", None) != 0:
        raise OptionError(
            "the prompt has more than one dimension: give the ids of one sequence, prompt[0]"
        )
    return checks.whole("prompt token", value, 0)
