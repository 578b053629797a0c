"""Medusa heads and speculators of every layout become folders that load as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
import tiny_drafters as tiny
from conftest import D, V
from tiny_heads import Weights, noise, said, write
from typer.testing import CliRunner

from mlx_redrafter.cli import main as cli
from mlx_redrafter.convert import card, convert
from mlx_redrafter.drafters import loading
from mlx_redrafter.drafters.loading import load_drafter
from mlx_redrafter.errors import ConvertError, DrafterError, OptionError
from mlx_redrafter.models import Decoder

K, N, WIDTH = 3, 3, 64
HIDDEN = np.random.default_rng(8).standard_normal(D).astype(np.float32)
TOKENS = [5, 6, 7]
OWN = "medusa_lm_head.safetensors"
BASE = {"model.embed_tokens.weight": np.ones((V, D), np.float32),
        "lm_head.weight": np.ones((V, D), np.float32)}  # fmt: skip
Source = tuple[dict[str, Any], Weights, str]


def heads(form: str = "{}.{}.linear.", last: str | None = "{}.1.weight") -> Weights:
    rng = np.random.default_rng(0)
    weights = {}
    for k in range(K):
        weights[form.format(k, 0) + "weight"] = noise(rng, D, D)
        weights[form.format(k, 0) + "bias"] = noise(rng, D)
        if last:
            weights[last.format(k)] = noise(rng, V, D, scale=3.0)
    return weights


def medusa_1() -> Source:
    """Configurations that were uploaded say 2 heads, whatever the file holds."""
    return {"medusa_num_heads": 2, "base_model_name_or_path": "org/base"}, heads(), OWN


def without_outputs() -> Source:
    return {"medusa_num_heads": K}, heads(last=None), OWN


def inside_a_model() -> Source:
    weights = heads("medusa_head.{}.{}.linear.", "medusa_head.{}.1.weight") | BASE
    config = {"model_type": "llama", "hidden_size": D, "vocab_size": V, "medusa_num_heads": K}
    return config, weights, "model.safetensors"


def tensorrt() -> Source:
    form, last = "medusa_heads.{}.medusa_layers.{}.linear.", "medusa_heads.{}.lm_head.weight"
    return {"num_medusa_heads": K, "vocab_size": V}, heads(form, last), "rank0.safetensors"


def vllm_shared() -> Source:
    """One matrix, stored once a head; a draft vocabulary; a scale."""
    weights = heads("blocks.{}.layers.{}.", "lm_heads.{}.weight")
    weights |= {f"lm_heads.{k}.weight": weights["lm_heads.0.weight"] for k in range(K)}
    weights["token_map"] = np.arange(3, 63)
    config = {"model_type": "medusa", "hidden_size": D, "vocab_size": V, "num_heads": K}
    return config | {"original_lm_head": True, "logit_scale": 0.5}, weights, "model.safetensors"


def by_names() -> Source:
    return {}, heads(), "model.safetensors"


def ibm() -> Source:
    """Tied, with the copies that some writers leave."""
    rng = np.random.default_rng(1)
    weights = {}
    for i in range(N):
        weights[f"speculator.proj.{i}.weight"] = noise(rng, WIDTH, D if i == 0 else WIDTH)
        weights[f"speculator.emb.{i}.weight"] = noise(rng, V, WIDTH)
        weights[f"speculator.ln.{i}.weight"] = 1 + noise(rng, WIDTH)
        weights[f"speculator.ln.{i}.bias"] = noise(rng, WIDTH)
        weights[f"speculator.head.{i}.weight"] = noise(rng, V, WIDTH, scale=3.0)
    config = {
        "model_type": "mlp_speculator", "emb_dim": D, "inner_dim": WIDTH, "n_predict": N,
        "tie_weights": True, "scale_input": True, "vocab_size": V,
    }  # fmt: skip
    return config, weights, "model.safetensors"


def untied() -> Source:
    config, weights, file = ibm()
    return config | {"tie_weights": False}, weights, file


def arctic() -> Source:
    rng = np.random.default_rng(2)
    weights = {"forget_emb.0.weight": noise(rng, V, WIDTH)}
    weights["head.0.weight"] = noise(rng, V, WIDTH, scale=3.0)
    for gate in ("forget", "input", "output", "cell"):
        weights[f"{gate}_proj.0.weight"] = noise(rng, WIDTH, D)
        weights[f"{gate}_proj.1.weight"] = noise(rng, WIDTH, WIDTH)
    for norm in ("cell_ln.0.", "state_ln.0."):
        weights |= {f"{norm}weight": 1 + noise(rng, WIDTH), f"{norm}bias": noise(rng, WIDTH)}
    size = str(WIDTH)
    config = {
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"], "method": "sum_lstm",
        "input_hidden_dim": D, "emb_dim": size, "inner_dim": size, "proj_dim": size,
        "n_predict": N, "tie_weights": True, "tie_lstm_embs": True, "scale_input": True,
        "vocab_size": V, "base_model_name_or_path": "org/base",
    }  # fmt: skip
    return config, weights, "model.safetensors"


SOURCES: dict[str, Callable[[], Source]] = {
    f.__name__: f
    for f in (medusa_1, without_outputs, inside_a_model, tensorrt, vllm_shared, by_names, ibm,
              untied, arctic)
}  # fmt: skip
MEDUSA = [name for name in SOURCES if name not in ("ibm", "untied", "arctic")]


def written(folder: Path, name: str) -> Path:
    config, weights, file = SOURCES[name]()
    return write(folder, config, weights, file)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(autouse=True)
def no_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac nothing else than elsewhere is written, but where a test says that it is one."""
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: False)


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_written_says_what_the_source_says(
    target: Decoder, target_folder: Path, tmp_path: Path, name: str
) -> None:
    source, out = written(tmp_path / "source", name), tmp_path / "out"
    summary = convert(source, out, dtype="float32", target=target_folder)
    assert summary.format.value == ("medusa" if name in MEDUSA else "speculator")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert config_of(out)["model_type"] in loading.DRAFTERS
    found, meant = (said(load_drafter(f, target), HIDDEN, TOKENS) for f in (out, source))
    assert np.array_equal(found, meant)
    again = convert(out, tmp_path / "again", dtype="float32")
    assert again.format is summary.format
    tiny.assert_same_bits(tiny.read(tmp_path / "again"), tiny.read(out))


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", ["medusa_1", "vllm_shared", "ibm", "arctic"])
def test_sixteen_bits_and_fewer(
    target: Decoder, tmp_path: Path, name: str, bits: int | None
) -> None:
    source, out = written(tmp_path / "source", name), tmp_path / "out"
    convert(source, out, bits=bits, group_size=32)
    weights = tiny.read(out)
    assert {w.dtype for w in weights.values()} <= {mx.bfloat16, mx.uint32, mx.int64}
    matrices = {n for n, w in weights.items() if n.endswith(".weight") and w.ndim == 2}
    packed = {n for n in matrices if weights[n].dtype == mx.uint32}
    assert packed == (matrices if bits else set())
    assert config_of(out).get("quantization") == (
        {"group_size": 32, "bits": bits} if bits else None
    )
    found, meant = (said(load_drafter(f, target), HIDDEN, TOKENS) for f in (out, source))
    error = np.abs(found - meant).mean() / np.abs(meant).mean()
    assert 0 < error < {None: 0.02, 8: 0.03, 4: 0.4}[bits]
    if bits:
        with pytest.raises(OptionError, match="quantised already"):
            convert(out, tmp_path / "more", bits=4)
        assert convert(out, tmp_path / "copy").format
        tiny.assert_same_bits(tiny.read(tmp_path / "copy"), weights)


