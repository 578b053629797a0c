"""A tiny random model whose tokens are pieces of JSON, and schemas drawn at random."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from conftest import write_target

SPECIAL = ["<|end|>", "<|stop|>", "<|start|>", "[CALL]"]
SIZE = 340  # tokens of the tokenizer; the model has a few more
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }} {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)
WRITTEN = [
    '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}',
    '{"a": [1, 2, 3], "b": {"c": true, "d": false, "e": null}}, {"title": "A long walk"}',
    "<tool_call>\n</tool_call> <think> hm </think> the red green blue ones are 12.5 or -7e10",
]
Schema = dict[str, Any]


def write_json_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """The model and its tokenizer, of bytes and some pairs of them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(WRITTEN * 5, trainer)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    size = tokenizer.get_vocab_size()
    write_target(folder, vocab_size=size + 5, eos_token_id=tokenizer.token_to_id("<|end|>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    if template is not None:
        content["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def schema(seed: int) -> Schema:
    """An object of some properties, some of which are required."""
    random = Random(seed)
    made = _object(random, 3)
    if "$ref" in json.dumps(made):
        tree = {"type": "object", "properties": {"v": {"type": "integer"}, "next": None}}
        tree["properties"]["next"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
        tree |= {"required": ["v", "next"], "additionalProperties": False}
        made["$defs"] = {"node": tree, "colour": {"enum": ["red", "green", "blue"]}}
    return made


def _object(random: Random, depth: int) -> Schema:
    names = random.sample(["a", "b", "name", "city", 'é"x', "n-1", "list", "of two"], 3)
    found = {name: _any(random, depth - 1) for name in names[: random.randint(1, 3)]}
    required = [name for name in found if random.random() < 0.7]
    return {
        "type": "object", "properties": found, "required": required, "additionalProperties": False
    }  # fmt: skip


def _any(random: Random, depth: int) -> Schema:
    kinds = [_text, _number, _fixed, _number, _text, _reference]
    if depth > 0:
        kinds += [_list, _object, _either]
    return random.choice(kinds)(random, depth)


def _text(random: Random, depth: int) -> Schema:
    choice: list[Schema] = [
        {}, {"maxLength": 5}, {"minLength": 2, "maxLength": 9}, {"pattern": "^[a-c]{2,4}-[0-9]+$"},
        {"pattern": "(yes|no)"}, {"format": "date"}, {"format": "uuid"},
    ]  # fmt: skip
    return {"type": "string", **random.choice(choice)}


def _number(random: Random, depth: int) -> Schema:
    choice: list[Schema] = [
        {"type": "integer"}, {"type": "number"}, {"type": "integer", "minimum": 3, "maximum": 250},
        {"type": "number", "exclusiveMinimum": -1.5, "maximum": 10}, {"type": ["integer", "null"]},
    ]  # fmt: skip
    return random.choice(choice)


def _fixed(random: Random, depth: int) -> Schema:
    choice: list[Schema] = [
        {"enum": ["red", "green", 3, None]}, {"const": "always"}, {"type": "boolean"},
        {"type": "null"}, {"const": {"x": [1, 2]}},
    ]  # fmt: skip
    return random.choice(choice)


def _reference(random: Random, depth: int) -> Schema:
    return {"$ref": random.choice(["#/$defs/node", "#/$defs/colour"])}


def _list(random: Random, depth: int) -> Schema:
    sizes: Schema = random.choice([{}, {"minItems": 1}, {"minItems": 2, "maxItems": 3}])
    return {"type": "array", "items": _any(random, depth - 1), **sizes}


def _either(random: Random, depth: int) -> Schema:
    return {"anyOf": [_any(random, depth - 1), _any(random, depth - 1)]}
