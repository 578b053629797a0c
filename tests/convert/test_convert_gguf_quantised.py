"""`convert FILE.gguf -q`: quantised anew in one command, and as large as it says."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from gguf_files import gguf_of, random_blocks, run, weights_of
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_mlx_lm
from tiny_models import build
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.convert import convert
from mlx_redrafter.convert.mapping import size_text
from mlx_redrafter.models import load_model

MIXES = {
    "Q2_K": "Q6_K", "Q3_K": "Q5_K", "Q4_K": "Q6_K", "Q5_K": "Q6_K", "Q6_K": "Q8_0", "Q8_0": "F16",
    "Q4_0": "Q6_K", "Q4_1": "Q5_1", "Q5_0": "Q6_K",
}  # fmt: skip
ROWS = 256


def mix(tmp_path, kind, other=None, case="llama"):
    """A model of one type, one matrix of another, as llama.cpp's mixes are; norms stay F32."""
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder, case, hidden_size=ROWS, intermediate_size=ROWS)
    changed = {}
    if other is not None:
        data = random_blocks(other, ROWS * ROWS) if other != "F16" else b"\0\x3c" * ROWS * ROWS
        changed["blk.1.ffn_down.weight"] = (other, (ROWS, ROWS), data)
    return gguf_of(tmp_path / "x.gguf", folder, kind, **changed)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MIXES)
def test_usual_files_in_one_command(tmp_path, kind, bits):
    path = mix(tmp_path, kind, MIXES[kind])
    arguments = ["convert", str(path), "-o", str(tmp_path / "out"), "-q", "--q-bits", str(bits)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    # What it is said to weigh is what lies there, and 16-bit scales of 64 cost half a bit.
    files = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    assert f"wrote {tmp_path / 'out'}: {size_text(sum(files.values()))}\n" in result.stdout
    full = run(path, tmp_path / "full", dtype=mx.float16)
    plain = weights_of(tmp_path / "full")
    matrices = sum(value.size for value in plain.values() if value.ndim == 2)
    vectors = sum(value.size for value in plain.values() if value.ndim == 1)
    expected = matrices * (bits + 0.5) / 8 + 2 * vectors
    header = 8 + int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert files["model.safetensors"] - header == expected
    # To the bit what the dequantised model gives.
    found = weights_of(tmp_path / "out")
    assert {v.dtype for v in found.values()} == {mx.uint32, mx.float16}
    for row in full:
        if not row.target.endswith("norm.weight"):
            base = row.target.removesuffix(".weight")
            packed = mx.quantize(plain[row.target], 64, bits)
            for part, value in zip(("weight", "scales", "biases"), packed, strict=True):
                assert mx.array_equal(found[f"{base}.{part}"], value)
    model = load_mlx_lm(tmp_path / "out")[0]
    assert dict(tree_flatten(model.parameters())).keys() == found.keys()
    assert load_model(tmp_path / "out").config == load_model(tmp_path / "full").config


@pytest.mark.parametrize("case", ["llama-untied-biases", "qwen2"])
def test_biases_and_the_head(tmp_path, case):
    run(mix(tmp_path, "Q4_K", case=case), tmp_path / "out", bits=4, group_size=32)
    found = weights_of(tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (block["bits"], block["group_size"]) == (4, 32)
    assert found["model.layers.0.self_attn.q_proj.bias"].dtype == mx.float16
    assert ("lm_head.scales" in found) == (case != "qwen2")
    load_mlx_lm(tmp_path / "out")
    load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("F32", None, mx.bfloat16),
        ("BF16", None, mx.bfloat16),
        ("F16", None, mx.float16),
        ("F32", "float16", mx.float16),
        ("F32", "float32", mx.float32),
    ],
)
def test_scales_have_16_bits_unless_more_are_asked_for(tmp_path, kind, dtype, expected):
    summary = convert(mix(tmp_path, kind), tmp_path / "out", bits=4, dtype=dtype)
    found = weights_of(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {mx.uint32, expected}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(expected).rpartition(".")[2]
    notes = {m.source: m.note for m in summary.mapping}
    assert notes["blk.0.ffn_up.weight"] == f"{kind}, 4 bits in MLX"
    assert notes["output_norm.weight"] == f"F32, {config['dtype']} in MLX"


def test_what_a_person_may_not_expect_is_noted(tmp_path):
    path = mix(tmp_path, "Q4_K", "Q4_0")
    grown = convert(path, tmp_path / "plain")
    found = weights_of(tmp_path / "plain")
    size = sum(v.nbytes for v in found.values() if v.ndim == 2 and v.dtype == mx.float16)
    size -= sum(v.nbytes for name, v in found.items() if name.endswith(("scales", "biases")))
    assert "no equal of Q4_K with scales of 16 bits: these tensors become" in grown.notes[0]
    assert f"become float16, {size_text(size)}; " in grown.notes[0]
    assert {m.source: m.note for m in grown.mapping}["blk.1.ffn_down.weight"] == (
        "Q4_0, 4 bits in MLX"
    )
    again = convert(path, tmp_path / "again", bits=4)
    assert again.notes[0].startswith("Q4_0, Q4_K tensors are quantised a second time; --keep")
    full = convert(path, tmp_path / "full", dtype="float32")
    assert {m.source: m.note for m in full.mapping}["blk.1.ffn_down.weight"] == (
        "Q4_0, float32 in MLX"
    )


def test_rows_that_no_group_fits_stay_as_they_are_or_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    build(folder, "qwen2", hidden_size=64, intermediate_size=96)
    path = gguf_of(tmp_path / "x.gguf", folder, "F32")
    summary = convert(path, tmp_path / "out", bits=4, group_size=64)
    assert summary.notes[0].startswith("2 matrices stay bfloat16: the length of their rows")
    found = weights_of(tmp_path / "out")
    assert found["model.layers.0.mlp.down_proj.weight"].dtype == mx.bfloat16
    load_model(tmp_path / "out")
    with pytest.raises(ValueError, match="so none can be quantised; choose another --q-group-size"):
        convert(path, tmp_path / "none", bits=4, group_size=128)


def test_an_index_counts_packed_weights_one_by_one(tmp_path, monkeypatch):
    path = mix(tmp_path, "Q4_K", "Q8_0")
    parameters = sum(
        m.shape[0] * (m.shape[1] if m.shape[1:] else 1) for m in run(path, tmp_path / "a")
    )
    monkeypatch.setattr(
        "mlx_redrafter.convert.writer.ShardWriter.__init__.__defaults__", (100_000, None)
    )
    for name, options in {"anew": {"bits": 4}, "kept": {}}.items():
        run(path, tmp_path / name, **options)
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        found = {}
        for file in (tmp_path / name).glob("*.safetensors"):
            found |= mx.load(str(file))
        assert index["metadata"] == {
            "total_size": sum(value.nbytes for value in found.values()),
            "total_parameters": parameters,
        }
