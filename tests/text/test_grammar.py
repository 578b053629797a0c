"""What llguidance says of tokens: JSON that is valid by its schema, whoever writes it."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import pytest  # isort: skip
from jsonschema import Draft202012Validator
from tiny_json import schema, write_json_model

from mlx_redrafter import batch_generate, generate, load, stream_generate
from mlx_redrafter.api import Model
from mlx_redrafter.errors import OptionError
from mlx_redrafter.text import grammar as grammars
from mlx_redrafter.text.tokenizer import load_tokenizer
from mlx_redrafter.tree.shape import TreeShape

TREE = TreeShape(1, 0, 6, lookup=5)
PROMPT = "the red green blue ones are"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    model, tokenizer = load(write_json_model(tmp_path_factory.mktemp("json")), None)
    return Model.of(model.name, model.folder, model.target, compiled=False), tokenizer


@pytest.fixture(scope="module")
def bias(pair: tuple[Model, Any]) -> dict[int, float]:
    """What closes comes soon: a random model would go on for long."""
    _, tokenizer = pair
    closing = ('"', "}", "]", ",", '",', '"}', "]}")
    ids = {tokenizer.convert_tokens_to_ids(text) for text in closing}
    return dict.fromkeys(ids - {None}, 4.0)


def answers(pair: tuple[Model, Any], length: int = 120, **options: Any) -> tuple[str, str | None]:
    """The answer, drafted and plain the same, and why it ended."""
    found = []
    for draft in ({"draft": False}, {"tree": TREE}):
        every = list(stream_generate(*pair, PROMPT, length, **draft, **options))
        assert [r.finish_reason for r in every[:-1]] == [None] * (len(every) - 1)
        found.append(([r.token for r in every], "".join(r.text for r in every)))
    assert found[0] == found[1]
    return found[0][1], every[-1].finish_reason


def valid(pair: tuple[Model, Any], bias: dict[int, float], seed: int) -> bool:
    """Did an answer end? Then it is valid."""
    wanted = schema(seed)
    sampled = {"temp": 1.0, "seed": seed} if seed % 3 else {}
    filtered = {"top_k": 7} if seed % 3 == 2 else {}
    text, reason = answers(pair, json_schema=wanted, logit_bias=bias, **sampled, **filtered)
    if reason == "stop":
        Draft202012Validator(wanted).validate(json.loads(text))
    return reason == "stop"


def test_schemas(pair: tuple[Model, Any], bias: dict[int, float]) -> None:
    assert sum(valid(pair, bias, seed) for seed in range(6)) > 2


@pytest.mark.slow
def test_three_hundred_schemas(pair: tuple[Model, Any], bias: dict[int, float]) -> None:
    assert sum(valid(pair, bias, seed) for seed in range(1000, 1300)) > 200


def test_an_expression_and_a_grammar(pair: tuple[Model, Any]) -> None:
    text, reason = answers(pair, regex=r"(red|green) [0-9]{2,4}/x", temp=1.0, seed=3)
    assert re.fullmatch(r"(red|green) [0-9]{2,4}/x", text) and reason == "stop"
    lark = 'start: "<" word+ ">"\nword: /[a-z]{2}/ " "'
    text, _ = answers(pair, 12, grammar=lark, temp=1.0, seed=3)
    assert re.match(r"<[a-z]{2} ?", text)
    text, reason = answers(pair, grammar='root ::= "<" [a-z] [a-z] ">"', temp=1.0, seed=4)
    assert re.fullmatch("<[a-z]{2}>", text) and reason == "stop"


def test_what_is_certain_takes_no_step(pair: tuple[Model, Any]) -> None:
    """A step has up to nine tokens of it; behind the last choice the end is written at once."""
    one = {"type": "object", "properties": {"a long name of a property": {"enum": [True]}}}
    one |= {"required": list(one["properties"]), "additionalProperties": False}  # type: ignore[dict-item]
    *_, last = stream_generate(*pair, PROMPT, 120, json_schema=one, draft=False)
    assert last.generation_tokens > 20
    assert last.stats.steps <= -(-last.generation_tokens // 9) + 1
    assert last.stats.acceptance_rate == 1


def test_whole_numbers_end(pair: tuple[Model, Any]) -> None:
    """A model that only ever writes zeros writes numbers that every reader has."""
    zeros = dict.fromkeys(pair[1].encode("0", add_special_tokens=False), 90.0)
    bounded = {"type": "integer", "minimum": 1}  # who says a bound says all of them
    assert answers(pair, 60, json_schema=bounded, logit_bias=zeros)[1] == "length"
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
    text, reason = answers(pair, 60, json_schema=numbers, logit_bias=zeros, temp=1.0, seed=2)
    assert reason == "stop" and all(abs(n) < 2**53 for n in json.loads(text))


def test_the_length_and_stop_strings_end_it_too(pair: tuple[Model, Any]) -> None:
    long = {"type": "array", "items": {"const": "red"}, "minItems": 50}
    text, reason = answers(pair, 25, json_schema=long)
    assert text.startswith('["red", "red"') and reason == "length"
    text, reason = answers(pair, 60, json_schema=long, stop='red", "red')
    assert text == '["' and reason == "stop"


def test_several_at_once(pair: tuple[Model, Any]) -> None:
    options: dict[str, Any] = {"regex": "(red|green|blue)( (red|green|blue)){2}", "temp": 1.0}
    alone = [generate(*pair, text, max_tokens=40, **options) for text in ("the", "a red")]
    assert batch_generate(*pair, ["the", "a red"], 40, **options).texts == alone


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"json_schema": '{"type":'}, "the JSON schema is not JSON"),
    ({"json_schema": [1]}, "is not an object"),
    ({"json_schema": {"type": "object", "not": {}}}, 'Unimplemented keys: ["not"]'),
    ({"json_schema": {"type": "nothing"}}, "the JSON schema is not possible"),
    ({"json_schema": {"$ref": "http://example.com/x"}}, "the JSON schema is not possible"),
    ({"json_schema": {"$ref": "#"}}, "the JSON schema is not possible (no text follows it)"),
    ({"regex": "(("}, "the grammar is not possible"),
    ({"regex": 5}, "regex is not possible"),
    ({"grammar": "start: nothing"}, "the grammar is not possible"),
    ({"grammar": 'root ::= "a" ('}, "the grammar is not possible"),
    ({"regex": "a", "json_schema": {}}, "json_schema and regex cannot be followed at once"),
]


@pytest.mark.parametrize("options, said", WRONG)
def test_what_is_not_possible(pair: tuple[Model, Any], options: Any, said: str) -> None:
    with pytest.raises(OptionError) as caught:
        stream_generate(*pair, PROMPT, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_library(pair: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("llguidance"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(OptionError, match=r"pip install 'mlx-redrafter\[grammar\]'"):
        stream_generate(*pair, PROMPT, regex="a")


def test_a_tokenizer_that_it_cannot_read(tmp_path: Path) -> None:
    class Odd:
        eos_token_id, eos_token_ids = 1, {1}

        def __len__(self) -> int:
            return 5

    with pytest.raises(OptionError, match=r"with a tokenizer\.json of bytes or pieces"):
        grammars.Grammars(Odd(), 5)


def test_a_tokenizer_of_pieces(tmp_path: Path) -> None:
    """Words with a mark for the space, and bytes for letters that it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    mark = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(mark)
    space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*space, decoders.Strip(" ", 1, 0)])
    every = [f"<0x{i:02X}>" for i in range(256)]
    special = ["<unk>", "</s>", *every]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator(['{"name":▁"the▁red▁one"}'] * 5, trainer)
    raw = json.loads(made.to_str())
    raw["added_tokens"] = [one for one in raw["added_tokens"] if one["content"] not in every]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path)
    place = grammars.Grammars(tokenizer, len(tokenizer)).compiled(grammars.of_regex("é+")).begin()
    certain = place.forced(3)
    assert tokenizer.convert_ids_to_tokens(certain) == ["<0xC3>", "<0xA9>"]
    assert place.take(certain) == 2 and place.take([tokenizer.eos_token_id]) == 1 and place.over


