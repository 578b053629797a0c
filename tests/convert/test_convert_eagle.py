"""EAGLE heads of every dialect become folders that load as the same head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import fake_torch
import numpy as np
import pytest
import tiny_drafters as tiny
import tiny_eagle
from conftest import V, prompt_of, write_target
from eagle_calls import at_the_end, said
from tiny_eagle import DIALECTS, Head
from tiny_heads import IDS, noise, write
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.convert import card, convert
from mlx_redrafter.drafters import eagle_files
from mlx_redrafter.drafters.eagle import Eagle
from mlx_redrafter.drafters.loading import check_folder, load_drafter
from mlx_redrafter.errors import DrafterError, OptionError
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.models.weights import parameters, read_json

BLOCK = "midlayer.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("deep"), num_hidden_layers=tiny_eagle.LAYERS)


@pytest.fixture(scope="module")
def deep(folder: Path) -> Decoder:
    return load_model(folder)


def written(folder: Path, head: Head) -> Path:
    return write(folder, head.config, head.weights)


def heads(target: Decoder, *folders: Path) -> list[Eagle]:
    found = []
    for each in folders:
        check_folder(each, target)
        drafter = load_drafter(each, target)
        assert isinstance(drafter, Eagle)
        found.append(drafter)
    return found


def assert_same(first: Eagle, second: Eagle) -> None:
    assert first.config == second.config
    tiny.assert_same_bits(parameters(first), parameters(second))


@pytest.mark.parametrize("name", DIALECTS)
def test_what_is_written_is_the_same_head(
    deep: Decoder, folder: Path, tmp_path: Path, name: str
) -> None:
    head, out = DIALECTS[name], tmp_path / "out"
    source = written(tmp_path / "source", head)
    summary = convert(source, out, dtype="float32", target=folder)
    assert summary.format.value == "eagle"
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    config, weights = read_json(out / "config.json"), tiny.read(out)
    assert config["model_type"] == ("eagle3" if head.layers else "eagle")
    assert not any(isinstance(value, dict) for key, value in config.items() if "rope" not in key)
    assert BLOCK in weights and ("d2t" in weights) == ("d2t" in head.weights)
    if "d2t" in weights:
        assert np.array_equal(np.array(weights["d2t"]), head.weights["d2t"])
    kept = {"embed_tokens.weight": head.own_embedding, "lm_head.weight": head.own_head,
            "t2d": False, "verifier_norm.weight": False}  # fmt: skip
    assert {n: n in weights for n in kept} == kept
    rows = {row.source: row for row in summary.mapping}
    assert rows.keys() == head.weights.keys()
    assert {row.note for row in rows.values() if not row.target} <= {"left out: a copy"}
    assert_same(*heads(deep, source, out))
    assert convert(out, tmp_path / "again", dtype="float32").format is summary.format
    tiny.assert_same_bits(tiny.read(tmp_path / "again"), weights)
    assert read_json(tmp_path / "again" / "config.json") == config


@pytest.mark.parametrize("name", DIALECTS)
def test_what_the_source_leaves_open_stays_open(deep: Decoder, tmp_path: Path, name: str) -> None:
    """The same alternatives, which are keys at the top of config.json."""
    head, out = DIALECTS[name], tmp_path / "out"
    source = written(tmp_path / "source", head)
    convert(source, out, dtype="float32")
    before, raw = read_json(source / "config.json"), read_json(out / "config.json")
    tried = eagle_files.alternatives(raw)
    assert tried == (eagle_files.alternatives(before) if head.layers else [{}])
    found = []
    for keys in tried:
        (source / "config.json").write_text(json.dumps(before | keys))
        (out / "config.json").write_text(json.dumps(raw | keys))
        try:
            first, second = heads(deep, source, out)
        except DrafterError as error:  # this model lacks such a layer
            assert keys["feature_layers_are"] == "outputs" and "names" in str(error)
            continue
        assert first.config == second.config
        found.append(second.config)
    assert len(set(found)) == len(found) > (1 if head.layers else 0)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", ["specforge", "speculators-qwen3", "deepspec", "eagle-1-biased"])
def test_sixteen_bits_and_fewer(deep: Decoder, tmp_path: Path, name: str, bits: int | None) -> None:
    source, out = written(tmp_path / "source", DIALECTS[name]), tmp_path / "out"
    convert(source, out, bits=bits, group_size=32)
    weights = tiny.read(out)
    assert {w.dtype for w in weights.values()} <= {mx.bfloat16, mx.uint32, mx.int64}
    matrices = {n for n, w in weights.items() if n.endswith(".weight") and w.ndim == 2}
    assert {n for n in matrices if weights[n].dtype == mx.uint32} == (matrices if bits else set())
    text, tokens = prompt_of(12, seed=3), [5, 6, 7]
    found, meant = (
        said(each, at_the_end(each, deep, text), tokens) for each in heads(deep, out, source)
    )
    error = np.abs(found - meant).mean() / np.abs(meant).mean()
    assert 0 < error < {None: 0.03, 8: 0.05, 4: 0.6}[bits]
    if bits:
        with pytest.raises(OptionError, match="quantised already"):
            convert(out, tmp_path / "more", bits=4)
        convert(out, tmp_path / "copy")
        tiny.assert_same_bits(tiny.read(tmp_path / "copy"), weights)


def test_an_embedding_of_its_own_is_packed_too(deep: Decoder, tmp_path: Path) -> None:
    head = DIALECTS["specforge"]
    weights = head.weights | {"embed_tokens.weight": noise(np.random.default_rng(1), V, 32)}
    source = write(tmp_path / "source", head.config | {"embed_requires_grad": True}, weights)
    convert(source, tmp_path / "out", bits=8, group_size=32)
    assert "embed_tokens.scales" in tiny.read(tmp_path / "out")
    assert heads(deep, tmp_path / "out")[0].config.own_embedding


@pytest.mark.parametrize("name", ["eagle-1", "safeailab"])
def test_a_pickle(
    deep: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By torch where it is there; by a stand-in that reads files of its own where it is not."""
    head = DIALECTS[name]
    plain = written(tmp_path / "plain", head)
    source = write(tmp_path / "source", head.config, {})
    (source / "model.safetensors").unlink()
    try:
        import torch
    except ImportError:
        fake_torch.install(monkeypatch)
        arrays = {key: mx.array(value) for key, value in head.weights.items()}
        fake_torch.save(source / "pytorch_model.bin", arrays)
    else:
        state = {key: torch.tensor(value) for key, value in head.weights.items()}
        torch.save(state, source / "pytorch_model.bin")
    convert(source, tmp_path / "out", dtype="float32")
    assert_same(*heads(deep, plain, tmp_path / "out"))


