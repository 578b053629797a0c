"""Answers end where the model ends its turn: by well-known names in a GGUF file, by templates."""

from __future__ import annotations

import json
import warnings

import pytest
from gguf_files import run
from tiny_chat import WORDS, write_chat_model, write_tokenizer
from tiny_gguf import I32, STRING, U32, metadata, vocabulary, write_gguf

from mlx_redrafter import load
from mlx_redrafter.convert import convert
from mlx_redrafter.text import turn_ends
from mlx_redrafter.text.tokenizer import load_tokenizer

CONTROL, NORMAL, USER_DEFINED, UNUSED = 3, 1, 4, 5


def ends_of(tmp_path, third, kind=CONTROL, **changed):
    """What a converted GGUF stops at: its tokens 0 to 2 are bos, eos and `third`."""
    _, plain = vocabulary()
    special = ["<|begin_of_text|>", "<|end_of_text|>", third]
    types = [CONTROL, CONTROL, kind, *[NORMAL] * len(plain)]
    given = {
        "tokenizer.ggml.pre": (STRING, "llama-bpe"),
        "tokenizer.ggml.tokens": (STRING, [*special, *plain]),
        "tokenizer.ggml.token_type": (I32, types),
        "tokenizer.ggml.bos_token_id": (U32, 0),
        "tokenizer.ggml.eos_token_id": (U32, 1),
        "tokenizer.chat_template": (STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"),
        **changed,
    }
    given = {key: value for key, value in metadata(**given).items() if value is not None}
    write_gguf(tmp_path / "x.gguf", given)
    run(tmp_path / "x.gguf", tmp_path / "out")
    found = []
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "out" / name).read_text())["eos_token_id"]
        found.append({ids} if isinstance(ids, int) else set(ids))
    assert found[0] == found[1] == load_tokenizer(tmp_path / "out").eos_token_ids
    return found[0]


@pytest.mark.parametrize(
    "name",
    [
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>",
        "<EOT>", "_<EOT>", "[EOT]", "<|return|>", "<|call|>", "<end_of_utterance>", "<|eot|>",
        "<turn|>", "</s>",
    ],
)  # fmt: skip
def test_well_known_ends_of_a_gguf_vocabulary(tmp_path, name):
    assert ends_of(tmp_path, name) == {1, 2}


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("<|im_end|>", USER_DEFINED, {1, 2}),
        ("<|im_end|>", NORMAL, {1}),
        ("<|im_end|>", UNUSED, {1}),
        ("<|im_start|>", CONTROL, {1}),
    ],
)
def test_only_markup_ends_an_answer(tmp_path, name, kind, expected):
    assert ends_of(tmp_path, name, kind) == expected


def test_without_token_types_the_name_decides_and_is_markup(tmp_path):
    assert ends_of(tmp_path, "<|im_end|>", **{"tokenizer.ggml.token_type": None}) == {1, 2}
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [2]


@pytest.mark.parametrize(
    "key", ["eos_token_ids", "eot_token_id", "eot_token_ids", "eom_token_id", "eos_token_id"]
)
def test_ends_that_the_file_lists(tmp_path, key):
    value = (I32, [1, 2]) if key.startswith("eos") or key.endswith("s") else (U32, 2)
    assert ends_of(tmp_path, "<last>", **{f"tokenizer.ggml.{key}": value}) == {1, 2}


def test_a_list_alone_is_enough_and_ids_outside_the_vocabulary_are_none(tmp_path):
    changed = {"eos_token_id": None, "eos_token_ids": (I32, [2, 99999, -1])}
    given = {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    assert ends_of(tmp_path, "<last>", **given) == {1, 2}  # 1 is <|end_of_text|>


def test_an_end_of_a_message_inside_an_answer_is_none():
    harmony = {"<|end|>", "<|return|>", "<|call|>", "<|start|>"}
    assert turn_ends.known(harmony) == {"<|return|>", "<|call|>"}
    assert turn_ends.known({"<|end|>", "<|user|>"}) == {"<|end|>"}
    assert turn_ends.known({"</s>", "<|tool_response>"}) == {"<|tool_response>"}


PARTS = "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} "
UNNAMED = {
    "behind every message": PARTS + "<unk>{% endfor %}",
    "with text before it": PARTS + "over\n <unk>{% endfor %}",
    "only before the next question": PARTS + "{% if not loop.last %}<unk>{% endif %}{% endfor %}",
    "trimmed": PARTS.replace("m['content']", "m['content'] | trim") + "<unk><|im_end|>{% endfor %}",
    "of the assistant only": PARTS + "{% if m.role == 'assistant' %}<unk>{% endif %}{% endfor %}",
}
END = WORDS.index("<unk>")


@pytest.mark.parametrize("kind", UNNAMED)
def test_an_end_that_only_the_template_knows_is_added_with_a_warning(tmp_path, kind):
    folder = write_chat_model(tmp_path / "model", UNNAMED[kind])
    with pytest.warns(UserWarning, match=r"ends an answer with <unk>, .* add 2 to eos_token_id"):
        _, tokenizer = load(str(folder), drafter=None)
    assert tokenizer.eos_token_ids == {1, END}
    summary = convert(folder, tmp_path / "out")
    assert [note for note in summary.notes if "<unk>" in note and "eos_token_id" in note]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [1, END]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, tokenizer = load(str(tmp_path / "out"), drafter=None)
    assert tokenizer.eos_token_ids == {1, END}


NAMED = {
    "the named end": PARTS + "<|im_end|>{% endfor %}",
    "no end at all": "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}",
    "an answer that is not shown": PARTS.replace("m['content']", "m['role']") + "<unk>{% endfor %}",
    "a template that fails": PARTS + "{{ raise_exception('no') }}{% endfor %}",
    "another text for a system only": PARTS
    + "{% if m.role == 'system' %}<unk>{% endif %}<|im_end|>{% endfor %}",
    "none": None,
}


@pytest.mark.parametrize("kind", NAMED)
def test_nothing_is_added_where_nothing_is_missing(tmp_path, kind):
    write_tokenizer(tmp_path, NAMED[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(tmp_path).eos_token_ids == {1}
    assert turn_ends.unnamed(load_tokenizer(tmp_path, complete=False)) is None


def test_a_gguf_template_adds_its_end_too(tmp_path):
    template = "{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}"
    write_gguf(tmp_path / "x.gguf", metadata(**{"tokenizer.chat_template": (STRING, template)}))
    summary = convert(tmp_path / "x.gguf", tmp_path / "out")
    assert any("ends an answer with <|im_start|>" in note for note in summary.notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tokenizer(tmp_path / "out").eos_token_ids == {1, 2}
