"""Model folders: quantised, Hugging Face's layouts, dtypes, and everything that can be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from edits import PAGE, POINTER, Edit, edit_config, edit_file, edit_weights, edits
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from tiny_models import C, Runner, assert_close, build, save, tokens_of

from mlx_redrafter.cache.layer import Pass, new_caches
from mlx_redrafter.errors import ModelError
from mlx_redrafter.models import load_model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
def test_head_rows_are_the_rows_of_the_head(tmp_path: Path, tied: bool, bits: int | None) -> None:
    build(tmp_path, "llama", tie_word_embeddings=tied)
    if bits:
        quantise(tmp_path, bits=bits)
    model = load_model(tmp_path)
    hidden, ids = mx.random.normal((3, 64)), mx.array([5, 96, 0, 5])
    assert_close(hidden @ model.head_rows(ids).T, model.logits(hidden)[:, ids], 1e-4)


def quantise(folder: Path, predicate: Any = None, bits: int = 4, **more: Any) -> None:
    model, config = mlx_lm_utils.load_model(folder)
    model, config = mlx_lm_utils.quantize_model(
        model, config, more.pop("group_size", 32), bits, quant_predicate=predicate, **more
    )
    config["quantization_config"] = config["quantization"]
    save(folder, config, dict(tree_flatten(model.parameters())))


def mixed(path: str, module: Any) -> bool | dict[str, Any]:
    """Like mlx-lm's mixed_3_6 recipe, with one layer left dense."""
    if "v_proj" in path or "down_proj" in path:
        return {"group_size": 32, "bits": 6, "mode": "affine"}
    return "layers.1.mlp.up_proj" not in path


@pytest.mark.parametrize("name", ["llama-untied-biases", "gemma3", "phi3", "qwen3"])
@pytest.mark.parametrize("predicate", [None, mixed])
def test_quantised_models_equal_mlx_lm(tmp_path: Path, name: str, predicate: Any) -> None:
    build(tmp_path, name)
    quantise(tmp_path, predicate)
    check_against_mlx_lm(tmp_path, 1e-4)
    attention, mlp = (
        getattr(load_model(tmp_path).model.layers[1], n) for n in ("self_attn", "mlp")
    )
    assert ("qkv_proj" in attention) == (predicate is None or name == "phi3")
    assert ("gate_up_proj" in mlp) == (predicate is None or name == "phi3")


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32)])
def test_float_quantisation_modes(tmp_path: Path, mode: str, bits: int, group_size: int) -> None:
    build(tmp_path, "llama")
    quantise(tmp_path, bits=bits, group_size=group_size, mode=mode)
    check_against_mlx_lm(tmp_path, 0.05)  # mlx-lm's embedding is bfloat16 here, ours float32


def check_against_mlx_lm(folder: Path, tolerance: float) -> None:
    reference, _ = mlx_lm_utils.load_model(folder)
    prompt = tokens_of(20)
    assert_close(Runner(load_model(folder))(prompt), reference(prompt[None])[0], tolerance)


def test_dtype_policy(tmp_path: Path) -> None:
    build(tmp_path, "gemma2", mx.bfloat16)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    assert load_model(tmp_path).dtype == (mx.float32 if on_cpu else mx.bfloat16)
    for dtype in (mx.float16, mx.bfloat16):
        model = load_model(tmp_path, dtype)
        assert {v.dtype for _, v in tree_flatten(model.parameters())} == {model.dtype} == {dtype}
        run = Pass(new_caches(model.caches, C, dtype), mx.array([0]))
        mask = mx.ones((3, C), mx.bool_)
        hidden, _ = model(tokens_of(3), mx.arange(3), mask, mx.arange(C), run)
        assert hidden.dtype == model.logits(hidden).dtype == run.caches[0].dtype == dtype


