"""Medusa heads in every layout: against plain NumPy, as drafts that never change a text, broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from conftest import D, V, engine_of, plainly, prompt_of, run, write_target
from edits import Edit, edit_config, edit_entry, edit_file, edit_weights
from tiny_heads import HIDDEN, IDS, PARAMS, SHAPES, drafted, quantise, said, write
from tiny_medusa import (
    BASE,
    DIALECTS,
    K,
    blocks,
    heads,
    loaded,
    medusa_1,
    outputs,
    reference,
    vllm,
)

from mlx_redrafter.cli import info
from mlx_redrafter.drafters import files
from mlx_redrafter.drafters.loading import check_folder, load_drafter
from mlx_redrafter.drafters.medusa import Medusa
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.hub import kept
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.tree.shape import TreeShape


def assert_says(drafter: Medusa, expected: np.ndarray, hidden: np.ndarray) -> None:
    """(K, Vd) logits, and the greedy chain that follows from them."""
    found = said(drafter, hidden, [5, 6, 7])
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    ids = np.array(drafter.vocabulary)
    assert drafted(drafter, hidden, 5, K) == ids[expected.argmax(-1)].tolist()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", DIALECTS)
def test_every_layout_against_numpy(
    target: Decoder, tmp_path: Path, name: str, layers: int
) -> None:
    h = heads(layers)
    drafter = loaded(tmp_path, DIALECTS[name](h), target)
    assert drafter.levels == K
    assert_says(drafter, reference(h, HIDDEN), HIDDEN)


@pytest.mark.parametrize("around", [False, True])
def test_without_output_matrices_they_are_the_targets(
    target: Decoder, tmp_path: Path, around: bool
) -> None:
    """TGI's second layout, alone or with a base model's tensors, which are not the target's."""
    h = heads()
    h["U"] = [np.array(target.lm_head.weight)] * K
    weights = blocks(h, "{}.{}.linear.{}") | (BASE if around else {})
    config = {"medusa_num_heads": K, "medusa_num_layers": 1}
    drafter = loaded(tmp_path, (config, weights, "medusa_lm_head.safetensors"), target)
    assert_says(drafter, reference(h, HIDDEN), HIDDEN)


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_one_output_matrix_for_all(target: Decoder, tmp_path: Path, name: str) -> None:
    h = heads()
    h["U"] = h["U"][:1] * K
    config, weights, file = vllm(h)
    weights = {k: v for k, v in weights.items() if "lm_heads" not in k} | {name: h["U"][0]}
    weights = {k: v for k, v in weights.items() if "bias" not in k}
    h["b"] = [[np.zeros(D)]] * K
    dialect = {**config, "original_lm_head": True, "logit_scale": 0.5}, weights, file
    drafter = loaded(tmp_path, dialect, target)
    assert drafter.config.head == "shared"
    assert_says(drafter, 0.5 * reference(h, HIDDEN), HIDDEN)


@pytest.mark.parametrize("stored", ["cut", "whole", "target"])
def test_a_draft_vocabulary(target: Decoder, tmp_path: Path, stored: str) -> None:
    """Rows of the head's own matrix, stored so or to be taken, and rows of the target's."""
    h = heads()
    config, weights, file = vllm(h)
    if stored == "cut":
        weights = {k: v[IDS] if "lm_heads" in k else v for k, v in weights.items()}
    if stored == "target":
        weights = {k: v for k, v in weights.items() if "lm_heads" not in k}
        h["U"] = [np.array(target.lm_head.weight)] * K
    config["truncated_vocab_size"] = len(IDS)
    drafter = loaded(tmp_path, (config, weights | {"token_map": IDS}, file), target)
    assert_says(drafter, reference(h, HIDDEN)[:, IDS], HIDDEN)
    answer = plainly(target, prompt_of(9), 20)
    engine = engine_of(target, drafter, compiled=False)
    assert run(engine, prompt_of(9), None, SHAPES[1], 20) == answer


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("stay", [False, True])
def test_packed_weights(
    target: Decoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    cut: bool,
    stay: bool,
) -> None:
    """Unpacked as on a CPU, or left as they are."""
    if stay:
        monkeypatch.setattr(files, "dequantize_model", lambda model: model)
    h = heads()
    config, weights, file = vllm(h)
    stored, meant = quantise(weights, bits, ["blocks", "lm_heads"])
    for k in range(K):
        h["W"][k] = [meant[f"blocks.{k}.layers.0.weight"]]
        h["U"][k] = meant[f"lm_heads.{k}.weight"]
    config["quantization"] = {"group_size": 32, "bits": bits}
    more = {"token_map": IDS} if cut else {}
    drafter = loaded(tmp_path, (config, stored | more, file), target)
    assert isinstance(drafter.heads[0].out, nn.QuantizedLinear) is stay
    assert_says(drafter, reference(h, HIDDEN)[:, IDS if cut else slice(None)], HIDDEN)


