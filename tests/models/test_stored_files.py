"""Folders whose files say one thing and hold another: load, convert and info agree on the stored.

Every kind of folder goes through all three: the same tokens, or the same refusal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import plainly, prompt_of, write_target
from edits import PAGE, POINTER, Edit, edit_config, edit_file, edit_weights, edits
from tiny_chat import END, WORDS, write_chat_model

from mlx_redrafter.cli import info
from mlx_redrafter.convert import convert
from mlx_redrafter.errors import RedrafterError
from mlx_redrafter.models import decoder_config, load_model
from mlx_redrafter.text.tokenizer import load_tokenizer

INDEX = "model.safetensors.index.json"
HEAD, UP = "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
PROMPT = prompt_of(40, vocab=len(WORDS))


def index(where: dict[str, str]) -> Edit:
    content = json.dumps({"metadata": {}, "weight_map": where}).encode()
    return edit_file(INDEX, lambda _: content)


def in_shards(folder: Path) -> None:
    """model.safetensors in two files of half the tensors each, without an index."""
    weights = {k: v + 0 for k, v in mx.load(str(folder / "model.safetensors")).items()}
    mx.eval(weights)
    names = sorted(weights)
    for i, shard in enumerate(SHARDS):
        mx.save_safetensors(str(folder / shard), {name: weights[name] for name in names[i::2]})
    (folder / "model.safetensors").unlink()


def keep_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    in_shards(folder)
    (folder / "model.safetensors").write_bytes(data)


def lost(name: str) -> Edit:
    return edit_file(name, lambda _: None)


def other(name: str, *tensors: str) -> Edit:
    """A file with tensors of other values, as another program or precision left it."""

    def edit(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        weights = {n: mx.full((4, 4), 9.0) for n in tensors or (HEAD, UP)}
        mx.save_safetensors(str(folder / name), weights)

    return edit


def block(**content: object) -> Edit:
    return edit_config(quantization_config=content)


def text_file(name: str, content: object) -> Edit:
    return edit_file(name, lambda _: json.dumps(content).encode())


def nothing(folder: Path) -> None:
    """The folder as it is."""


def silent(folder: Path) -> None:
    edit_config(tie_word_embeddings=None)(folder)


def null(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": None}))


MLX_BLOCK = {"group_size": 64, "bits": 4, "lm_head": {"group_size": 32, "bits": 8}}
SAME: dict[str, Edit] = {
    "plain": nothing,
    "shards": in_shards,
    "index of other shards": index({UP: SHARDS[0], HEAD: SHARDS[1]}),
    "index of a build with pictures": index({"model.language_model." + UP[6:]: SHARDS[0]}),
    "index of one shard": edits(in_shards, index({UP: SHARDS[0]})),
    "index that is wrong about tensors": edits(in_shards, index({"a": SHARDS[0], UP: SHARDS[1]})),
    "index of nothing": edit_file(INDEX, lambda _: b"{}"),
    "index without end": edits(in_shards, edit_file(INDEX, lambda _: b'{"weight_map": {')),
    "index that is a page": edit_file(INDEX, lambda _: PAGE),
    "one old shard": edits(other(SHARDS[0]), index({UP: SHARDS[0], HEAD: SHARDS[1]})),
    "one old shard, no index": other(SHARDS[1]),
    "index of pickles": text_file("pytorch_model.bin.index.json", {"weight_map": {UP: "a.bin"}}),
    "pickles": edit_file("pytorch_model.bin", lambda _: b"\x80\x02K\x01."),
    "bitsandbytes": block(quant_method="bitsandbytes", load_in_4bit=True),
    "fp8": block(quant_method="fp8", weight_block_size=[128, 128]),
    "gptq": block(quant_method="gptq", bits=4, group_size=128),
    "quantised by mlx once": edit_config(quantization=MLX_BLOCK, quantization_config=MLX_BLOCK),
    "quantised by a word": edit_config(quantization="int8"),
    "compressed once": edit_config(compression_config={"format": "pack-quantized"}),
    "silent about the head": silent,
    "null about the head": null,
    "original form": edits(other("consolidated.safetensors"), other("original/model.safetensors")),
    "precisions": edits(other("model.fp16.safetensors"), other("model-4bit.safetensors")),
    "precisions in folders": other("fp16/model.safetensors"),
    "an adapter": edits(other("adapter_model.safetensors"), other("adapters.safetensors")),
    "a trainer's": other("optimizer.safetensors"),
    "another file": edits(index({UP: "model.safetensors"}), other("extra.safetensors", "visual.a")),
}  # fmt: skip


def tokens(folder: Path, prompt: list[int] = PROMPT) -> list[int]:
    return plainly(load_model(folder), prompt, 12)


def through_convert(folder: Path) -> Path:
    convert(folder, folder.parent / "converted")
    return folder.parent / "converted"


@pytest.fixture(name="folder")
def chat_folder(tmp_path: Path) -> Path:
    return write_chat_model(tmp_path / "model", tie_word_embeddings=False)


@pytest.mark.filterwarnings("ignore:.*(is read from|found without it)")
@pytest.mark.parametrize("name", SAME)
def test_the_stored_weights_are_the_model(folder: Path, name: str) -> None:
    want, size = tokens(folder), info.collect(str(folder), "auto")["model"]
    SAME[name](folder)
    assert tokens(folder) == want
    assert tokens(through_convert(folder)) == want
    assert info.collect(str(folder), "auto")["model"] == size


def test_a_left_over_index_is_said(folder: Path) -> None:
    SAME["index of other shards"](folder)
    for read in (load_model, through_convert):
        with pytest.warns(UserWarning, match=f"lacks {SHARDS[0]}.*read from model.safetensors"):
            read(folder)


@pytest.mark.parametrize("tie", [True, False, None])
@pytest.mark.parametrize("stored", [True, False])
def test_the_head_is_the_same_for_all(folder: Path, tie: bool | None, stored: bool) -> None:
    own = tokens(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tie}))
    if not stored:
        edit_weights(lambda w: w.pop(HEAD))(folder)
    if tie is False and not stored:
        assert HEAD in refusals(folder)[0]
        return
    found = tokens(folder)
    assert (found == own) == (stored and not tie)
    assert tokens(through_convert(folder)) == found
    assert info.collect(str(folder))["model"]["vocabulary"] == len(WORDS)


def test_packed_weights_load_without_a_word_in_the_configuration(tmp_path: Path) -> None:
    """Shapes tell bits and group size, whatever config.json says of them."""
    from mlx_lm import utils

    folder = write_target(tmp_path / "model", hidden_size=64)
    model, config = utils.load_model(folder)
    utils.save_model(folder, utils.quantize_model(model, config, 32, 8)[0])
    utils.save_config(
        {**config, "quantization": {"group_size": 32, "bits": 8}}, folder / "config.json"
    )
    want, size = tokens(folder), info.collect(str(folder))["model"]
    for said in (None, {"group_size": 64, "bits": 4}):
        edit_config(quantization=said)(folder)
        assert tokens(folder) == want
        assert info.collect(str(folder))["model"] == size
    with pytest.raises(RedrafterError, match="quantised MLX model already"):
        convert(folder, tmp_path / "out")


ENDS: dict[str, tuple[object, object, set[int]]] = {
    "text": ("<|im_start|>", None, {0, END}),
    "texts": (["<|im_end|>", "<unk>"], None, {END, 2}),
    "text in the other file": (None, "<|im_start|>", {0, END}),
    "number as text": ("2", None, {2, END}),
    "null": (None, [None], {END}),
    "junk": ([0, None, True, -3, 2.5, {"a": 1}, [7], ""], {"b": 2}, {0, END}),
    "both files": (2, [0], {0, END, 2}),
    "unknown text": (["</s>", 0], None, {0, END}),
}


@pytest.mark.filterwarnings("ignore:.*does not know")
@pytest.mark.parametrize("name", ENDS)
def test_ends_of_text(folder: Path, name: str) -> None:
    from mlx_lm import utils

    one, two, want = ENDS[name]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": one}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": two, "top_p": 0.5}))
    assert load_tokenizer(folder).eos_token_ids == want
    info.collect(str(folder))
    made = through_convert(folder)
    assert load_tokenizer(made).eos_token_ids == want
    assert json.loads((made / "generation_config.json").read_text())["top_p"] == 0.5
    assert utils.load(str(made))[1].eos_token_ids == want


def test_an_end_that_the_tokenizer_does_not_know_is_said(folder: Path) -> None:
    edit_config(eos_token_id="</s>")(folder)
    with pytest.warns(UserWarning, match="ends texts with </s>, which its tokenizer does not know"):
        load_tokenizer(folder)


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
# max_position_embeddings, the scaling, the context that comes of it.
LIMITS: dict[str, tuple[int, dict[str, object] | None, int]] = {
    "none": (64, None, 64),
    "yarn": (64, {"type": "yarn", **YARN}, 256),
    "yarn, new key": (64, {"rope_type": "yarn", **YARN}, 256),
    "yarn, stretched already": (256, {"rope_type": "yarn", **YARN}, 256),
    "yarn, a little more": (80, {"rope_type": "yarn", **YARN}, 256),
    "yarn, original not named": (64, {"rope_type": "yarn", "factor": 2.0}, 128),
    "linear": (64, {"type": "linear", "factor": 2.5}, 160),
    "linear, original named": (128, {"type": "linear", "factor": 2, **YARN}, 256),
    "llama3": (256, {"rope_type": "llama3", **YARN}, 256),
    "llama3, a factor of another kind": (128, {"rope_type": "llama3", **YARN}, 128),
    "llama3, not stretched": (64, {"rope_type": "llama3", **YARN}, 256),
    "longrope": (256, {**LONG, "original_max_position_embeddings": 64}, 256),
    "dynamic": (64, {"type": "dynamic", "factor": 4.0}, 64),
    "dynamic, new key": (64, {"rope_type": "dynamic", "factor": 4.0}, 64),
    "dynamic, no factor": (64, {"rope_type": "dynamic"}, 64),
    "default": (64, {"rope_type": "default", "factor": 4.0}, 64),
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", LIMITS)
def test_the_context_follows_the_scaling(folder: Path, name: str, key: str) -> None:
    length, scaling, want = LIMITS[name]
    theta = {"rope_theta": 1e4} if key == "rope_parameters" else {}
    edit_config(max_position_embeddings=length, **{key: {**(scaling or {}), **theta}})(folder)
    model = load_model(folder)
    assert model.config.max_positions == want
    assert info.collect(str(folder))["model"]["context"] == want
    made = load_model(through_convert(folder))
    assert made.config == model.config
    prompt = prompt_of(want - 8, vocab=len(WORDS))
    assert plainly(made, prompt, 4) == plainly(model, prompt, 4)


def test_gemma3_says_the_stretched_context() -> None:
    from tiny_models import CASES, TEXT

    for raw in (TEXT, CASES["gemma3"]):
        assert decoder_config(raw).max_positions == 512


def refusals(folder: Path) -> list[str]:
    """What load (with its tokenizer), convert and info say of a folder; each must refuse it."""

    def load() -> None:
        load_model(folder)
        load_tokenizer(folder)

    said = []
    for work in (load, lambda: through_convert(folder), lambda: info.collect(str(folder))):
        with pytest.raises(RedrafterError) as caught:
            work()
        assert "\n" not in str(caught.value)
        said.append(str(caught.value))
    assert not (folder.parent / "converted").exists()
    return said


def damage(change: Callable[[dict[str, mx.array]], object]) -> Edit:
    return edits(edit_weights(change), block(quant_method="bitsandbytes"))


REFUSED: dict[str, tuple[Edit, list[str]]] = {
    "a file and parts": (keep_file, ["model.safetensors", SHARDS[0], "two models"]),
    "a file and parts with index": (
        edits(keep_file, index({UP: SHARDS[0], HEAD: SHARDS[1]})), ["model.safetensors", SHARDS[0]],
    ),
    "two files": (other("model-old.safetensors"), ["model.safetensors", "model-old.safetensors"]),
    "two builds in parts": (
        edits(in_shards, other("model-00001-of-00001.safetensors")),
        [SHARDS[0], "model-00001-of-00001.safetensors"],
    ),
    "a missing part": (edits(in_shards, lost(SHARDS[1])), [f"lacks {SHARDS[1]};"]),
    "a missing part of the index": (
        edits(in_shards, lost(SHARDS[0]), index({UP: SHARDS[0], HEAD: SHARDS[1]})),
        [f"lacks {SHARDS[0]} (named by {INDEX})"],
    ),
    "a missing part beside an adapter": (
        edits(in_shards, lost(SHARDS[1]), other("adapter_model.safetensors")),
        [f"lacks {SHARDS[1]}"],
    ),
    "a missing part beside another file": (
        edits(in_shards, lost(SHARDS[1]), other("model-visual.safetensors", "visual.a")),
        [f"lacks {SHARDS[1]}"],
    ),
    "a missing tensor": (edit_weights(lambda w: w.pop(UP)), ["lacks", UP]),
    "only an adapter": (
        edits(lost("model.safetensors"), other("adapter_model.safetensors")),
        ["holds an adapter", "merge"],
    ),
    "an index that leads away": (index({UP: "../model.safetensors"}), ["outside its folder"]),
    "4 bits": (
        damage(lambda w: w.update({UP: mx.zeros((512, 1), mx.uint8)})), ["'bitsandbytes'", "uint8"],
    ),
    "8 bits": (damage(lambda w: w.update({UP: w[UP].astype(mx.int8)})), ["'bitsandbytes'", "int8"]),
    "scales": (damage(lambda w: w.update({UP + ".absmax": mx.ones(4)})), ["'bitsandbytes'"]),
    "weights in LFS": (edit_file("model.safetensors", lambda _: POINTER), ["git lfs pull"]),
    "weights as page": (edit_file("model.safetensors", lambda _: PAGE), ["web page", "download"]),
    "part in LFS": (edits(in_shards, edit_file(SHARDS[1], lambda _: POINTER)), [SHARDS[1], "lfs"]),
    **{
        f"{name} in LFS": (edit_file(name, lambda _: POINTER), [name, "git lfs pull"])
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt")
    },
    "tokenizer as page": (edit_file("tokenizer.json", lambda _: PAGE), ["izer.json is a web page"]),
    "config as page": (edit_file("config.json", lambda _: PAGE), ["config.json", "web page"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_load_convert_and_info_refuse_the_same(folder: Path, name: str) -> None:
    change, words = REFUSED[name]
    change(folder)
    for line in refusals(folder):
        for word in words:
            assert word in line
