"""Folders of types that only mlx_lm has: dtype, quantisation, sizes, and what can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from adapter_cases import write_module
from conftest import engine_of, prompt_of, run
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.errors import ModelError
from mlx_redrafter.models import AdaptedModel, config_of, load_model


def greedy(module: object, prompt: list[int], n: int) -> list[int]:
    """What mlx_lm's module says."""
    cache, tokens, out = make_prompt_cache(module), mx.array([prompt]), []
    for _ in range(n):
        tokens = mx.argmax(module(tokens, cache=cache)[:, -1], axis=-1)[None]  # type: ignore[operator]
        out.append(int(tokens.item()))
    return out


def test_a_type_that_we_do_not_have_is_loaded_in_float32(tmp_path: Path) -> None:
    raw = write_module(tmp_path, "dots1", mx.bfloat16)
    model, prompt = load_model(tmp_path), prompt_of(12)
    assert isinstance(model, AdaptedModel)
    assert model.dtype == mx.float32
    assert load_model(tmp_path, mx.bfloat16).dtype == mx.bfloat16
    assert config_of(raw) == model.config
    module, _ = mlx_lm_utils.load_model(tmp_path)
    module.set_dtype(mx.float32)
    assert run(engine_of(model, None, compiled=False), prompt, None, None, 12) == greedy(
        module, prompt, 12
    )


def test_quantised(tmp_path: Path) -> None:
    write_module(tmp_path, "dots1")
    module, config = mlx_lm_utils.load_model(tmp_path)
    module, config = mlx_lm_utils.quantize_model(module, config, group_size=32, bits=4)
    mlx_lm_utils.save_model(tmp_path, module)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, prompt = load_model(tmp_path), prompt_of(12)
    said = run(engine_of(model, None, compiled=False), prompt, None, None, 12)
    assert said == greedy(module, prompt, 12)
    ids, hidden = mx.array([3, 9]), mx.random.normal((2, model.config.hidden_size))
    rows = hidden @ model.head_rows(ids).T
    assert np.allclose(np.array(rows), np.array(model.logits(hidden)[:, ids]), atol=1e-4)


def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path) -> None:
    raw = write_module(tmp_path, "dots1")
    file = tmp_path / "model.safetensors"
    weights = mx.load(str(file))
    name = "model.layers.1.self_attn.q_proj.weight"

    def refused(*words: str) -> None:
        with pytest.raises(ModelError) as caught:
            load_model(tmp_path)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in words), message

    mx.save_safetensors(str(file), {n: w for n, w in weights.items() if n != name})
    refused("mlx-lm cannot load", name)
    mx.save_safetensors(str(file), {**weights, name: weights[name] * mx.nan})
    refused("NaN", "layers.1.self_attn.q_proj.weight")
    mx.save_safetensors(str(file), weights)
    (tmp_path / "config.json").write_text(json.dumps({**raw, "num_attention_heads": "many"}))
    refused("mlx-lm cannot load", "dots1")
