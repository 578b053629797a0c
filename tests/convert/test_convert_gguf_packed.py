"""Blocks that stay packed: to the bit where MLX has their form, near it where it has not."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from gguf_architectures import gguf_like, made
from gguf_files import GOLDEN, gguf_of, random_blocks, run, weights_of, write
from mlx_lm.utils import load_model as load_mlx_lm
from tiny_models import Runner, build, tokens_of
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.convert import convert
from mlx_redrafter.hub.gguf.blocks import BLOCKS
from mlx_redrafter.hub.gguf.packed import ALL, KEPT, repack
from mlx_redrafter.models import SUPPORTED, load_model

SAME = [kind for kind, form in ALL.items() if form.same]
NATIVE = ("Q4_0", "Q4_1", "Q8_0")  # what mx.load reads


def values_of(parts, form):
    """What MLX reads from its arrays."""
    biases = parts.get("biases")
    values = mx.dequantize(parts["weight"], parts["scales"], biases, 32, form.bits, form.mode)
    return np.array(values.astype(mx.float32))


@pytest.mark.parametrize("kind", SAME)
def test_blocks_lose_nothing(kind):
    parts = repack(kind, GOLDEN[f"{kind}.data"], mx.float32)
    if KEPT.get(kind):  # with 16 bits either
        halves = repack(kind, GOLDEN[f"{kind}.data"], mx.float16)
        for name, value in parts.items():
            assert mx.array_equal(halves[name].astype(value.dtype), value)
    found = values_of(parts, ALL[kind])
    assert np.array_equal(found, GOLDEN[f"{kind}.values"])


@pytest.mark.parametrize("kind", NATIVE)
def test_blocks_are_those_that_mlx_makes_of_a_file(tmp_path, kind):
    data = GOLDEN[f"{kind}.data"]
    columns = data.shape[1] // BLOCKS[kind].bytes * 32
    write(tmp_path / "x.gguf", {}, {"x.weight": (kind, (2, columns), data.tobytes())})
    native = mx.load(str(tmp_path / "x.gguf"))
    for name, part in repack(kind, data, mx.float16).items():
        assert part.dtype == native[f"x.{name}"].dtype
        assert mx.array_equal(part, native[f"x.{name}"])


@pytest.mark.parametrize("kind", ALL.keys() - set(SAME))
def test_others_come_to_the_nearest_level(kind):
    form, expected = ALL[kind], GOLDEN[f"{kind}.values"].reshape(-1, 32)
    found = values_of(repack(kind, GOLDEN[f"{kind}.data"], mx.float32), form).reshape(-1, 32)
    steps = np.ptp(expected, axis=1) / (2**form.bits - 1)
    error = np.abs(found - expected).max(1)
    # Half a step; mx.quantize may lose one more at an end, to hold zero.
    assert (error <= steps).all() and error.max() > 0
    assert np.median(error / steps) < 0.6


MIX = {"attn_v": "Q6_K", "ffn_down": "Q5_K", "ffn_up": "Q5_0", "attn_output": "Q3_K"}


def mixed(tmp_path, case="llama", **more):
    """As llama.cpp's mixes: K-quants of several types in one layer."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = build(folder, case, hidden_size=256, intermediate_size=256, **more)
    changed = {}
    for layer in range(config["num_hidden_layers"]):
        for short, kind in MIX.items():
            rows = 128 if short == "attn_v" else 256
            data = random_blocks(kind, rows * 256)
            changed[f"blk.{layer}.{short}.weight"] = (kind, (rows, 256), data)
    return gguf_of(tmp_path / "x.gguf", folder, "Q4_K", **changed)


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_a_mix_in_32_bits_is_the_file_to_the_bit(tmp_path, case):
    path = mixed(tmp_path, case)
    run(path, tmp_path / "kept", keep=True, dtype=mx.float32)
    run(path, tmp_path / "full", dtype=mx.float32)
    packed, plain = weights_of(tmp_path / "kept"), weights_of(tmp_path / "full")
    block = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization"]
    assert (block["bits"], block["group_size"]) == (4, 32)
    module = load_mlx_lm(tmp_path / "kept")[0]
    same = 0
    for name, layer in module.named_modules():
        if not hasattr(layer, "scales"):
            continue
        given = block.get(name, block)
        assert (layer.bits, layer.group_size) == (given["bits"], 32)
        assert mx.array_equal(layer.weight, packed[f"{name}.weight"])
        value = mx.dequantize(layer.weight, layer.scales, layer.biases, 32, layer.bits)
        if not name.endswith(("v_proj", "o_proj")):
            assert mx.array_equal(value, plain[f"{name}.weight"]), name
            same += 1
    assert same == 2 * 5 + 1
    assert block["model.layers.0.self_attn.v_proj"]["bits"] == 8
    tokens = tokens_of(6)
    ours = Runner(load_model(tmp_path / "kept"))(tokens)
    theirs = module(tokens[None])[0]
    assert mx.abs(ours - theirs).max() <= 1e-3 * mx.abs(theirs).max()