def test_half_precision_becomes_the_targets_type(target: Decoder, tmp_path: Path) -> None:
    h = heads()
    config, weights, file = medusa_1(h)
    write(tmp_path, config, weights, file)
    halves = {name: mx.array(value).astype(mx.bfloat16) for name, value in weights.items()}
    mx.save_safetensors(str(tmp_path / file), halves)
    drafter = load_drafter(tmp_path, target)
    assert isinstance(drafter, Medusa)
    found = said(drafter, HIDDEN, [5, 6, 7])
    expected = reference(h, HIDDEN)
    assert drafter.heads[0].out.weight.dtype == target.dtype
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_a_target_of_16_bits(target_folder: Path, tmp_path: Path) -> None:
    h = heads()
    drafter = loaded(tmp_path, medusa_1(h), load_model(target_folder, dtype=mx.bfloat16))
    cell = drafter.searched(K)
    state, fixed = cell.start(mx.array(HIDDEN).astype(mx.bfloat16))
    logits, state = cell.step(mx.array([5]), state, fixed)
    assert (logits.dtype, state.dtype) == (mx.bfloat16, mx.bfloat16)
    expected = reference(h, HIDDEN)[0]
    assert np.abs(np.array(logits.astype(mx.float32))[0] - expected).max() < 0.05 * expected.max()


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_text_is_the_same(
    target: Decoder, tmp_path: Path, shape: TreeShape, params: Any
) -> None:
    """Also where more is drafted than there are heads; one shape as it is compiled."""
    compiled = shape == SHAPES[1]
    engine = engine_of(target, loaded(tmp_path, medusa_1(heads()), target), compiled)
    for length in (2, 9):
        prompt = prompt_of(length)
        assert run(engine, prompt, params, shape, 24) == plainly(target, prompt, 24, params)


def test_a_model_with_heads_is_read_without_them(tmp_path: Path) -> None:
    """Medusa-2 repositories are the base model and its heads at once."""
    folder = write_target(tmp_path / "both")
    h = heads()
    form = "medusa_head.{}.{}."
    more = blocks(h, form + "linear.{}") | outputs(h, form + "weight")
    edit_weights(lambda w: w.update({name: mx.array(value) for name, value in more.items()}))(
        folder
    )
    edit_config(medusa_num_heads=K, medusa_num_layers=1)(folder)
    target = load_model(folder)
    assert target.config.vocab_size == V
    drafter = load_drafter(folder, target)
    assert isinstance(drafter, Medusa)
    assert_says(drafter, reference(h, HIDDEN), HIDDEN)


def test_a_file_of_its_own_beside_a_model_goes_first(target: Decoder, tmp_path: Path) -> None:
    h = heads()
    write(tmp_path, {}, BASE)
    assert_says(loaded(tmp_path, medusa_1(h), target), reference(h, HIDDEN), HIDDEN)


def test_info_and_the_check_of_kept_drafters(target_folder: Path, tmp_path: Path) -> None:
    config, weights, file = medusa_1(heads())
    folder = write(tmp_path / "medusa", config, weights, file)
    assert kept.problem(folder, target_folder) is None
    facts = info.collect(str(target_folder), str(folder))["drafter"]
    assert facts["fits"] and facts["problem"] is None
    assert facts["architecture"] == "3 Medusa heads, 1 residual block each"
    assert (facts["head"], facts["draft_vocabulary"]) == ("own", V)
    assert facts["weights_bytes"] == 4 * K * (D * D + D + V * D)
    assert facts["bytes_per_draft_step"] == 4 * (D * D + D + V * D)
    rows = "medusa_lm_head.safetensors"
    shared = write(tmp_path / "shared", config, blocks(heads(), "{}.{}.linear.{}"), rows)
    facts = info.collect(str(target_folder), str(shared))["drafter"]
    assert (facts["fits"], facts["head"], facts["draft_vocabulary"]) == (True, "target", V)
    assert facts["bytes_per_draft_step"] == 4 * (D * D + D + V * D)
    edit_config(hidden_size=64)(folder)
    assert "hidden size 64" in str(kept.problem(folder, target_folder))


