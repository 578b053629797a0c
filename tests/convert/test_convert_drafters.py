"""Drafters in every format: the numbers of PyTorch, the names, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_drafters as tiny
from tiny_drafters import apple_config, apple_weights, assert_same_bits, read, renamed, write

from mlx_redrafter.convert import convert, shards
from mlx_redrafter.drafters import beam
from mlx_redrafter.drafters.loading import load_drafter, save_drafter
from mlx_redrafter.drafters.recurrent import ReDrafter, ReDrafterConfig
from mlx_redrafter.errors import ConvertError, DrafterError, OptionError
from mlx_redrafter.tree.shape import TreeShape

VARIANTS = [
    f"{cell}-{width}-{blocks}"
    for cell in ("sum", "elman")
    for width in (8, 6)
    for blocks in range(4)
]
FULL = "elman-6-2"
TOLERANCE = 1e-5


def stand_in() -> Any:
    """What a drafter needs of its target: sizes and the golden embedding."""
    embed = mx.array(tiny.golden()["embed"].astype(np.float32))
    config = SimpleNamespace(hidden_size=tiny.D, vocab_size=tiny.V, num_layers=1)
    return SimpleNamespace(config=config, dtype=mx.float32, embed=lambda tokens: embed[tokens])


def searched(drafter: ReDrafter) -> tuple[np.ndarray, list[list[int]], np.ndarray]:
    """Our beam search on the golden input: logits of every step, beams best first, scores."""
    pool, rows = tiny.golden(), []
    step = drafter.step

    def recorded(*inputs: mx.array) -> tuple[mx.array, mx.array]:
        logits, state = step(*inputs)
        rows.append(np.array(logits))
        return logits, state

    drafter.step = recorded
    width, length = pool["beams"].shape[1:]
    shape = TreeShape(width, length - 1, width * (length - 1), "beams")  # the root is not counted
    context = mx.array(pool["context"].astype(np.float32))
    root = mx.array(pool["root"].astype(np.int32))
    last = beam.search(drafter, context, root, shape)[-1]
    beams = [path[:-1] for path in last.paths.tolist()]  # without the end
    return np.concatenate(rows), beams, -np.array(last.costs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_converted_drafter_computes_what_pytorch_does(variant: str, tmp_path: Path) -> None:
    source = write(tmp_path / "apple", apple_weights(variant), apple_config(variant))
    convert(source, tmp_path / "ours")
    logits, beams, scores = searched(load_drafter(tmp_path / "ours", stand_in()))
    pool = tiny.golden()
    at = pool["variants"].tolist().index(variant)
    assert np.abs(logits - pool["logits"][at]).max() < TOLERANCE
    assert beams == pool["beams"][at].tolist()
    assert np.abs(scores - pool["scores"][at]).max() < TOLERANCE


def test_the_parity_test_can_fail(tmp_path: Path) -> None:
    """The known mistakes: [s, h] for [h, s], and U for W."""
    pool = tiny.golden()
    at = pool["variants"].tolist().index(FULL)
    for mistake in ("order", "cell"):
        weights = apple_weights(FULL)
        if mistake == "order":
            w = weights["input_proj.weight"]
            weights["input_proj.weight"] = mx.concatenate([w[:, tiny.D :], w[:, : tiny.D]], axis=1)
        else:
            pair = weights["rnn_w.weight"], weights["rnn_u.weight"]
            weights["rnn_u.weight"], weights["rnn_w.weight"] = pair
        convert(write(tmp_path / mistake, weights, apple_config(FULL)), tmp_path / f"{mistake}-out")
        logits, _, _ = searched(load_drafter(tmp_path / f"{mistake}-out", stand_in()))
        assert np.abs(logits - pool["logits"][at]).max() > 0.1


def ours(folder: Path, variant: str, dtype: mx.Dtype) -> Path:
    """A drafter as our trainer would save it."""
    cell, width, blocks = tiny.parts(variant)
    drafter = ReDrafter(ReDrafterConfig(tiny.D, tiny.V, width, blocks, cell))
    drafter.load_weights(list(apple_weights(variant, dtype).items()))
    save_drafter(folder, drafter)
    return folder


@pytest.mark.parametrize("to", ["apple", "tensorrt-llm"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["sum-8-0", "elman-8-1", "sum-6-3", FULL])
def test_round_trips_are_bit_equal(variant: str, dtype: mx.Dtype, to: str, tmp_path: Path) -> None:
    source = ours(tmp_path / "ours", variant, dtype)
    away = convert(source, tmp_path / "away", to=to)
    back = convert(tmp_path / "away", tmp_path / "back")
    assert_same_bits(read(tmp_path / "away"), apple_weights(variant, dtype))
    assert_same_bits(read(tmp_path / "back"), read(source))
    configs = [json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back")]
    assert ReDrafterConfig.from_dict(configs[0]) == ReDrafterConfig.from_dict(configs[1])
    assert (away.format.value, back.format.value) == ("mlx", "apple")


def test_what_is_written_for_pytorch_is_what_apple_reads(tmp_path: Path) -> None:
    convert(ours(tmp_path / "ours", FULL, mx.bfloat16), tmp_path / "apple", to="apple")
    assert sorted(p.name for p in (tmp_path / "apple").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "apple" / "config.json").read_text())
    assert config == apple_config(FULL, torch_dtype="bfloat16")
    data = (tmp_path / "apple" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}  # transformers refuses others


@pytest.mark.parametrize("names", ["lm_head", "lm_heads", "0"])
@pytest.mark.parametrize("variant", ["sum-6-0", "elman-8-3", FULL])
def test_the_name_sets_of_tensorrt_llm(names: str, variant: str, tmp_path: Path) -> None:
    cell, width, blocks = tiny.parts(variant)
    config = {"hidden_size": tiny.D, "exit_dim": width, "num_draft_layers": blocks}
    config["rnn"] = cell == "elman"
    source = write(tmp_path / "trt", renamed(apple_weights(variant), names), config)
    summary = convert(source, tmp_path / "out")
    # The first of the three sets is Apple's own.
    assert summary.format.value == ("apple" if names == "lm_head" else "tensorrt-llm")
    assert_same_bits(read(tmp_path / "out"), apple_weights(variant))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_pickles_of_pytorch(file: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    state = tiny.torch_state(apple_weights(FULL, dtype))
    import torch

    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(apple_config(FULL)))
    torch.save({"step": 3}, source / "training_args.bin")
    for number, content in enumerate((state, {"epoch": 1, "model_state_dict": state})):
        torch.save(content, source / file)
        convert(source, tmp_path / f"out{number}")
        assert_same_bits(read(tmp_path / f"out{number}"), apple_weights(FULL, dtype))
    torch.save(state, source / file, _use_new_zipfile_serialization=False)
    convert(source / file, tmp_path / "out")
    assert_same_bits(read(tmp_path / "out"), apple_weights(FULL, dtype))


def test_large_tensors_of_a_mapped_file_are_copied_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(shards, "_PIECE", 5000)  # of whole pages something is let go
    mx.random.seed(2)
    weights = {
        "large": mx.random.normal((301, 77)),
        "half": mx.random.normal((301, 77)).astype(mx.bfloat16),
        "flags": mx.random.normal((9000,)) > 0,
        "small": mx.arange(7),
    }
    state = tiny.torch_state(weights)
    state["turned"] = state["large"].T
    state["tied"] = state["large"]
    torch.save(state, tmp_path / "model.pt")
    shard = shards.TorchShard(tmp_path / "model.pt")
    for _ in range(2):  # what was let go is there again
        found = {name: shard.load(name) for name in state}
        assert mx.array_equal(found.pop("turned").T, weights["large"])
        assert mx.array_equal(found.pop("tied"), weights["large"])
        assert_same_bits(found, weights)


def test_a_drafter_inside_its_base_model(tmp_path: Path) -> None:
    """ModelOpt: the block count of its configuration is another thing's; tensors are counted."""
    weights = renamed(apple_weights("elman-8-2"), "modelopt")
    weights |= {f"model.layers.{i}.mlp.up_proj.weight": mx.ones((3, 3)) for i in range(2)}
    nested = {"num_draft_layers": 1, "hidden_size": tiny.D, "exit_dim": 8, "rnn": True}
    config = {"model_type": "llama", "vocab_size": 64, "hidden_size": tiny.D, "redrafter": nested}
    summary = convert(write(tmp_path / "modelopt", weights, config), tmp_path / "out")
    assert summary.format.value == "modelopt"
    assert "config.json says 1 residual blocks, the tensors are 2" in summary.notes
    assert summary.mapping[-1] == ("2 other tensors", "", (), "left out: the base model's")
    assert_same_bits(read(tmp_path / "out"), apple_weights("elman-8-2"))


