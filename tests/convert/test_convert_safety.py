"""What is wrong with a checkpoint is one line, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tiny_drafters as tiny
from tiny_drafters import apple_config, apple_weights, refused, write, write_sharded

from mlx_redrafter.convert import convert
from mlx_redrafter.convert.checkpoint import open_checkpoint

FULL = "elman-6-2"
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", apple_weights(FULL), apple_config(FULL))


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def bare_pickle(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def zipped_pickle(path: Path, content: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.safetensors"])
@pytest.mark.parametrize("pack", [bare_pickle, zipped_pickle])
def test_a_malicious_pickle(pack: Callable[[Path, Any], None], file: str, tmp_path: Path) -> None:
    mark, home = tmp_path / "mark", tmp_path / "source"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(apple_config(FULL)))
    pack(home / file, {"rnn_u.weight": Evil(mark)})
    pickle.loads(pickle.dumps(Evil(mark)))  # the trap works
    assert mark.exists()
    mark.unlink()
    line = refused(home)
    assert not mark.exists()
    if not HAS_TORCH:
        assert "PyTorch is not installed" in line
    elif file.endswith(".safetensors"):
        assert line == f"{home / file} is refused: it is a pickle under the name of safetensors"
    else:
        assert line == (
            f"{home / file} is refused: unpickling it would call {os.system.__module__}.system, "
            "which could run code; nothing was run: take the safetensors version of the model"
        )


def test_without_torch_a_pickle_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    home = tmp_path / "source"
    home.mkdir()
    zipped_pickle(home / "model.pt", {})
    assert refused(home) == (
        f"{home / 'model.pt'} is a PyTorch pickle, and PyTorch is not installed: "
        "pip install 'mlx-redrafter[torch]', or take the safetensors version of the model"
    )


def sharded(tmp_path: Path) -> tuple[Path, list[Path]]:
    folder = tmp_path / "source"
    return folder, write_sharded(folder, apple_weights(FULL), apple_config(FULL))


def test_shards_are_read(tmp_path: Path) -> None:
    folder, files = sharded(tmp_path)
    assert open_checkpoint(folder).files == files
    convert(folder, tmp_path / "out")
    tiny.assert_same_bits(tiny.read(tmp_path / "out"), apple_weights(FULL))
    (folder / "model.safetensors.index.json").unlink()
    convert(folder, tmp_path / "again")
    tiny.assert_same_bits(tiny.read(tmp_path / "again"), apple_weights(FULL))


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_shard(keep: int, tmp_path: Path) -> None:
    folder, files = sharded(tmp_path)
    files[1].write_bytes(files[1].read_bytes()[:keep])
    line = refused(folder)
    assert line.startswith(f"{files[1]} is truncated" if keep == -1 else f"{files[1]} is not a")


def test_a_truncated_pickle(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    home = tmp_path / "source"
    home.mkdir()
    for old in (False, True):
        state = tiny.torch_state(apple_weights(FULL))
        torch.save(state, home / "model.pt", _use_new_zipfile_serialization=not old)
        data = (home / "model.pt").read_bytes()
        (home / "model.pt").write_bytes(data[: len(data) // 2])
        assert refused(home).startswith(f"{home / 'model.pt'} is truncated or not a file of torch")


def test_a_missing_shard(tmp_path: Path) -> None:
    folder, files = sharded(tmp_path)
    files[2].unlink()
    missing = "model-00003-of-00003.safetensors"
    assert refused(folder).startswith(f"{folder} lacks {missing} (named by model.safetensors.index")
    (folder / "model.safetensors.index.json").unlink()
    assert refused(folder) == f"{folder} lacks {missing}; download the missing files"


def test_a_shard_that_lacks_a_tensor(tmp_path: Path) -> None:
    folder, files = sharded(tmp_path)
    content = mx.load(str(files[0]))
    assert isinstance(content, dict)
    name = next(iter(content))
    mx.save_safetensors(str(files[0]), {k: v for k, v in content.items() if k != name})
    assert refused(folder).startswith(f"{folder} lacks {name}, which a drafter of its config")


def test_several_gguf_files_are_two_models(tmp_path: Path) -> None:
    for name in ("model.gguf", "model-q4_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF" + bytes(60))
    assert "holds 2 files of weights (model-q4_0.gguf, model.gguf); give one" in refused(tmp_path)


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    folder, files = sharded(tmp_path)
    files[2].write_bytes(files[0].read_bytes())
    (folder / "model.safetensors.index.json").unlink()
    assert "is in both model-00001-of-00003.safetensors and model-00003" in refused(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../x", "..\\x"])
def test_an_index_that_points_outside_the_folder(name: str, tmp_path: Path) -> None:
    folder, _ = sharded(tmp_path)
    write(tmp_path, apple_weights(FULL))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.2.weight"] = name
    index.write_text(json.dumps(content))
    assert refused(folder) == f"{index} is refused: it points outside its folder, to {name}"


def test_a_header_that_lies(source: Path) -> None:
    file = source / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"shape":[11,6]', b'"shape":[99,6]'))
    assert "the header's entry of lm_head.2.weight makes no sense" in refused(source)


@pytest.mark.parametrize("length", [0x0280, 0x4B50])
def test_a_header_length_that_reads_as_the_mark_of_a_pickle(length: int, tmp_path: Path) -> None:
    """It happened: 0x80 begins a pickle, PK a zip archive, and both are possible lengths."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + text.ljust(length) + bytes(4))
    assert open_checkpoint(tmp_path).names() == ["a"]


