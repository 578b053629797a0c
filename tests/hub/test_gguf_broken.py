"""GGUF files that are damaged, foreign or something else: one line each, never a traceback."""

from __future__ import annotations

import random

import pytest
from tiny_gguf import BOOL, F32, I32, STRING, U32, metadata, write_gguf
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.convert import convert
from mlx_redrafter.convert.gguf import GgufPlan
from mlx_redrafter.convert.mapping import size_text
from mlx_redrafter.errors import ConvertError, RedrafterError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"
PAGE = b"<!DOCTYPE html><html>not found</html>"


def refusal(path, **options):
    with pytest.raises(ConvertError) as caught:
        convert(path, path.parent / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (path.parent / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.gguf", POINTER, "x.gguf is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        ("x.gguf", PAGE, "x.gguf is a web page, not the file itself"),
        ("X.GGUF", b"", "not a readable GGUF file (it ends within the header)"),
        ("x.gguf", b"\0" * 64, "not a readable GGUF file (it does not begin with 'GGUF')"),
        ("x.gguf", b"GGUF\1\0\0\0" + b"\0" * 64, "is of GGUF version 1; needed: version 2 or 3"),
        ("x.gguf", b"GGUF\4\0\0\0" + b"\0" * 64, "version 4; needed: version 2 or 3: update"),
        ("x.gguf", b"GGUF\0\0\0\3" + b"\0" * 64, "a big-endian GGUF file; needed: a little-endian"),
        ("x.gguf", b"GGUF\0\0\0\1" + b"\0" * 64, "a big-endian GGUF file; needed: a little-endian"),
    ],
)
def test_what_lies_in_the_place_of_a_gguf_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    said = refusal(tmp_path / name)
    assert message in said and "safetensors" not in said
    arguments = ["convert", str(tmp_path / name), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stderr) == (1, f"error: {said}\n")


WRONG = {
    "tokens that are numbers": ("tokenizer.ggml.tokens", I32, [1, 2], "needed: a list of texts"),
    "tokens that are one text": ("tokenizer.ggml.tokens", STRING, "ab", "needed: a list of texts"),
    "merges": ("tokenizer.ggml.merges", U32, 3, "merges is 3; needed: a list of texts"),
    "types": ("tokenizer.ggml.token_type", STRING, ["a"], "needed: a list of whole numbers"),
    "model": ("tokenizer.ggml.model", U32, 1, "model is 1; needed: text in UTF-8"),
    "template": ("tokenizer.chat_template", U32, 1, "template is 1; needed: text in UTF-8"),
    "end": ("tokenizer.ggml.eos_token_id", STRING, "</s>", "needed: a whole number or a list"),
    "start": ("tokenizer.ggml.bos_token_id", I32, [1], "is a list of 1 values; needed: a whole"),
    "switch": ("tokenizer.ggml.add_bos_token", STRING, "yes", "'yes'; needed: true or false"),
    "architecture": ("general.architecture", STRING, ["llama"], "needed: text in UTF-8"),
    "alignment": ("general.alignment", U32, 0, "alignment is 0; needed: a power of two"),
    "parts": ("split.count", STRING, "two", "split.count is 'two'; needed: a whole number"),
    "layers": ("llama.block_count", F32, 2.0, "block_count is 2.0; needed: a whole number"),
    "too many layers": ("llama.block_count", U32, 2**32 - 1, "more than its tensors have"),
    "heads": ("llama.attention.head_count", U32, 0, "head_count is 0; needed: a whole number"),
    "heads by layer": ("llama.attention.head_count", U32, [2, 2], "is a list of 2 values"),
    "no number": (
        "llama.attention.layer_norm_rms_epsilon", F32, float("nan"), "nan; needed: a number above 0"
    ),
    "rotary base": ("llama.rope.freq_base", BOOL, True, "freq_base is True; needed: a number"),
    "context": ("llama.context_length", STRING, "8k", "context_length is '8k'; needed: a whole"),
    "windows": (
        "llama.attention.sliding_window_pattern", STRING, "all",
        "needed: a whole number or a list of true and false",
    ),
    "experts": ("llama.expert_used_count", F32, 2.0, "used_count is 2.0; needed: a whole number"),
    "lists of other lengths": (
        "tokenizer.ggml.tokens", STRING, [f"t{i}" for i in range(300)], "types or merges"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_values_of_the_wrong_type(tmp_path, name):
    key, kind, value, message = WRONG[name]
    write_gguf(tmp_path / "x.gguf", metadata(**{key: (kind, value)}))
    assert message in refusal(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "key", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"]
)
def test_sizes_that_are_missing_are_named(tmp_path, key):
    write_gguf(tmp_path / "x.gguf", {k: v for k, v in metadata().items() if k != f"llama.{key}"})
    assert f"lacks llama.{key}; download it again" in refusal(tmp_path / "x.gguf")


def test_more_tokens_than_rows_of_the_embedding(tmp_path):
    tokens = [*metadata()["tokenizer.ggml.tokens"][1], *(f"<{i}>" for i in range(9))]
    given = {
        "tokenizer.ggml.tokens": (STRING, tokens),
        "tokenizer.ggml.token_type": (I32, [1] * len(tokens)),
    }
    write_gguf(tmp_path / "x.gguf", metadata(**given))
    assert f"has {len(tokens)} tokens and embeds {len(tokens) - 9}" in refusal(tmp_path / "x.gguf")


def test_bytes_that_are_not_utf_8(tmp_path):
    """Pieces of a vocabulary and what nobody reads may be so; a template may not."""
    path = tmp_path / "x.gguf"
    write_gguf(
        path,
        metadata(**{"general.name": (STRING, "QQ"), "tokenizer.chat_template": (STRING, "ZZ")}),
    )
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"QQ", b"\xff\xfe").replace("ĠĠ".encode(), b"\xff\xfe\xff\xfe"))
    GgufPlan(path)
    path.write_bytes(whole.replace(b"ZZ", b"\xff\xfe"))
    assert r"chat_template is '\udcff\udcfe'; needed: text in UTF-8" in refusal(path)


def test_any_damage_is_one_line(tmp_path):
    """300 headers with flipped bytes, some cut short."""
    path, rng = tmp_path / "x.gguf", random.Random(5)
    write_gguf(path)
    whole = path.read_bytes()
    header = whole.index(b"blk.0.attn_norm")
    refused = 0
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            broken[rng.randrange(rng.choice((400, header)))] = rng.randrange(256)
        path.write_bytes(broken[: rng.choice((len(broken), rng.randrange(len(broken))))])
        try:
            GgufPlan(path)
        except RedrafterError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 150 < refused < 300


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
     (12_345_678, "12.3 MB"), (4_500_000_000, "4.5 GB"), (1_234_000_000_000, "1234.0 GB")],
)  # fmt: skip
def test_sizes_in_words(size, text):
    assert size_text(size) == text