THOUGHTS = [
    ("<think>", "</think>", "<think> the red ones</think>\n"),
    ("<|start|>", "<|stop|>", "<|start|> the red ones<|stop|>\n"),
    ("[CALL]x", "[CALL]y", "[CALL]x the red[CALL]y"),
]


@pytest.mark.parametrize("opening, closing, text", THOUGHTS)
def test_a_thought_comes_first(
    pair: tuple[Model, Any], opening: str, closing: str, text: str
) -> None:
    """Markers may be text, special tokens, or both."""
    model, tokenizer = pair
    made = model.grammars(tokenizer)
    source = grammars.of_schema({"const": {"a": 1}})

    def legal(text: str, opened: bool) -> bool:
        place = made.compiled(source, thought=(opening, closing), opened=opened).begin()
        ids = tokenizer.encode(text, add_special_tokens=False)
        return place.take(ids) == len(ids) and place.forced(3) == [tokenizer.eos_token_id]

    assert legal('{"a": 1}', False) and legal(text + '{"a": 1}', False)
    assert not legal(" the red" + '{"a": 1}', False)
    assert legal(text.removeprefix(opening) + '{"a": 1}', True)
    assert not legal('{"a": 1}', True)


def test_what_is_certain_is_certain_by_tokens_too(pair: tuple[Model, Any]) -> None:
    """Bytes that must come have one way to be written: else a draft would choose another one."""
    model, tokenizer = pair
    one = {"type": "object", "properties": {"name": {}}, "required": ["name"]}
    place = model.grammars(tokenizer).compiled(grammars.of_schema(one)).begin()
    first, other = (tokenizer.convert_tokens_to_ids(text) for text in ('{"', "{"))
    assert place.forced(1) == [first]
    assert place.take([other]) == 0 and place.take([first]) == 1
