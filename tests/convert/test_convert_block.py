"""Block drafters of every dialect become folders that load as the same drafter."""

from __future__ import annotations

import json
from pathlib import Path

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import tiny_drafters as tiny
from conftest import V
from tiny_block import DIALECTS, loaded
from tiny_heads import write

from mlx_redrafter.convert import convert
from mlx_redrafter.drafters import block_files
from mlx_redrafter.drafters.block import Block
from mlx_redrafter.drafters.loading import load_drafter
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.models import Decoder
from mlx_redrafter.models.weights import parameters, read_json


def again(folder: Path, target: Decoder) -> Block:
    drafter = load_drafter(folder, target)
    assert isinstance(drafter, Block)
    return drafter


@pytest.mark.parametrize("name", DIALECTS)
def test_what_is_written_is_the_same_drafter(
    target: Decoder, target_folder: Path, tmp_path: Path, name: str
) -> None:
    case, source, out = DIALECTS[name], tmp_path / "source", tmp_path / "out"
    first = loaded(source, case, target)
    summary = convert(source, out, dtype="float32", target=target_folder)
    assert summary.format.value == "block"
    config, weights = read_json(out / "config.json"), tiny.read(out)
    assert config["model_type"] == "dflash" and "dflash_config" not in config
    assert ("lm_head.weight" in weights) == ("lm_head.weight" in case.plain)
    dropped = ("embed", "confidence", "t2d", "verifier", "markov", "prefix_gru", "draft_vocab")
    assert not any(part in key for key in weights for part in dropped)
    second = again(out, target)
    assert first.config == second.config
    tiny.assert_same_bits(parameters(first), parameters(second))
    assert {row.source for row in summary.mapping} == case.weights.keys()
    assert block_files.alternatives(config) == block_files.alternatives(case.config)
    convert(out, tmp_path / "again", dtype="float32")
    tiny.assert_same_bits(tiny.read(tmp_path / "again"), weights)
    assert read_json(tmp_path / "again" / "config.json") == config


@pytest.mark.parametrize("name", ["z-lab", "speculators-dspark"])
def test_what_is_left_open_means_the_same(target: Decoder, tmp_path: Path, name: str) -> None:
    case, source, out = DIALECTS[name], tmp_path / "source", tmp_path / "out"
    convert(write(source, case.config, case.weights), out, dtype="float32")
    before, after = read_json(source / "config.json"), read_json(out / "config.json")
    for keys in block_files.alternatives(after):
        (source / "config.json").write_text(json.dumps(before | keys))
        (out / "config.json").write_text(json.dumps(after | keys))
        try:
            meant = again(source, target).config
        except DrafterError as error:  # this model lacks such a layer
            assert keys["feature_layers_are"] == "outputs" and "names layers" in str(error)
            continue
        assert again(out, target).config == meant


def test_packed(target: Decoder, tmp_path: Path) -> None:
    """What is 32 wide here; the rank and the inner layer are narrower."""
    case, out = DIALECTS["deepspec-dflash"], tmp_path / "out"
    weights = {n: w for n, w in case.weights.items() if "down_proj" not in n}
    rng = np.random.default_rng(3)
    weights |= {f"layers.{i}.mlp.{n}_proj.weight": rng.standard_normal(s).astype(np.float32)
                for i in range(2) for n, s in (("gate", (64, 32)), ("up", (64, 32)),
                                               ("down", (32, 64)))}  # fmt: skip
    weights |= {f"layers.{i}.self_attn.o_proj.weight": np.ones((32, 64), np.float32)
                for i in range(2)}  # fmt: skip
    for i in range(2):
        for n, rows in (("q", 64), ("k", 32), ("v", 32)):
            weights[f"layers.{i}.self_attn.{n}_proj.weight"] = np.ones((rows, 32), np.float32)
            if n != "v":
                weights[f"layers.{i}.self_attn.{n}_norm.weight"] = np.ones(16, np.float32)
    config = {**case.config, "head_dim": 16, "intermediate_size": 64}
    convert(write(tmp_path / "source", config, weights), out, bits=4, group_size=32)
    stored = tiny.read(out)
    assert stored["fc.weight"].dtype == mx.uint32 and stored["norm.weight"].ndim == 1
    assert again(out, target).config.layer.vocab_size == V


def test_a_vocabulary_that_its_file_contradicts(tmp_path: Path) -> None:
    case = DIALECTS["speculators-dspark"]
    wrong = {**case.weights, "t2d": ~case.weights["t2d"]}
    source = write(tmp_path / "source", case.config, wrong)
    with pytest.raises(DrafterError, match="t2d names 37 tokens"):
        convert(source, tmp_path / "out")