def changed(source: Path, change: Callable[[tiny.Weights], None]) -> str:
    weights = apple_weights(FULL)
    change(weights)
    write(source, weights, apple_config(FULL))
    return refused(source)


SHOWN = "hidden size 4, exit_dim 6, vocabulary 11, 2 residual blocks, cell elman"


def test_a_left_over_tensor(source: Path) -> None:
    line = changed(source, lambda w: w.update({"rnn_v.weight": mx.zeros((2, 2))}))
    assert line == (
        f"{source} has tensors that no ReDrafter of its configuration has: rnn_v.weight ({SHOWN})"
    )


def test_a_missing_tensor(source: Path) -> None:
    line = changed(source, lambda w: (w.pop("rnn_u.bias"), w.pop("lm_head.0.linear.weight"))[0])
    assert line.startswith(f"{source} lacks lm_head.0.linear.weight, rnn_u.bias, which a drafter")
    line = changed(source, lambda w: w.pop("lm_head.2.weight"))
    assert line == f"{source} lacks lm_head.N.weight, the output matrix"


def test_a_wrong_shape(source: Path) -> None:
    line = changed(source, lambda w: w.update({"rnn_w.weight": mx.zeros((4, 3))}))
    assert line == f"wrong shapes in {source}: rnn_w.weight (4, 3) instead of (4, 4) ({SHOWN})"
    write(source, apple_weights(FULL), apple_config(FULL, hidden_size=5))
    assert "input_proj.weight (6, 8) instead of (6, 10)" in refused(source)
    write(source, apple_weights(FULL), apple_config(FULL, rnn=False))
    assert "has tensors that no ReDrafter of its configuration has: rnn_u.bias" in refused(source)


def test_two_names_of_one_tensor(source: Path) -> None:
    line = changed(source, lambda w: w.update({"lm_heads.2.weight": w["lm_head.2.weight"]}))
    assert "holds lm_head.2.weight and lm_heads.2.weight, two names of one tensor" in line


def test_a_type_that_mlx_does_not_have(source: Path) -> None:
    file = source / "model.safetensors"
    header = {"lm_head.0.weight": {"dtype": "F8_E4M3", "shape": [11, 8], "data_offsets": [0, 88]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(88))
    (source / "config.json").write_text(json.dumps(apple_config("sum-8-0")))
    assert "is of type F8_E4M3, which MLX cannot read" in refused(source)


ONE = mx.zeros((2, 2))
LOOK_ALIKES = {
    "gru": (
        ["token_embed.weight", "gru.weight_ih_l0", "layer_norm.weight", "input_proj.weight"],
        {},
        "is not a ReDrafter but a GRU drafter with an embedding of its own",
    ),
    "gru-inside": (["model.gru.weight_ih_l0", "lm_head.0.weight"], {}, "a GRU drafter"),
    "hydra": (["hydra_mlp.0.0.linear.weight"], {}, "a set of Hydra heads"),
    "block": (
        ["fc.weight", "hidden_norm.weight", "layers.0.mlp.up_proj.weight"],
        {"model_type": "qwen3"},
        "lacks the tensors of a block drafter",
    ),
    "engine": (
        ["drafter.layers.0.linear.weight", "drafter.lm_head.weight"],
        {},
        "a checkpoint that TensorRT-LLM made for its own engine",
    ),
    "bert": (
        ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.output.dense.weight"],
        {"model_type": "bert", "hidden_size": 2, "vocab_size": 2},
        "is in no format that is read here: model_type bert",
    ),
    "nothing": (["weights"], {}, "is in no format that is read here: model_type (none)"),
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alikes_are_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    names, config, reason = LOOK_ALIKES[case]
    folder = write(tmp_path / "redrafter_final", dict.fromkeys(names, ONE), config)
    assert reason in refused(folder)


def test_a_look_alike_does_not_pass_as_a_declared_format(tmp_path: Path) -> None:
    names, config, _ = LOOK_ALIKES["gru"]
    folder = write(tmp_path / "source", dict.fromkeys(names, ONE), config)
    assert refused(folder, "--format", "apple").endswith(
        "lacks lm_head.N.weight, the output matrix"
    )