def test_scales_have_16_bits_unless_32_are_asked_for(tmp_path):
    summary = convert(mixed(tmp_path), tmp_path / "out", keep_quantization=True)
    found = weights_of(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {mx.uint32, mx.float16}
    assert summary.notes[0].startswith("scales of Q4_K, Q5_K are rounded to float16; --dtype")
    assert "Q3_K -> 5 bits, Q6_K -> 8 bits in groups of 32" in summary.notes[1]
    run(tmp_path / "x.gguf", tmp_path / "exact", keep=True, dtype=mx.float32)
    exact = weights_of(tmp_path / "exact")
    name = "model.layers.0.self_attn.q_proj"
    assert exact[f"{name}.scales"].dtype == mx.float32
    assert not mx.array_equal(exact[f"{name}.scales"], found[f"{name}.scales"])
    assert mx.allclose(exact[f"{name}.scales"], found[f"{name}.scales"], 1e-3, 1e-7)
    notes = {m.source: m.note for m in summary.mapping}
    assert notes["blk.0.attn_q.weight"] == "Q4_K, 4 bits in MLX, rows back in rotary order"


@pytest.mark.parametrize("case", ["gpt_oss", "qwen3_moe", "deepseek_v3", "qwen3_5_moe"])
def test_experts_stay_packed(tmp_path, case):
    """Stacks of them, also of 4-bit floats; the router is plain."""
    kind = "MXFP4" if case == "gpt_oss" else "Q8_0"
    sizes = {"kv_lora_rank": 32, "q_lora_rank": 32}
    sizes |= {"qk_nope_head_dim": 32, "v_head_dim": 16} if case == "deepseek_v3" else {}
    folder = made(tmp_path, case, **sizes)
    router = ("Q8_0", (8, 64), random_blocks("Q8_0", 8 * 64))
    more = {"blk.0.ffn_gate_inp.weight": router} if case == "qwen3_moe" else {}
    path = gguf_like(tmp_path / "x.gguf", folder, case, kind, **more)
    run(path, tmp_path / "kept", keep=True, dtype=mx.float32)
    run(path, tmp_path / "full", dtype=mx.float32)
    run(path, tmp_path / "usual")  # these types stay packed without the option
    assert weights_of(tmp_path / "usual").keys() == weights_of(tmp_path / "kept").keys()
    block = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization"]
    assert block["bits"] == (4 if case == "gpt_oss" else 8)
    assert block.get("mode") == ("mxfp4" if case == "gpt_oss" else None)
    stacked = "experts" if case == "gpt_oss" else "switch_mlp"
    found = weights_of(tmp_path / "kept")
    start = "language_model." if case == "qwen3_5_moe" else ""
    assert found[f"{start}model.layers.1.mlp.{stacked}.up_proj.weight"].ndim == 3
    routers = [name for name in found if "gate.scales" in name or "router.scales" in name]
    assert not routers
    tokens = tokens_of(6)
    full = load_mlx_lm(tmp_path / "full")[0](tokens[None])[0]
    found = [load_mlx_lm(tmp_path / "kept")[0](tokens[None])[0]]
    if case in SUPPORTED:
        found.append(Runner(load_model(tmp_path / "kept"))(tokens))
    for logits in found:
        assert mx.abs(logits - full).max() <= 1e-4 * mx.abs(full).max()


@pytest.mark.parametrize("case", ["cohere", "glm4", "gpt_oss", "qwen3_5"])
def test_quantised_anew(tmp_path, case):
    """As mlx_lm.convert does it, in its names, whoever runs the type."""
    run(gguf_like(tmp_path / "x.gguf", made(tmp_path, case), case), tmp_path / "out",
        bits=4, group_size=32)  # fmt: skip
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (block["bits"], block["group_size"]) == (4, 32)
    module = load_mlx_lm(tmp_path / "out")[0]
    assert any(name.endswith("o_proj") for name, m in module.named_modules() if hasattr(m, "bits"))


def test_the_option(tmp_path):
    path = mixed(tmp_path)
    arguments = ["convert", str(path), "-o", str(tmp_path / "out"), "--keep-quantization"]
    result = CliRunner().invoke(cli.app, [*arguments, "-q"])
    assert result.exit_code == 1 and "keeps a file's own bits; drop it, or -q" in result.stderr
    other = ["convert", str(tmp_path / "model"), *arguments[2:]]
    result = CliRunner().invoke(cli.app, other)
    assert result.exit_code == 1 and "for GGUF files, and this is a base model" in result.stderr
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert (tmp_path / "out" / "config.json").exists()
