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
from mlx_redrafter.text.template import prompt_ids
from mlx_redrafter.text.tokenizer import load_tokenizer
from mlx_redrafter.training import openings, prompts
from mlx_redrafter.training.openings import opening
from mlx_redrafter.training.turns import usable

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


BARE = next(seed for seed in range(99) if not opening(seed))  # a turn without given first words


def written(tokenizer: Any, tokens: list[int], seed: int = BARE) -> list[str]:
    """What is made of these tokens, up to the first that ends an answer, and 40 at most."""
    own = prompts.OwnTurns(tokenizer)
    stop = next((i + 1 for i, t in enumerate(tokens) if t in own.ends), 40)
    text = own.text(seed, Answer(tokens[: min(stop, 40)], np.zeros((1, 0, 0))))
    return [] if text is None else [text]


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
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}])
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


# Openings


def test_openings_are_of_every_kind_in_their_shares_and_the_seeds() -> None:
    found = [opening(seed) for seed in range(5_000_000, 5_004_000)]
    assert found == [opening(seed) for seed in range(5_000_000, 5_004_000)]
    assert abs(found.count("") / 4000 - (1 - openings.SHARE)) < 0.03
    assert sum(share for share, _ in openings.KINDS.values()) == pytest.approx(1)
    for share, texts in openings.KINDS.values():
        assert set(texts) <= set(found)
        some = sum(text in texts for text in found) / 4000
        assert abs(some - openings.SHARE * share) < 0.03


def test_a_prompt_begins_with_the_words_that_were_given(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, TEMPLATE)
    own = prompts.OwnTurns(tokenizer)
    seed = next(seed for seed in range(99) if opening(seed) == "Explain")
    assert tokenizer.decode(own.request(seed).prompt) == "<User>Explain"
    assert tokenizer.decode(own.request(BARE).prompt) == "<User>"
    tokens = tokenizer.encode(" why it rains.<|end|>", add_special_tokens=False)
    assert written(tokenizer, tokens, seed) == ["Explain why it rains."]
    assert written(tokenizer, tokens[-3:], seed) == []  # nothing of its own
    assert own.request(seed).top_p < 1


def test_words_that_the_tokenizer_lacks_and_base_models_begin_with_nothing(tmp_path: Path) -> None:
    own = prompts.OwnTurns(load_tokenizer(write_chat_model(tmp_path / "few")))
    assert {tuple(own.request(seed).prompt) for seed in range(20)} == {(0, 3)}
    own = prompts.OwnTurns(tokenizer_in(tmp_path, None))
    assert {len(own.request(seed).prompt) for seed in range(20)} == {1}


# What is of use

SAID = "How do I bake bread at home?"
CODE = f"import numpy\n\n# {SAID}\nx = numpy.ones(3)\nprint(x)"


@pytest.mark.parametrize(
    ("text", "whole", "found"),
    [
        (SAID, True, SAID),
        ("what is it, and why", True, "what is it, and why"),
        ("什么是人工智能技术？", True, "什么是人工智能技术？"),
        (f"```\nx = 1\n```\n{SAID}", True, f"```\nx = 1\n```\n{SAID}"),
        (f"{SAID} I have tried it with", False, SAID),
        (f"{SAID} I mean e.g. that", False, SAID),
        (f"{SAID}\n1. Take 2.5", False, SAID),
        (f"{SAID} I am new to it.\n\nYou can. First", False, f"{SAID} I am new to it."),
        (f"Mend this:\n\nShe go. {SAID} And", False, f"Mend this:\n\nShe go. {SAID}"),
        (CODE, False, None),
        (CODE, True, CODE),
        (f'"{SAID}" It', False, f'"{SAID}"'),
        ("怎么做面包？我想在家里", False, "怎么做面包？"),
        ("How do I bake bread at home", False, None),
        (f"{SAID} ```\nx = 1. Then", False, SAID),
        (f"```\nx = 1. {SAID} And", False, None),
        ("bread", True, None),
        ("12 + 34 = 46, 46 + 1 = 47 x y", True, None),
        ("the same again " * 6, True, None),
        (", and so it was done by them.", True, None),
        ("Sure, here is a recipe for bread.", True, None),
        ("Here's how to bake bread at home.", True, None),
        (f"{SAID}\n\nAssistant: Take some flour.", True, None),
        ("Surely there is a way to bake it?", True, "Surely there is a way to bake it?"),
        ("", True, None),
    ],
)
def test_only_what_a_user_might_ask_is_of_use(text: str, whole: bool, found: str | None) -> None:
    assert usable(text, whole) == found