def test_hugging_face_layouts(tmp_path: Path) -> None:
    """Shards with an index, rope_parameters, rotary buffers, a stored copy of a tied head."""
    config = build(tmp_path, "llama", rope_theta=5e4)
    expected = Runner(load_model(tmp_path))(tokens_of(9))
    weights = mx.load(str(tmp_path / "model.safetensors"))
    mx.eval(weights)
    (tmp_path / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros(8)
    index = {}
    for number, name in enumerate(sorted(weights)):
        index[name] = f"model-{number % 2}.safetensors"
    for shard in set(index.values()):
        part = {name: weights[name] for name in weights if index[name] == shard}
        mx.save_safetensors(str(tmp_path / shard), part)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_close(Runner(load_model(tmp_path))(tokens_of(9)), expected, 0.0)


def test_gemma3_weights_named_as_transformers_5_does(tmp_path: Path) -> None:
    config = build(tmp_path, "gemma3")
    expected = Runner(load_model(tmp_path))(tokens_of(9))
    weights = mx.load(str(tmp_path / "model.safetensors"))
    renamed = {
        name.replace("language_model.model.", "model.language_model."): value + 0
        for name, value in weights.items()
    }
    renamed["model.vision_tower.patch.weight"] = mx.zeros((2, 2))
    mx.eval(renamed)
    save(tmp_path, config, renamed)
    assert_close(Runner(load_model(tmp_path))(tokens_of(9)), expected, 0.0)


def test_loading_needs_little_more_memory_than_the_model(tmp_path: Path) -> None:
    config = build(tmp_path, "llama", num_hidden_layers=12, hidden_size=256)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(tmp_path)
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    assert size > 10 * config["hidden_size"] ** 2
    assert mx.get_peak_memory() - before < 1.3 * size


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
SCALES, QWEIGHT = UP.replace("weight", "scales"), UP.replace("weight", "qweight")
PACKED = mx.zeros((96, 8), mx.uint32)
INDEX = b'{"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}'
BROKEN: dict[str, tuple[Edit, list[str]]] = {
    "no config": (edit_file("config.json", lambda b: None), ["config.json"]),
    "config not JSON": (edit_file("config.json", lambda b: b[:9]), ["config.json", "JSON"]),
    "config a list": (edit_file("config.json", lambda b: b"[1]"), ["list", "object"]),
    "no weights": (edit_file("model.safetensors", lambda b: None), ["*.safetensors"]),
    "type": (edit_config(model_type="lamma"), ["'lamma'", "nearest: ", "llama"]),
    "no type": (edit_config(model_type=None), ["'None'", "llama"]),
    "key": (edit_config(hidden_size=None), ["hidden_size"]),
    "value": (edit_config(num_hidden_layers="many"), ["wrong kind", "many"]),
    "too many layers": (edit_config(num_hidden_layers=10**12), ["num_hidden_layers", "10000"]),
    "too wide": (edit_config(hidden_size=1e300), ["hidden_size", "268435456 or less"]),
    "epsilon": (edit_config(rms_norm_eps=0), ["norm_eps = 0", "more than 0"]),
    "epsilon without end": (edit_config(rms_norm_eps=math.inf), ["norm_eps = inf"]),
    "deep config": (edit_file("config.json", lambda b: b"[" * 10**5), ["not readable as JSON"]),
    "heads": (edit_config(num_attention_heads=5), ["64", "5"]),
    "kv heads": (edit_config(num_key_value_heads=3), ["4", "3", "multiple"]),
    "layer types": (edit_config(layer_types=["full_attention"]), ["1 layers", "2 layers"]),
    "rope": (edit_config(rope_scaling={"type": "wavy"}), ["'wavy'", "llama3", "yarn"]),
    "rope factor": (edit_config(rope_scaling={"type": "yarn"}), ["'yarn'", "factor"]),
    "shard": (edit_file("model.safetensors.index.json", lambda b: INDEX), ["model-1.safetensors"]),
    "weights in LFS": (edit_file("model.safetensors", lambda b: POINTER), ["git lfs pull"]),
    "config in LFS": (edit_file("config.json", lambda b: POINTER), ["json is a Git LFS pointer"]),
    "a page": (edit_file("model.safetensors", lambda b: PAGE), ["tensors is a web page"]),
    "truncated": (edit_file("model.safetensors", lambda b: b[:-9]), ["truncated"]),
    "corrupt": (edit_file("model.safetensors", lambda b: b"\xff" * 99), ["not a safetensors"]),
    "empty": (edit_file("model.safetensors", lambda b: b""), ["not a safetensors"]),
    "missing": (edit_weights(lambda w: w.pop(NORM)), ["lacks", NORM]),
    "left over": (edit_weights(lambda w: w.update(extra=mx.zeros(2))), ["unknown", "extra"]),
    "shape": (edit_weights(lambda w: w.update({UP: mx.zeros((95, 64))})), [UP, "(95, 64)"]),
    "nan": (edit_weights(lambda w: w.update({UP: w[UP] * mx.nan})), ["NaN", UP]),
    "infinity": (edit_weights(lambda w: w.update({NORM: w[NORM] / 0})), ["NaN or inf", NORM]),
    "awq": (
        edits(
            edit_weights(lambda w: w.update({QWEIGHT: mx.zeros((64, 12), mx.int32)})),
            edit_config(quantization_config={"quant_method": "awq", "bits": 4, "group_size": 64}),
        ),
        ["'awq'", QWEIGHT, "mlx_lm.convert"],
    ),
    "integers": (
        edit_weights(lambda w: w.update({UP: mx.zeros((96, 64), mx.int8)})),
        ["quantised by another program", UP, "int8"],
    ),
    "mode": (
        edit_weights(lambda w: w.update({UP: PACKED, SCALES: mx.zeros((96, 1), mx.uint8)})),
        ["quantised weights", "unknown"],
    ),
    "groups": (
        edit_weights(lambda w: w.update({UP: PACKED, SCALES: mx.zeros((96, 0))})),
        ["quantised weights", "zero"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_folder_is_one_line(tmp_path: Path, name: str) -> None:
    build(tmp_path, "llama", tie_word_embeddings=False)
    load_model(tmp_path)
    change, words = BROKEN[name]
    change(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        load_model(tmp_path / "nothing")
