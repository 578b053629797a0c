"""MLP and LSTM speculators in every layout: against plain NumPy, as drafts, broken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx_redrafter  # noqa: F401  (chooses the BLAS before MLX is loaded)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from conftest import V, engine_of, plainly, prompt_of, run
from edits import Edit, edit_config, edit_entry, edit_file, edit_weights
from halves import half_slow
from tiny_heads import HIDDEN, IDS, PARAMS, SHAPES, Weights, drafted, noise, quantise, said, write
from tiny_speculators import (
    DIALECTS,
    N,
    arctic,
    ibm,
    loaded,
    reference,
)
from typer.testing import CliRunner

from mlx_redrafter.budget import costs
from mlx_redrafter.cli import info
from mlx_redrafter.cli import main as cli
from mlx_redrafter.drafters import files
from mlx_redrafter.drafters.loading import load_drafter
from mlx_redrafter.drafters.speculator import GATES, Speculator
from mlx_redrafter.errors import DrafterError
from mlx_redrafter.hub import kept
from mlx_redrafter.models import Decoder, load_model
from mlx_redrafter.tree.shape import TreeShape


def assert_says(
    drafter: Speculator, config: dict[str, Any], weights: Weights, ids: np.ndarray | slice
) -> None:
    tokens = [5, 60, 7]
    expected = reference(config, weights, HIDDEN, tokens)[:, ids]
    found = said(drafter, HIDDEN, tokens)
    assert np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())
    chain, vocabulary = [5], np.arange(V)[ids]
    for _ in range(N):
        last = reference(config, weights, HIDDEN, chain)[-1, ids]
        chain.append(int(vocabulary[last.argmax()]))
    assert drafted(drafter, HIDDEN, 5, N) == chain[1:]


@pytest.mark.parametrize("name", DIALECTS)
def test_every_layout_against_numpy(target: Decoder, tmp_path: Path, name: str) -> None:
    config, weights = DIALECTS[name]
    drafter = loaded(tmp_path, config, weights, target)
    assert drafter.levels == (None if config["tie_weights"] else N)
    assert_says(drafter, config, weights, slice(None))


def another_level(monkeypatch: pytest.MonkeyPatch) -> str:
    level = Speculator.level
    monkeypatch.setattr(
        Speculator, "level", lambda self, i, *rest: level(self, min(max(i, 1), 3 - i), *rest)
    )
    return "ibm-as-wide-as-the-target"


def the_first_cell_stays(monkeypatch: pytest.MonkeyPatch) -> str:
    level = Speculator.level

    def mutated(self: Speculator, i: int, tokens: mx.array, state: mx.array) -> Any:
        width = self.config.width
        if i:
            state = mx.concatenate([state[:, :width], mx.zeros((state.shape[0], width))], axis=-1)
        return level(self, i, tokens, state)

    monkeypatch.setattr(Speculator, "level", mutated)
    return "arctic-lstm"


@pytest.mark.parametrize("mutate", [another_level, the_first_cell_stays])
def test_a_mistake_in_the_levels_is_caught(
    target: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Any
) -> None:
    config, weights = DIALECTS[mutate(monkeypatch)]
    drafter = loaded(tmp_path, config, weights, target)
    with pytest.raises(AssertionError):
        assert_says(drafter, config, weights, slice(None))


def test_a_gate_may_have_an_embedding_of_its_own(target: Decoder, tmp_path: Path) -> None:
    config, weights = arctic("sum_lstm", copies=True)
    rng = np.random.default_rng(5)
    for gate in GATES:
        weights[f"speculator.{gate}_emb.0.weight"] = noise(rng, V, 64)
    config["tie_lstm_embs"] = False
    assert_says(loaded(tmp_path, config, weights, target), config, weights, slice(None))


def test_the_names_of_the_tensors_are_enough(target: Decoder, tmp_path: Path) -> None:
    for kind in ("ibm", "arctic-lstm", "arctic-rnn"):
        config, weights = DIALECTS[kind]
        silent = {k: v for k, v in config.items() if k != "model_type"}
        assert_says(loaded(tmp_path / kind, silent, weights, target), config, weights, slice(None))


@pytest.mark.parametrize("name", ["ibm", "arctic-lstm"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_draft_vocabulary(target: Decoder, tmp_path: Path, name: str, cut: bool) -> None:
    config, weights = DIALECTS[name]
    rows = {k: v[IDS] if cut and k.startswith("head") else v for k, v in weights.items()}
    drafter = loaded(tmp_path, config, rows | {"draft_vocab": IDS}, target)
    assert_says(drafter, config, weights, IDS)
    for params in PARAMS.values():
        answer = plainly(target, prompt_of(9), 20, params)
        engine = engine_of(target, drafter, compiled=False)
        assert run(engine, prompt_of(9), params, SHAPES[1], 20) == answer


@pytest.mark.parametrize("name", ["ibm", "arctic-lstm", "arctic-rnn"])
def test_half_precision_stays_it(target_folder: Path, tmp_path: Path, name: str) -> None:
    """A target of 16 bits: nothing on the way becomes wider."""
    config, weights = DIALECTS[name]
    halved = load_model(target_folder, dtype=mx.bfloat16)
    drafter = loaded(tmp_path, config, weights, halved)
    cell = drafter.searched(N)
    state, fixed = cell.start(mx.array(HIDDEN).astype(mx.bfloat16))
    for level, token in enumerate([5, 60, 7]):
        logits, state = cell.step(mx.array([token]), state, fixed)
        assert (logits.dtype, state.dtype) == (mx.bfloat16, mx.bfloat16), level
    expected = reference(config, weights, HIDDEN, [5, 60, 7])[-1]
    found = np.array(logits.astype(mx.float32))[0]
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["ibm", "arctic-lstm"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stay", [False, True])
def test_packed_weights(
    target: Decoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    bits: int,
    stay: bool,
) -> None:
    """Embeddings too, with rows that are left out, unpacked as on a CPU or left as they are."""
    if stay:
        monkeypatch.setattr(files, "dequantize_model", lambda model: model)
    config, weights = DIALECTS[name]
    stored, meant = quantise(weights, bits, ["emb", "proj", "head"])
    block = {"quantization": {"group_size": 32, "bits": bits}}
    drafter = loaded(tmp_path, config | block, stored | {"draft_vocab": IDS}, target)
    assert isinstance(drafter.head[0], nn.QuantizedLinear) is stay
    assert_says(drafter, config, meant, IDS)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("shape", half_slow(SHAPES), ids=[str(shape) for shape in SHAPES])
@pytest.mark.parametrize("name", ["ibm", "arctic-lstm"])
def test_the_text_is_the_same(
    target: Decoder, tmp_path: Path, name: str, shape: TreeShape, params: Any
) -> None:
    """Also where more is drafted than there are levels; one shape as it is compiled."""
    compiled = shape == SHAPES[1]
    engine = engine_of(target, loaded(tmp_path, *DIALECTS[name], target), compiled)
    prompt = prompt_of(9)
    assert run(engine, prompt, params, shape, 24) == plainly(target, prompt, 24, params)


@pytest.mark.measured
def test_what_it_costs_is_measured(target: Decoder, tmp_path: Path) -> None:
    """Levels that an untied one does not have are timed too: a table has no holes."""
    engine = engine_of(target, loaded(tmp_path, *DIALECTS["ibm"], target), compiled=False)
    found = costs.measure(target, engine.drafters, engine.step_function, compiled=False)
    assert set(found.draft) == set(costs.WIDTHS)
    assert all(first > 0 for first, _ in found.draft.values())


def test_info_and_the_check_of_kept_drafters(target_folder: Path, tmp_path: Path) -> None:
    config, weights = DIALECTS["arctic-lstm"]
    folder = write(tmp_path / "lstm", config | {"base_model_name_or_path": "org/base"}, weights)
    assert kept.problem(folder, target_folder) is None
    facts = info.collect(str(target_folder), str(folder))["drafter"]
    assert facts["fits"] and facts["problem"] is None
    assert facts["architecture"] == "lstm speculator for 3 levels, weights shared by all levels"
    assert (facts["head"], facts["draft_vocabulary"]) == ("own", V)
    assert facts["base"] == "org/base"
    shown = CliRunner().invoke(cli.app, ["info", str(target_folder), "-d", str(folder)])
    assert re.search(r"made for +org/base\b", shown.stdout), shown.output
    assert "lstm speculator for 3 levels" in shown.stdout
    width = 64
    assert facts["bytes_per_draft_step"] == 4 * (4 * width * width + 4 * width + V * width)
    edit_config(input_hidden_dim=width)(folder)
    assert "hidden size 64" in str(kept.problem(folder, target_folder))


BROKEN: dict[str, tuple[Edit, str]] = {
    "missing gate": (edit_weights(lambda w: w.pop("input_proj.1.weight")), "lacks input_proj.1"),
    "missing norm": (edit_weights(lambda w: w.pop("state_ln.0.bias")), "lacks state_ln.0.bias"),
    "missing head": (edit_weights(lambda w: w.pop("head.0.weight")), "lacks head.0.weight"),
    "unknown": (edit_weights(lambda w: w.update(extra=mx.zeros((2,)))), "no speculator has: extra"),
    "wrong width": (
        edit_weights(lambda w: w.update({"cell_proj.1.weight": mx.zeros((64, 8))})),
        r"cell_proj.1.weight \(64, 8\) instead of \(64, 64\)",
    ),
    "another base": (edit_config(input_hidden_dim=64), "hidden size 64.*32"),
    "another vocabulary": (edit_config(vocab_size=98), "vocabulary size 98.*97"),
    "no vocabulary size": (edit_config(vocab_size=None), "vocab_size None"),
    "no sizes": (edit_config(emb_dim=None, input_hidden_dim=None), "impossible size"),
    "another inner_dim": (edit_config(inner_dim="48", proj_dim="48", emb_dim="48"), "instead of"),
    "several layers": (edit_config(inner_dim="64.64"), "inner_dim '64.64' stands for several"),
    "widths apart": (edit_config(proj_dim="48"), "proj_dim '48' is not its inner_dim 64"),
    "a width as a word": (edit_config(inner_dim="wide"), "inner_dim 'wide' is an impossible size"),
    "no n_predict": (edit_config(n_predict=None), "n_predict None"),
    "n_predict of none": (edit_config(n_predict=0), "n_predict 0"),
    "n_predict without end": (edit_config(n_predict=10**9), "impossible"),
    "an untied LSTM": (edit_config(tie_weights=False), "tie_weights is false"),
    "another method": (edit_config(method="sum_gru"), "'sum_gru' is unknown"),
    "rows of neither": (
        edit_weights(lambda w: w.update({"head.0.weight": mx.zeros((50, 64))})), "50 tokens",
    ),
    "a scalar": (edit_weights(lambda w: w.update({"head.0.weight": mx.array(1.0)})), "0 tokens"),
    "NaN": (edit_entry("head.0.weight", np.nan), "NaN.*head.0.weight"),
    "ids too large": (
        edit_weights(lambda w: w.update(draft_vocab=mx.array([1, 2, V]))), "beyond",
    ),
    "no ids": (
        edit_weights(lambda w: w.update(draft_vocab=mx.zeros((0,), mx.int32))), "impossible size",
    ),
    "truncated": (edit_file("model.safetensors", lambda b: b[:-100]), "truncated"),
    "no weights": (edit_file("model.safetensors", lambda b: None), "safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_can_be_wrong_with_a_folder(target: Decoder, tmp_path: Path, case: str) -> None:
    loaded(tmp_path, *DIALECTS["arctic-lstm"], target)
    spoil, words = BROKEN[case]
    spoil(tmp_path)
    with pytest.raises(DrafterError, match=words) as caught:
        load_drafter(tmp_path, target)
    assert "\n" not in str(caught.value)


def test_an_untied_one_lacks_a_level(target: Decoder, tmp_path: Path) -> None:
    config, weights = ibm(False)
    weights = {name: value for name, value in weights.items() if ".2." not in name}
    with pytest.raises(DrafterError, match=r"lacks emb\.2\.weight, head\.2\.weight"):
        loaded(tmp_path, config, weights, target)