BROKEN: dict[str, tuple[Edit, str]] = {
    "missing output": (edit_weights(lambda w: w.pop("lm_heads.1.weight")), r"lacks heads.1.out"),
    "missing bias": (edit_weights(lambda w: w.pop("blocks.0.layers.0.bias")), "lacks.*bias"),
    "missing blocks": (
        edit_weights(lambda w: [w.pop(n) for n in list(w) if n.endswith("layers.0.weight")]),
        "lacks heads.0.blocks.0.linear.weight",
    ),
    "one too many": (
        edit_weights(lambda w: w.update({"0.1.weight": mx.zeros((V, D))})), "no Medusa head has",
    ),
    "missing head": (
        edit_weights(lambda w: [w.pop(n) for n in list(w) if re.match(r"\w+\.1\.", n)]),
        "lacks number 1",
    ),
    "no heads": (edit_weights(lambda w: [w.pop(n) for n in list(w) if "." in n]), "lacks the"),
    "wrong width": (
        edit_weights(lambda w: w.update({"blocks.0.layers.0.weight": mx.zeros((D, 8))})),
        r"\(32, 8\) instead of \(32, 32\)",
    ),
    "a scalar": (
        edit_weights(lambda w: w.update({"lm_heads.0.weight": mx.array(1.0)})),
        r"heads.0.out.weight \(\)",
    ),
    "another base": (edit_config(hidden_size=64), "hidden size 64.*32"),
    "another vocabulary": (edit_config(vocab_size=98), "vocabulary size 98.*97"),
    "rows of neither": (
        edit_weights(
            lambda w: w.update({f"lm_heads.{k}.weight": mx.zeros((50, D)) for k in range(K)})
        ),
        "50 tokens; needed: 60 or 97",
    ),
    "NaN": (edit_entry("lm_heads.0.weight", np.nan), "NaN.*heads.0.out.weight"),
    "ids too large": (edit_entry("token_map", V), "beyond"),
    "ids beyond 32 bits": (edit_entry("token_map", 2**40), "beyond"),
    "ids negative": (edit_entry("token_map", -1), "beyond"),
    "ids of reals": (
        edit_weights(lambda w: w.update(token_map=w["token_map"].astype(mx.float32))), "beyond",
    ),
    "ids in a table": (
        edit_weights(lambda w: w.update(token_map=w["token_map"].reshape(2, 30))),
        "output matrices of 97 tokens; needed|draft_vocab",
    ),
    "scale": (edit_config(logit_scale="much"), "logit_scale"),
    "activation": (edit_config(medusa_hidden_act="gelu"), "medusa_hidden_act"),
    "hidden size as text": (edit_config(hidden_size="32"), "impossible"),
    "truncated": (edit_file("model.safetensors", lambda b: b[:-100]), "truncated"),
    "no weights": (edit_file("model.safetensors", lambda b: None), "safetensors"),
    "packed without bits": (
        edit_weights(lambda w: w.update({"lm_heads.0.scales": mx.zeros((V, 1))})), "scales",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_can_be_wrong_with_a_folder(target: Decoder, tmp_path: Path, case: str) -> None:
    config, weights, file = vllm(heads())
    loaded(tmp_path, (config, weights | {"token_map": IDS}, file), target)
    spoil, words = BROKEN[case]
    spoil(tmp_path)
    with pytest.raises(DrafterError, match=words) as caught:
        load_drafter(tmp_path, target)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused_by_name(target: Decoder, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    said = rf"is a PyTorch file \({{}}\); .*: mlx-redrafter convert {tmp_path} --out FOLDER"
    for name in ("medusa_lm_head.pt", "pytorch_model.bin"):
        file = tmp_path / name
        file.write_bytes(b"PK")
        for asked in (load_drafter, check_folder):
            with pytest.raises(DrafterError, match=said.format(name)):
                asked(tmp_path, target)
        file.unlink()
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 5}))
    with pytest.raises(DrafterError, match=r"no \*\.safetensors file"):
        load_drafter(tmp_path, target)
    config, weights, file = vllm(heads())
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")  # the same once more
    assert load_drafter(write(tmp_path, config, weights, file), target)
    write(tmp_path, {}, BASE)  # heads beside a model
    (tmp_path / "medusa_lm_head.pt").write_bytes(b"PK")
    with pytest.raises(DrafterError, match=said.format("medusa_lm_head.pt")):
        load_drafter(tmp_path, target)
    write(tmp_path, *medusa_1(heads()))
    assert load_drafter(tmp_path, target)