def test_sizes_come_from_the_tensors_when_nothing_says_them(tmp_path: Path) -> None:
    weights = {**apple_weights(FULL), "emb_norm.weight": mx.ones((tiny.D,))}
    source = write(tmp_path / "bare", weights)
    summary = convert(source / "model.safetensors", tmp_path / "out")
    assert ("emb_norm.weight", "", (tiny.D,), "dropped: never used") in summary.mapping
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ReDrafterConfig.from_dict(config) == ReDrafterConfig(tiny.D, tiny.V, 6, 2, "elman")


def test_a_declared_format_is_obeyed(tmp_path: Path) -> None:
    weights = renamed(apple_weights("sum-8-1"), "0")
    source = write(tmp_path / "bare", weights)
    with pytest.raises(ConvertError, match="cannot be told from a Medusa head"):
        convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "out", format="tensorrt-llm").size > 0
    assert_same_bits(read(tmp_path / "out"), apple_weights("sum-8-1"))


def test_the_target_must_fit(tmp_path: Path, target_folder: Path) -> None:
    source = write(tmp_path / "apple", apple_weights(FULL), apple_config(FULL))
    with pytest.raises(DrafterError, match="hidden size 4, but this model's is 32"):
        convert(source, tmp_path / "out", target=target_folder)
    config = json.loads((target_folder / "config.json").read_text())
    fitting = tmp_path / "target"
    fitting.mkdir()
    config |= {"hidden_size": tiny.D, "vocab_size": tiny.V, "num_attention_heads": 2}
    (fitting / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", target=fitting)
    with pytest.raises(OptionError, match="--target is for drafters"):
        convert(target_folder, tmp_path / "base", target=fitting, dry_run=True)


def large(folder: Path) -> Path:
    """Large enough for groups of 32."""
    mx.random.seed(1)
    drafter = ReDrafter(ReDrafterConfig(32, 48, 48, 1, "elman"))
    save_drafter(folder, drafter, {"target_model": "somebody/model"})
    return folder


def test_quantised_as_the_loader_reads_it(tmp_path: Path) -> None:
    source = large(tmp_path / "ours")
    convert(source, tmp_path / "q", bits=8, group_size=32)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 8}
    assert config["target_model"] == "somebody/model"
    weights = read(tmp_path / "q")
    assert weights["rnn_u.weight"].dtype == mx.uint32
    assert weights["rnn_u.scales"].dtype == weights["rnn_u.bias"].dtype == mx.bfloat16
    assert "lm_head.1.scales" not in weights  # 48 inputs are no whole groups
    values = SimpleNamespace(hidden_size=32, vocab_size=48, num_layers=1)
    embed = mx.zeros((48, 32))
    target: Any = SimpleNamespace(
        config=values, dtype=mx.float32, embed=lambda tokens: embed[tokens]
    )
    mine, theirs = (load_drafter(folder, target) for folder in (source, tmp_path / "q"))
    difference = mx.abs(mine.rnn_u.weight - theirs.rnn_u.weight).max()
    assert 0 < difference.item() < 0.01
    with pytest.raises(OptionError, match="quantised already"):
        convert(tmp_path / "q", tmp_path / "out", bits=4)
    with pytest.raises(ConvertError, match="its weights are quantised"):
        convert(tmp_path / "q", tmp_path / "out", to="apple")
    convert(tmp_path / "q", tmp_path / "copy")
    assert_same_bits(read(tmp_path / "copy"), weights)


def test_the_type_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "apple", apple_weights(FULL), apple_config(FULL))
    convert(source, tmp_path / "out", dtype="bfloat16")
    assert_same_bits(read(tmp_path / "out"), apple_weights(FULL, mx.bfloat16))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cell": "gru"}, "its cell is gru"),
        ({"context_layers": (0,)}, "it reads inner layers of the target"),
        ({"head": "target"}, "it has no output matrix of its own"),
        ({"draft_vocab_size": 5}, "its vocabulary is reduced to 5"),
    ],
)
def test_what_no_other_format_can_say(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    drafter = ReDrafter(ReDrafterConfig(tiny.D, tiny.V, 6, **changes))
    save_drafter(tmp_path / "ours", drafter)
    for to in ("apple", "tensorrt-llm"):
        with pytest.raises(ConvertError, match=reason):
            convert(tmp_path / "ours", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "ours", tmp_path / "out")
    assert_same_bits(read(tmp_path / "out"), read(tmp_path / "ours"))
