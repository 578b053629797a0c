"""The tokenizer of a GGUF file is the one that the model was trained with."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from gguf_files import run
from tiny_gguf import BOOL, I32, STRING, U32, metadata, write_gguf

from mlx_redrafter.errors import ConvertError
from mlx_redrafter.hub.gguf.splitters import SPLITTERS
from mlx_redrafter.hub.gguf.tokenizer import GgufTokenizer
from mlx_redrafter.text.tokenizer import load_tokenizer


def tokenizer_of(tmp_path, **changed):
    write_gguf(tmp_path / "x.gguf", metadata(**changed))
    run(tmp_path / "x.gguf", tmp_path / "out")
    return load_tokenizer(tmp_path / "out")


DIGITS = {
    "tokenizer.ggml.merges": (STRING, ["Ġ Ġ", "i n", "1 2", "12 3"]),
    "tokenizer.ggml.tokens": (
        STRING,
        [*metadata()["tokenizer.ggml.tokens"][1], "12", "123"],
    ),
    "tokenizer.ggml.token_type": (I32, [*metadata()["tokenizer.ggml.token_type"][1], 1, 4]),
}


@pytest.mark.parametrize(
    ("splitter", "tokens"),
    [
        ("smollm", ["x", "ĠĠ", "1", "2", "3", "1", "2"]),
        ("qwen2", ["x", "Ġ", "Ġ", "1", "2", "3", "1", "2"]),
        ("llama-bpe", ["<|im_start|>", "x", "Ġ", "Ġ", "123", "12"]),
        ("gpt-2", ["x", "Ġ", "Ġ", "123", "12"]),
    ],
)
def test_splitters(tmp_path, splitter, tokens):
    kinds = {"tokenizer.ggml.token_type": (I32, [*DIGITS["tokenizer.ggml.token_type"][1][:-1], 1])}
    changed = {**DIGITS, **kinds, "tokenizer.ggml.pre": (STRING, splitter)}
    changed["tokenizer.ggml.add_bos_token"] = (BOOL, splitter == "llama-bpe")
    size = len(DIGITS["tokenizer.ggml.tokens"][1])
    tokenizer = GgufTokenizer({k: v[1] for k, v in metadata(**changed).items()}, "x").build()
    assert tokenizer.encode("x  12312").tokens == tokens
    for text in ("def f(x):\n\treturn x  # 3.14", "naïve 你好 🦊", "I'LL don't"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() == size


WORDS = {
    "gpt-2": ["HelloWorld", "'s", "Ġ", "Ġ12345", "!?", "Ċ", "Ċ", "no", "Ìģ"],
    "starcoder": [
        "HelloWorld", "'s", "ĠĠ", "1", "2", "3", "4", "5", "!?", "Ċ", "Ċ", "no", "Ìģ",
    ],
    "qwen2": ["HelloWorld", "'s", "Ġ", "Ġ", "1", "2", "3", "4", "5", "!?ĊĊ", "nÃ³"],
    "qwen35": ["HelloWorld", "'s", "Ġ", "Ġ", "1", "2", "3", "4", "5", "!?ĊĊ", "nÃ³"],
    "stablelm2": ["HelloWorld", "'s", "Ġ", "Ġ", "1", "2", "3", "4", "5", "!?ĊĊ", "no", "Ìģ"],
    "smaug-bpe": ["HelloWorld", "'s", "Ġ", "Ġ", "123", "45", "!?ĊĊ", "no", "Ìģ"],
    "gpt-4o": ["Hello", "World's", "Ġ", "Ġ", "123", "45", "!?ĊĊ", "noÌģ"],
    "tekken": ["Hello", "World", "'s", "Ġ", "Ġ", "1", "2", "3", "4", "5", "!?ĊĊ", "noÌģ"],
    "deepseek-v3": ["HelloWorld", "'s", "ĠĠ", "123", "45", "!?ĊĊ", "noÌģ"],
    "seed-coder": ["HelloWorld", "'s", "Ġ", "Ġ", "1", "2", "3", "4", "5", "!?", "ĊĊ", "no", "Ìģ"],
}  # fmt: skip


@pytest.mark.parametrize("splitter", WORDS)
def test_words_of_a_splitter(splitter):
    given = {"tokenizer.ggml.pre": (STRING, splitter)}
    tokenizer = GgufTokenizer({k: v[1] for k, v in metadata(**given).items()}, "x").build()
    text = "HelloWorld's  12345!?\n\nno\u0301"
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == WORDS[splitter]


def test_every_splitter_is_an_expression(tmp_path):
    for splitter in SPLITTERS:
        given = {"tokenizer.ggml.pre": (STRING, splitter)}
        tokenizer = GgufTokenizer({k: v[1] for k, v in metadata(**given).items()}, "x").build()
        text = "naïve 你好 🦊 I'LL  12345\n\n"
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    given = {"tokenizer.ggml.pre": (STRING, "superbpe")}
    with pytest.raises(ConvertError, match=r"'superbpe'; needed: .* gpt-4o, .* tekken; convert"):
        GgufTokenizer({k: v[1] for k, v in metadata(**given).items()}, "x")


def test_added_tokens_ends_and_template(tmp_path):
    changed = {
        "tokenizer.ggml.pre": (STRING, "qwen2"),
        "tokenizer.ggml.eot_token_id": (U32, 0),
        "tokenizer.ggml.add_bos_token": (BOOL, True),
        "tokenizer.ggml.add_eos_token": (BOOL, True),
        "tokenizer.ggml.token_type": (I32, [3] * 3 + [1] * 257 + [4]),
    }
    tokenizer = tokenizer_of(tmp_path, **changed)
    # The last token, "in", is the user's: it is cut out before the splitter.
    ids = tokenizer.encode("xiny")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "x", "in", "y", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "xiny"
    assert tokenizer.eos_token_ids == {0, 2}
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}
    prompt = tokenizer.apply_chat_template([{"content": "in"}], add_generation_prompt=True)
    assert prompt == [1, 260, 2, 1]


@pytest.fixture(scope="module")
def trained():
    """A small model by SentencePiece itself, which comes with mlx-lm."""
    text = [*Path(__file__).read_text().splitlines(), "the fox and the crow", "naïve café"] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=600, model_type="bpe",
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def spm_metadata(sp, order, **changed):
    """The metadata with the pieces in another order; their scores alone say how to merge."""

    def kind(i):
        return 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1

    given = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in order],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in order],
        "tokenizer.ggml.token_type": [kind(i) for i in order],
        "tokenizer.ggml.bos_token_id": order.index(sp.bos_id()),
        "tokenizer.ggml.eos_token_id": order.index(sp.eos_id()),
        "tokenizer.ggml.unknown_token_id": order.index(sp.unk_id()),
    }
    return {**given, **{f"tokenizer.ggml.{key}": value for key, value in changed.items()}}


@pytest.mark.parametrize("step", [1, -1], ids=["as trained", "reversed"])
def test_sentencepiece_from_its_scores(trained, step):
    order = list(range(trained.vocab_size()))[::step]
    tokenizer = GgufTokenizer(spm_metadata(trained, order), "x").build()
    bare = GgufTokenizer(spm_metadata(trained, order, add_bos_token=False), "x").build()
    texts = [
        "the fox and the crow", " two  spaces ", "def f(x):\n\treturn x  # 3.14", "naïve 你好 🦊",
        "assert tokenizer.encode(text).ids == expected", "1234567890", "",
    ]  # fmt: skip
    for text in [*texts, *Path(__file__).read_text().splitlines()[:80]]:
        expected = [order.index(i) for i in trained.encode(text)]
        assert bare.encode(text).ids == expected, text
        assert tokenizer.encode(text).ids == [order.index(trained.bos_id()), *expected]
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_gemma_4_stores_the_merges(trained):
    """With them, the pieces' scores say nothing."""
    order = list(range(trained.vocab_size()))
    by_score = GgufTokenizer(spm_metadata(trained, order, add_space_prefix=False), "x")
    merges = [" ".join(pair) for pair in json.loads(by_score.build().to_str())["model"]["merges"]]
    given = spm_metadata(
        trained, order, add_space_prefix=False, model="gemma4", pre="gemma4", merges=merges,
        scores=[-1000.0] * len(order),
    )  # fmt: skip
    stored = GgufTokenizer(given, "x").build()
    for text in ("the fox and  the crow", "def f(x):\n\treturn x", "naïve 你好 🦊"):
        assert stored.encode(text).ids == by_score.build().encode(text).ids
        assert stored.decode(stored.encode(text).ids) == text


def test_a_broken_tokenizer_is_one_line(tmp_path):
    changed = {"tokenizer.ggml.merges": (STRING, ["no such"])}
    write_gguf(tmp_path / "x.gguf", metadata(**changed))
    with pytest.raises(ConvertError, match="makes no sense") as caught:
        run(tmp_path / "x.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    lacking = {k: v[1] for k, v in metadata().items() if k != "tokenizer.ggml.merges"}
    with pytest.raises(ConvertError, match="lacks its tokenizer's tokens, types or merges"):
        GgufTokenizer(lacking, "x")