def test_heads_get_four_bits_on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "source", "arctic")
    plain = convert(source, tmp_path / "cpu")
    assert "quantization" not in config_of(tmp_path / "cpu")
    monkeypatch.setattr("mlx.core.metal.is_available", lambda: True)
    summary = convert(source, tmp_path / "mac")
    packed = {"group_size": 64, "bits": 4}
    assert config_of(tmp_path / "mac")["quantization"] == packed
    assert summary.size < plain.size and any("--q-bits 16 keeps" in n for n in summary.notes)
    assert not any("--q-bits 16" in note for note in plain.notes)
    rows = {row.target: row.note for row in convert(source, tmp_path / "o", dry_run=True).mapping}
    assert rows["head.0.weight"] == "4 bits in groups of 64"
    for number, other in enumerate(({"bits": 16}, {"dtype": "float16"})):
        convert(source, tmp_path / str(number), **other)  # type: ignore[arg-type]
        assert "quantization" not in config_of(tmp_path / str(number))
    convert(source, tmp_path / "eight", bits=8)
    assert config_of(tmp_path / "eight")["quantization"]["bits"] == 8
    again = convert(tmp_path / "mac", tmp_path / "again")  # packed already
    assert not any("--q-bits 16" in note for note in again.notes)
    tiny.assert_same_bits(tiny.read(tmp_path / "again"), tiny.read(tmp_path / "mac"))
    apple = tiny.write(tmp_path / "apple", tiny.apple_weights("elman-8-1"),
                       tiny.apple_config("elman-8-1"))  # fmt: skip
    convert(apple, tmp_path / "redrafter")
    assert "quantization" not in config_of(tmp_path / "redrafter")
    arguments = ["convert", str(source), "--out", str(tmp_path / "cli"), "--q-bits", "16"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert "quantization" not in config_of(tmp_path / "cli")


def test_what_has_sixteen_bits_stays_as_it_is(tmp_path: Path) -> None:
    config, weights, file = medusa_1()
    halves = {name: value.astype(np.float16) for name, value in weights.items()}
    summary = convert(write(tmp_path / "source", config, halves, file), tmp_path / "out")
    found = tiny.read(tmp_path / "out")
    tiny.assert_same_bits(
        {row.source: found[row.target] for row in summary.mapping},
        {name: mx.array(value) for name, value in halves.items()},
    )
    assert summary.notes == ["made for org/base"]
    assert config_of(tmp_path / "out")["torch_dtype"] == "float16"


def test_a_model_beside_the_heads_is_another_format(tmp_path: Path, target_folder: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(target_folder, source)
    _, weights, file = medusa_1()
    mx.save_safetensors(str(source / file), {n: mx.array(w) for n, w in weights.items()})
    summary = convert(source, tmp_path / "out", dry_run=True)
    assert summary.format.value == "medusa"
    assert any("--format base converts that one" in note for note in summary.notes)
    assert convert(source, tmp_path / "out", format="base", dry_run=True).format.value == "base"


def test_the_card_names_the_kind(tmp_path: Path) -> None:
    summary = convert(written(tmp_path / "source", "arctic"), tmp_path / "out")
    text = card.render(summary, "me/drafter", "org/base")
    assert "- speculative-decoding\n- speculator\n---" in text and "redrafter\n---" not in text
    assert "mlx-redrafter chat --model org/base --drafter me/drafter" in text


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.bin"])
def test_a_pickle_beside_a_model(target: Decoder, tmp_path: Path, file: str) -> None:
    torch = pytest.importorskip("torch")
    config, weights, _ = medusa_1()
    meant = said(
        load_drafter(write(tmp_path / "plain", config, weights, OWN), target), HIDDEN, TOKENS
    )
    source = write(tmp_path / "source", config, BASE)
    torch.save({name: torch.tensor(value) for name, value in weights.items()}, source / file)
    convert(source, tmp_path / "out", dtype="float32")
    found = said(load_drafter(tmp_path / "out", target), HIDDEN, TOKENS)
    assert np.array_equal(found, meant)
    convert(source / file, tmp_path / "of-the-file", dtype="float32")
    tiny.assert_same_bits(tiny.read(tmp_path / "of-the-file"), tiny.read(tmp_path / "out"))


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self) -> Any:
            return (tmp_path.joinpath("ran").touch, ())

    folder = write(tmp_path / "source", {"medusa_num_heads": 2}, {})
    (folder / "model.safetensors").unlink()
    torch.save({"0.0.linear.weight": Evil()}, folder / "medusa_lm_head.pt")
    with pytest.raises(ConvertError, match="is refused") as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_dry_run_lists_every_tensor(tmp_path: Path) -> None:
    source = written(tmp_path / "ibm", "ibm")
    rows = {row.source: row for row in convert(source, tmp_path / "out", dry_run=True).mapping}
    assert rows.keys() == SOURCES["ibm"]()[1].keys()
    assert rows["speculator.proj.1.weight"].target == "proj.1.weight"
    assert (rows["speculator.head.1.weight"].target, rows["speculator.head.1.weight"].note) == (
        "", "left out: a copy",
    )  # fmt: skip
    summary = convert(written(tmp_path / "model", "inside_a_model"), tmp_path / "out", dry_run=True)
    assert summary.mapping[0].target == "blocks.0.layers.0.bias"
    assert summary.mapping[-1] == ("2 other tensors", "", (), "left out: the base model's")
    assert any("a model lies around" in note for note in summary.notes)
    arguments = ["convert", str(source), "--out", str(tmp_path / "out"), "--dry-run"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0 and ": speculator, 6 tensors, to mlx" in result.stdout
    assert not (tmp_path / "out").exists()


def test_a_single_head_without_a_word_is_named_by_its_file(tmp_path: Path) -> None:
    weights = {n: w for n, w in heads().items() if n.startswith("0.")}
    bare = write(tmp_path / "bare", {}, weights)
    with pytest.raises(ConvertError, match="--format tensorrt-llm or medusa"):
        convert(bare, tmp_path / "out")
    assert convert(bare, tmp_path / "declared", format="medusa").format.value == "medusa"
    named = write(tmp_path / "named", {}, weights, OWN)
    assert convert(named, tmp_path / "out").format.value == "medusa"


def wider(weights: Weights, name: str) -> Weights:
    return weights | {name: np.ones((D, D + 1), np.float32)}


def test_what_does_not_fit_is_one_line(tmp_path: Path, target_folder: Path) -> None:
    config, weights, _ = medusa_1()
    lacking = {name: w for name, w in weights.items() if not name.startswith("1.")}
    cases: dict[str, tuple[dict[str, Any], Weights, str]] = {
        "lacks": (config, lacking, "lacks number 1 of its Medusa heads"),
        "wrong": (config, wider(weights, "2.0.linear.weight"), "do not fit"),
        "none": ({"model_type": "medusa"}, dict(BASE), "lacks the heads' tensors"),
        "bare": ({}, ibm()[1], "impossible size"),
        "sizes": (config | {"hidden_size": 2 * D}, weights, "do not fit"),
    }
    for name, (given, tensors, words) in cases.items():
        with pytest.raises(DrafterError, match=words) as caught:
            convert(write(tmp_path / name, given, tensors), tmp_path / "out")
        assert "\n" not in str(caught.value)
    source = written(tmp_path / "medusa", "medusa_1")
    with pytest.raises(OptionError, match="--to apple is for ReDrafters"):
        convert(source, tmp_path / "out", to="apple")
    config = config_of(target_folder)
    for key, value in (("vocab_size", V + 8), ("hidden_size", 2 * D)):
        other = tmp_path / key
        other.mkdir()
        (other / "config.json").write_text(json.dumps(config | {key: value}))
        for name in ("medusa_1", "ibm"):
            with pytest.raises(DrafterError, match=str(value)):
                convert(written(tmp_path / name, name), tmp_path / "out", target=other)
    assert not (tmp_path / "out").exists()
