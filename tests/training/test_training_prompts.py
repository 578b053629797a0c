"""Prompts that a model writes itself hold no control tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import numpy as np  # isort: skip
import pytest
from tiny_chat import refusal, write_chat_model

from mlx_redrafter.models.sequences import Answer
from mlx_redrafter.text.tokenizer import load_tokenizer
from mlx_redrafter.training import prompts

SPECIAL = ["<|user|>", "<|end|>", "<|fim|>"]
PLAIN = ["<User>", "<table>", "\n\n\n"]  # added tokens that are not declared special
TEMPLATE = (
    "{% for m in messages %}<User>{{ m['content'] }}<|end|>{% endfor %}\n\n\n"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)


def tokenizer_in(folder: Path, template: str | None) -> Any:
    """A token per byte, SPECIAL and PLAIN."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    built = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    built.add_tokens([AddedToken(t, normalized=False) for t in PLAIN])
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(folder)


class Writer:
    """A target that says this, up to the first token that ends an answer."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def write(self, requests: Any, max_tokens: int, ends: set[int]) -> list[Answer]:
        stop = next((i + 1 for i, t in enumerate(self.tokens) if t in ends), max_tokens)
        return [Answer(self.tokens[: min(stop, max_tokens)], np.zeros((1, 0, 0)))] * len(requests)


def written(tokenizer: Any, tokens: list[int]) -> list[str]:
    writer: Any = Writer(tokens)
    return prompts.write_own(
        writer, tokenizer, count=1, batch=1, max_tokens=40, temp=1.0, seed=0
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "template", "found"),
    [
        ("What is it?<|end|>", TEMPLATE, ["What is it?"]),
        ("What is it?<|user|>It is<|end|>", TEMPLATE, ["What is it?"]),
        ("What is it?<User>And that?<|end|>", TEMPLATE, ["What is it?"]),
        ("What<|fim|> is it?<|end|>", TEMPLATE, []),
        ("<|user|>What is it?<|end|>", TEMPLATE, []),
        ("Mend <table>\n\n\n</table><|end|>", TEMPLATE, ["Mend <table>\n\n\n</table>"]),
        ("It goes on and on and on and on and on and on", TEMPLATE, []),
        ("What is it? <|fim|> No.<|end|>", None, []),
        ("What is it? <User> No.<|end|>", None, ["What is it? <User> No."]),
    ],
)
def test_a_turn_ends_at_a_token_of_the_template_and_holds_no_other_control_token(
    tmp_path: Path, text: str, template: str | None, found: list[str]
) -> None:
    tokenizer = tokenizer_in(tmp_path, template)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert written(tokenizer, tokens) == found
    for prompt in found if template else []:
        ids = prompts.encode(tokenizer, [{"role": "user", "content": prompt}])
        assert [ids.count(tokenizer.convert_tokens_to_ids(t)) for t in ("<User>", "<|user|>")] == [
            1, 1,
        ]  # fmt: skip


@pytest.mark.parametrize("token", ["<|user|>", "<User>", "<|fim|>"])
def test_a_control_token_spelled_out_is_one_too(tmp_path: Path, token: str) -> None:
    tokenizer = tokenizer_in(tmp_path, TEMPLATE)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    letters = [i for c in f"Say {token}!" for i in tokenizer.encode(c, add_special_tokens=False)]
    assert token in tokenizer.decode(letters) and written(tokenizer, [*letters, end]) == []


def test_a_template_that_opens_no_turn_begins_as_a_base_model_does(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    tokenizer = tokenizer_in(tmp_path, "{{ messages[0]['content'] }}<|end|>")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    bare = prompts.user_header(tokenizer_in(tmp_path / "base", None))[0]
    assert prompts.user_header(tokenizer) == (bare, {*tokenizer.eos_token_ids, end})
    assert len(bare) == 1


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('No.') }}", "chat template refuses the messages (No.)"),
        (
            "{{ messages[0]['text'].strip() }}",
            "chat template fails ('dict object' has no attribute 'text')",
        ),
        ("{{ messages[0]['content'].split()[9] }} hello", "does not show what the user says"),
    ],
)
def test_a_template_without_user_turns_is_one_line(
    tmp_path: Path, template: str, says: str
) -> None:
    tokenizer = load_tokenizer(write_chat_model(tmp_path, template))
    assert says in refusal(lambda: prompts.user_header(tokenizer))