def test_what_does_not_fit_is_one_line(deep: Decoder, folder: Path, tmp_path: Path) -> None:
    head = DIALECTS["specforge"]
    weights = head.weights
    wrong = weights["t2d"].copy()
    wrong[IDS[0]] = False
    outside = weights["d2t"].copy()
    outside[5] = outside[4] - 3
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "lacking": ({n: w for n, w in weights.items() if n != BLOCK}, "lacks the tensors"),
        "flags": (weights | {"t2d": wrong}, "t2d names 59 tokens, and not the 60 of d2t"),
        "ids": (weights | {"d2t": outside}, "d2t names a token twice or out of order"),
        "odd": (weights | {"extra.weight": wrong}, "no EAGLE head has: extra.weight"),
        "parallel": (weights | {"mask_hidden": wrong}, "drafts several tokens at once"),
    }
    for name, (tensors, words) in cases.items():
        with pytest.raises(DrafterError, match=words) as caught:
            convert(write(tmp_path / name, head.config, tensors), tmp_path / "out")
        assert "\n" not in str(caught.value)
    source = written(tmp_path / "source", head)
    with pytest.raises(OptionError, match="for ReDrafters, and this is a head of EAGLE"):
        convert(source, tmp_path / "out", to="apple")
    small = write_target(tmp_path / "small", num_hidden_layers=3)
    with pytest.raises(DrafterError, match=r"names \[1, 3, 4\], and this model has 3"):
        convert(source, tmp_path / "out", target=small)
    other = write_target(tmp_path / "other", num_hidden_layers=8, vocab_size=V + 8)
    with pytest.raises(DrafterError, match=r"vocabulary size 97.*105"):
        convert(source, tmp_path / "out", target=other)
    block = {"fc.weight": np.ones((4, 8)), "hidden_norm.weight": np.ones(4)}
    with pytest.raises(DrafterError, match="lacks the tensors of a block drafter"):
        convert(write(tmp_path / "block", {"model_type": "qwen3"}, block), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_and_the_card(tmp_path: Path) -> None:
    source = written(tmp_path / "source", DIALECTS["speculators-llama"])
    arguments = ["convert", str(source), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, [*arguments, "--dry-run"])
    assert result.exit_code == 0 and ": head of EAGLE, 14 tensors, to mlx" in result.stdout
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(cli.app, [*arguments, "-q", "--q-group-size", "32"])
    assert result.exit_code == 0 and "made for org/base" in result.stdout
    assert read_json(tmp_path / "out" / "config.json")["quantization"]["bits"] == 4
    text = card.render(convert(source, tmp_path / "more"), "me/drafter", "org/base")
    assert "- speculative-decoding\n- eagle\n---" in text
